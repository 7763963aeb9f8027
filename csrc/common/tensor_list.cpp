#include <Python.h> // first, as it asks for

#include "tensor_list.h"

#include <memory>

namespace sama {
namespace {

// Holds the GIL while it lives. Where the thread has it anyway this costs next to nothing.
class HoldGil {
 public:
  HoldGil() : python_(Py_IsInitialized() != 0) {
    if (python_) state_ = PyGILState_Ensure();
  }
  ~HoldGil() {
    if (python_) PyGILState_Release(state_);
  }
  HoldGil(const HoldGil&) = delete;

 private:
  bool python_;
  PyGILState_STATE state_ = PyGILState_UNLOCKED;
};

void delete_list(StableListHandle list) { torch_delete_list(list); }

} // namespace

Tensor TensorRef::owned() const {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
  return Tensor(handle);
}

TensorList::TensorList(StableListHandle list) {
  const std::unique_ptr<StableListOpaque, void (*)(StableListHandle)> owner(list, delete_list);
  size_t size;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
  handles_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
    handles_[i] = torch::stable::detail::to<AtenTensorHandle>(element);
  }
}

// A tensor that has a Python object keeps it alive as long as there are references in C++, and a call's are the only
// ones. So with every handle that goes torch takes the GIL, which the thread gave back when it called the op: 420 of
// 730 instructions for a tensor, and a wait where another Python thread runs. Here it is taken once.
TensorList::~TensorList() {
  if (handles_.empty()) return;
  const HoldGil gil;
  for (const AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
}

} // namespace sama
