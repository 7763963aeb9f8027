// Tensor lists as plain views: one look at each tensor's metadata, all checks before anything is written.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../common/dtypes.h"

namespace sama {

using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

struct Dim {
  int64_t size;
  int64_t stride;
};

// One tensor's memory. Elements are numbered in logical (row-major) order, or, where all operands of a tensor share
// one dense layout, in memory order: element-wise ops do not care, as long as the operands agree.
struct View {
  char* data = nullptr;
  Dtype dtype = Dtype::F32;
  std::vector<Dim> dims; // empty: the elements lie one after the other

  bool flat() const { return dims.empty(); }
  template <class T = void>
  T* at(int64_t index) const {
    return reinterpret_cast<T*>(data + index * size_of(dtype));
  }
};

// Throws std::runtime_error("<op>: <message>"), which is a RuntimeError in Python.
[[noreturn]] void fail(const char* op, const std::string& message);

// The operands of one op. Lists are added one by one; `finish` decides the layouts.
class Operands {
 public:
  // `op` prefixes the messages. The first list to be added gives lengths and shapes.
  explicit Operands(const char* op) : op_(op) {}

  // Adds a list argument; returns its index. `written`: the op changes it, so its elements must not overlap.
  int add(const char* name, const TensorList& tensors, bool written = false);
  // Like `add`, but an empty list means "not given": returns -1.
  int add_optional(const char* name, const TensorList& tensors);
  void require_same_dtype(int a, int b) const;
  void finish();

  int64_t count() const { return int64_t(sizes_.size()); }
  int64_t numel(int64_t tensor) const { return sizes_[tensor]; }
  const View& view(int list, int64_t tensor) const { return lists_[list].views[tensor]; }

 private:
  struct List {
    const char* name;
    const TensorList* tensors;
    bool written;
    std::vector<View> views;
  };
  void lay_out(int64_t tensor);

  const char* op_;
  std::vector<List> lists_;
  std::vector<int64_t> sizes_;
};

// The value of a tensor with one element on the CPU, of any real dtype that a scheduler or an optimizer may use.
double read_scalar(const char* op, const std::string& name, const Tensor& tensor);
// The same, but only float64: the result of the op named `source`.
double read_double(const char* op, const std::string& name, const Tensor& tensor, const char* source);
// A new 0-dim float64 CPU tensor.
Tensor make_double(double value);

} // namespace sama
