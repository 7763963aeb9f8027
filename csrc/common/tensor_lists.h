// The list arguments of an op, wherever its kernels run: one look at each tensor's metadata, all checks before anything
// is written. The messages are those of sama_kernels/backends/reference.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "dtypes.h"

namespace sama {

using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// Throws std::runtime_error("sama::<op>: <message>"), which is a RuntimeError in Python.
[[noreturn]] void fail(const char* op, const std::string& message);

class TensorLists {
 public:
  // `op` prefixes the messages. `device_type`: where all tensors must be, on one and the same device.
  TensorLists(const char* op, int32_t device_type) : op_(op), device_type_(device_type) {}

  // Adds a list argument; returns its index. The first one to be added gives lengths and shapes. `written`: the op
  // changes it, so its elements must not overlap.
  int add(const char* name, const TensorList& tensors, bool written = false);
  // Like `add`, but an empty list means "not given": returns -1.
  int add_optional(const char* name, const TensorList& tensors);
  // Adds a list of contiguous tensors of this dtype and of shapes of their own, which the kernels read as they lie. They
  // number the elements of the other lists in row-major order, which makes it the only one in which those are `flat`.
  int add_in_row_major_order(
      const char* name, const TensorList& tensors, torch::headeronly::ScalarType type, const char* type_name);
  void require_same_dtype(int a, int b) const;

  int64_t count() const { return int64_t(sizes_.size()); }
  int lists() const { return int(lists_.size()); }
  int64_t numel(int64_t tensor) const { return sizes_[tensor]; }
  const Tensor& tensor(int list, int64_t index) const { return (*lists_[list].tensors)[index]; }
  Dtype dtype(int list, int64_t index) const { return lists_[list].dtypes[index]; }
  bool written(int list) const { return lists_[list].written; }
  // Do the operands of a tensor lie in memory in one order without holes? Then they can be taken for flat arrays:
  // element-wise ops do not care how the elements are numbered, as long as the operands agree.
  bool flat(int64_t tensor) const;

 private:
  struct List {
    const char* name;
    const TensorList* tensors;
    bool written;
    std::vector<Dtype> dtypes; // F32 for those that only `scalar_type` describes
    bool own_shape = false;
  };
  void check_count(const char* name, const TensorList& tensors) const;
  void check_device(const char* name, const TensorList& tensors, int64_t index) const;

  const char* op_;
  int32_t device_type_;
  std::vector<List> lists_;
  std::vector<int64_t> sizes_;
  bool only_row_major_ = false;
};

// Row-major without gaps.
bool row_major(const Tensor& tensor);

// Checks that `tensor` is one number of a real dtype that a scheduler or an optimizer may use...
void require_scalar(const char* op, const std::string& name, const Tensor& tensor);
// ... or a float64 number: the result of the op named `source`.
void require_double(const char* op, const std::string& name, const Tensor& tensor, const char* source);
// The value of such a tensor on the CPU.
double read_scalar(const char* op, const std::string& name, const Tensor& tensor);
double read_double(const char* op, const std::string& name, const Tensor& tensor, const char* source);

} // namespace sama
