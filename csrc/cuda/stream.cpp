// torch's current CUDA stream, without a link-time need of libtorch_cuda: the extension also loads where torch has no
// CUDA. A weak symbol would not do: it can stay null although the library is loaded.
#include <dlfcn.h>

#include "../common/tensor_lists.h"

namespace sama {
namespace {

using Getter = AOTITorchError (*)(int32_t device, void** stream);

Getter find_getter() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

} // namespace

void* current_stream(const char* op, int32_t device) {
  static const Getter getter = find_getter();
  if (!getter)
    fail(op, "torch's current CUDA stream cannot be found: libtorch_cuda.so is not loaded or lacks"
             " aoti_torch_get_current_cuda_stream; install a build of torch >= 2.11 for CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

} // namespace sama
