// Tensor lists as plain views of CPU memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/tensor_lists.h"

namespace sama {

struct Dim {
  int64_t size;
  int64_t stride;
};

// One tensor's memory. Elements are numbered in logical (row-major) order, or, where all operands of a tensor share
// one dense layout, in memory order.
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

// The operands of one op. Lists are added one by one; `finish` makes the views.
class Operands : public TensorLists {
 public:
  explicit Operands(const char* op) : TensorLists(op, aoti_torch_device_type_cpu()) {}

  void finish();
  const View& view(int list, int64_t tensor) const { return views_[list][tensor]; }

 private:
  std::vector<std::vector<View>> views_;
};

// A new 0-dim float64 CPU tensor.
Tensor make_double(double value);

} // namespace sama
