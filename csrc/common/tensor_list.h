// A list argument of an op as the dispatcher hands it over: handles of tensors. In place of std::vector<Tensor>, which
// allocates a shared_ptr's counter for each of them: some 320 instructions until it is freed again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace sama {

using torch::stable::Tensor;

// A tensor that somebody else keeps alive. Every getter is a call into libtorch: ask once.
class TensorRef {
 public:
  explicit TensorRef(AtenTensorHandle handle) : handle_(handle) {}
  TensorRef(const Tensor& tensor) : handle_(tensor.get()) {}

  Tensor owned() const; // one more reference

  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype); } // as the aoti_torch_dtype_* number them
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  bool is_cpu() const { return device_type() == aoti_torch_device_type_cpu(); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  const int64_t* sizes() const { return get<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return get<int64_t*>(aoti_torch_get_strides); }
  void* data_ptr() const { return get<void*>(aoti_torch_get_data_ptr); }

 private:
  template <class Value>
  Value get(AOTITorchError (*getter)(AtenTensorHandle, Value*)) const {
    Value value;
    TORCH_ERROR_CODE_CHECK(getter(handle_, &value));
    return value;
  }

  AtenTensorHandle handle_;
};

class TensorList {
 public:
  // Takes over the list and its tensors.
  explicit TensorList(StableListHandle list);
  TensorList(TensorList&&) noexcept = default;
  TensorList(const TensorList&) = delete;
  ~TensorList();

  bool empty() const { return handles_.empty(); }
  size_t size() const { return handles_.size(); }
  TensorRef operator[](size_t index) const { return TensorRef(handles_[index]); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

} // namespace sama

namespace torch::stable::detail {

// How TORCH_BOX makes one.
template <>
struct ToImpl<sama::TensorList> {
  static sama::TensorList call(StableIValue value, uint64_t, bool) {
    return sama::TensorList(to<StableListHandle>(value));
  }
};

} // namespace torch::stable::detail
