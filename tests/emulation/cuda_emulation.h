// Enough of CUDA to run csrc/cuda on a CPU: in place of csrc/cuda/runtime.h, for tests where there is no GPU.
//
// One block runs after the other. The threads of a block are coroutines that hand over at barriers and where the lanes of
// a warp exchange words, so shared memory, barriers and the division of work are the real ones. Nothing runs at the same
// time: what is shown is indexing and arithmetic, not memory ordering, and not the launches themselves. Launches can be
// captured and replayed like a CUDA graph, with the parameters that they had then.
#pragma once

#include <cmath>
#include <cstdint>

#include <torch/csrc/stable/library.h>

#include "graphs.h"
#include "tensor_lists.h"

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__ & // it stands between a parameter's type and name: one copy for all threads
#define __syncthreads emulation::barrier

#define SAMA_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(sama_emulated, CPU, m)

struct EmulatedIndex {
  unsigned x;
};
extern EmulatedIndex threadIdx, blockIdx;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

extern bool scalars_on_host; // else 0-dim tensors count as lying on the device
void barrier();
uint4 swap_with_neighbour(uint4 own);
// Calls body(data) for every thread of every block.
void run(int64_t blocks, void (*body)(void*), void* data);
// Where the address is not a multiple of 16, as a GPU would, ends the program.
void require_aligned(const void* address);
// Counts the bytes and the sectors of 32 bytes that the 16-byte stores of a warp, each lane's n-th one together, touch.
void count_store(const void* address);

} // namespace emulation

namespace sama {

constexpr int kThreads = 256, kWarp = 32;

inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline bool on_host(TensorRef) { return emulation::scalars_on_host; }

class Launcher {
 public:
  Launcher(const char*, TensorRef) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    static_assert((std::is_same_v<std::decay_t<Parameters>, Arguments> && ...), "as in csrc/cuda/runtime.h");
    // By value, as a graph has them: what they point to may have other contents in a replay.
    const auto launch = [=] {
      const auto call = [&] { kernel(arguments...); };
      const auto body = [](void* data) { (*static_cast<decltype(call)*>(data))(); };
      emulation::run(blocks, body, const_cast<void*>(static_cast<const void*>(&call)));
    };
    emulation::capturing() ? emulation::add_to_graph(launch) : launch();
  }
};

inline uint4 load16(const void* address) {
  emulation::require_aligned(address);
  return *static_cast<const uint4*>(address);
}

inline void store16(void* address, uint4 words) {
  emulation::require_aligned(address);
  emulation::count_store(address);
  *static_cast<uint4*>(address) = words;
}

inline uint4 swap_with_neighbour(uint4 own) { return emulation::swap_with_neighbour(own); }

} // namespace sama
