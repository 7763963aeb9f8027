// Everything that the kernels and their callers need of the CUDA runtime, in one place: the tests replace this part to
// run the same sources on a CPU (tests/emulation).
#pragma once

#ifdef SAMA_EMULATION
#include "cuda_emulation.h"
#else

#include <cstdint>
#include <string>
#include <type_traits>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/tensor_lists.h"

#define SAMA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sama, CUDA, m)

namespace sama {

constexpr int kThreads = 256; // of every kernel
constexpr int kWarp = 32;

// The stream that torch is using on a device, a cudaStream_t.
void* current_stream(const char* op, int32_t device);

inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
inline bool on_host(TensorRef scalar) { return scalar.is_cpu(); }

// Makes the device of a tensor the current one while it lives, and launches kernels on torch's current stream there.
class Launcher {
 public:
  Launcher(const char* op, TensorRef like)
      : op_(op),
        guard_(like.device_index()),
        stream_(static_cast<cudaStream_t>(current_stream(op, like.device_index()))) {}

  // Not kernel<<<...>>>, so that host code can include this; the arguments must have the parameters' very types.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    static_assert((std::is_same_v<Parameters, Arguments> && ...), "a kernel's parameters are passed by address");
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    const cudaError_t error = cudaLaunchKernel(
        reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(kThreads), addresses, 0, stream_);
    if (error == cudaSuccess) return;
    cudaGetLastError(); // or the next launch would report it again
    fail(op_, std::string("a kernel could not be launched: ") + cudaGetErrorString(error));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

__device__ inline uint4 load16(const void* address) { return *static_cast<const uint4*>(address); }
__device__ inline void store16(void* address, uint4 words) { *static_cast<uint4*>(address) = words; }

#ifdef __CUDACC__ // host code includes this, too
// What lane 2 k + 1 has for lane 2 k, and the other way round; the whole warp has to call it.
__device__ inline uint4 swap_with_neighbour(uint4 own) {
  constexpr unsigned kAll = 0xffffffff;
  return {
      __shfl_xor_sync(kAll, own.x, 1), __shfl_xor_sync(kAll, own.y, 1), __shfl_xor_sync(kAll, own.z, 1),
      __shfl_xor_sync(kAll, own.w, 1)};
}
#endif

} // namespace sama

#endif
