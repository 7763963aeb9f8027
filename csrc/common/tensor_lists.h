// The list arguments of an op, wherever its kernels run: one look at each tensor's metadata, all checks before anything
// is written. The messages are those of sama_kernels/backends/reference.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dtypes.h"
#include "tensor_list.h"

namespace sama {

// Throws std::runtime_error("sama::<op>: <message>"), which is a RuntimeError in Python.
[[noreturn]] void fail(const char* op, const std::string& message);

// How messages call a tensor: the text is made when there is one. Refers to what it is made of.
class Name {
 public:
  Name(const char* list, int64_t index = -1) : list_(list), index_(index) {}
  Name(const std::string& name) : Name(name.c_str()) {}
  std::string text() const;

 private:
  const char* list_;
  int64_t index_; // -1: not in a list
};
inline std::string operator+(const Name& name, const std::string& rest) { return name.text() + rest; }

class TensorLists {
 public:
  // `op` prefixes the messages. `device_type`: where all tensors must be, on one and the same device.
  TensorLists(const char* op, int32_t device_type)
      : op_(op), device_type_(device_type), on_cpu_(device_type == aoti_torch_device_type_cpu()) {}

  // Adds a list argument; returns its index. The first one to be added gives lengths and shapes. `written`: the op
  // changes it, so its elements must not overlap.
  int add(const char* name, const TensorList& tensors, bool written = false);
  // Like `add`, but an empty list means "not given": returns -1.
  int add_optional(const char* name, const TensorList& tensors);
  // Adds a list of contiguous tensors of this dtype and of shapes of their own, which the kernels read as they lie.
  // They number the elements of the other lists in row-major order, the only one in which those are then `flat`.
  int add_in_row_major_order(const char* name, const TensorList& tensors, int32_t dtype, const char* dtype_name);
  void require_same_dtype(int a, int b) const;

  int64_t count() const { return int64_t(sizes_.size()); }
  int lists() const { return int(lists_.size()); }
  int64_t numel(int64_t tensor) const { return sizes_[tensor]; }
  TensorRef tensor(int list, int64_t index) const { return (*lists_[list].tensors)[index]; }
  Dtype dtype(int list, int64_t index) const { return lists_[list].layouts[index].dtype; }
  bool written(int list) const { return lists_[list].written; }
  bool row_major(int list, int64_t index) const { return lists_[list].layouts[index].row_major; }
  // Do the operands of a tensor lie in memory in one order without holes? Then they can be taken for flat arrays:
  // element-wise ops do not care how the elements are numbered, as long as the operands agree.
  bool flat(int64_t tensor) const { return all_row_major_ || sizes_[tensor] <= 1 || share_dense_layout(tensor); }

 private:
  // What libtorch was asked about a tensor. The arrays belong to the tensor.
  struct Layout {
    const int64_t* sizes;
    const int64_t* strides;
    int32_t dim;
    Dtype dtype; // F32 in lists that only the kernels can read
    bool row_major;
  };
  struct List {
    const char* name;
    const TensorList* tensors;
    bool written;
    bool own_shape;
    std::vector<Layout> layouts;
  };
  void check_count(const char* name, const TensorList& tensors) const;
  void check_device(const char* name, const TensorList& tensors, int64_t index);
  void check_shape(const char* name, const Layout& layout, int64_t index) const;
  bool share_dense_layout(int64_t tensor) const;
  static Layout layout_of(TensorRef tensor, Dtype dtype);

  const char* op_;
  int32_t device_type_;
  bool on_cpu_;
  std::vector<List> lists_;
  std::vector<int64_t> sizes_;
  std::optional<int32_t> device_index_; // of the first tensor of all
  bool only_row_major_ = false;
  bool all_row_major_ = true;
};

// Row-major without gaps.
bool row_major(TensorRef tensor);

// Checks that `tensor` is one number of a real dtype that a scheduler or an optimizer may use, and returns the dtype...
torch::headeronly::ScalarType require_scalar(const char* op, const Name& name, TensorRef tensor);
// ... or a float64 number: the result of the op named `source`.
void require_double(const char* op, const Name& name, TensorRef tensor, const char* source);
// The value of such a tensor on the CPU.
double read_scalar(const char* op, const Name& name, TensorRef tensor);
double read_double(const char* op, const Name& name, TensorRef tensor, const char* source);

} // namespace sama
