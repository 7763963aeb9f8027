#include "reduce.h"

#include <torch/csrc/stable/ops.h>

namespace sama {
namespace {

// Block b: results[b] <- the sum of its `count` slots.
__global__ void __launch_bounds__(kThreads) slot_sum_kernel(const double* slots, int64_t count, double* results) {
  const double* own = slots + int64_t(blockIdx.x) * count;
  double sum = 0.0;
  constexpr int kAtATime = 8; // loads under way together: this kernel only waits for memory
  for (int64_t i = threadIdx.x; i < count; i += kAtATime * kThreads) {
    double values[kAtATime];
    SAMA_UNROLL
    for (int k = 0; k < kAtATime; ++k) values[k] = i + k * kThreads < count ? own[i + k * kThreads] : 0.0;
    SAMA_UNROLL
    for (int k = 0; k < kAtATime; ++k) sum += values[k];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) results[blockIdx.x] = sum;
}

Tensor doubles(TensorRef like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return torch::stable::new_empty(like.owned(), shape, torch::headeronly::ScalarType::Double);
}

} // namespace

Slots::Slots(TensorRef like, int64_t count, int64_t sums)
    : count_(count),
      sums_(sums),
      buffer_(doubles(like, {count * sums})),
      result_(sums == 1 ? doubles(like, {}) : doubles(like, {sums})),
      data_(static_cast<double*>(buffer_.data_ptr())) {}

Tensor Slots::total(const Launcher& launch) const {
  const double* const slots = data_;
  double* const results = static_cast<double*>(result_.data_ptr());
  launch(slot_sum_kernel, sums_, slots, count_, results);
  return result_;
}

} // namespace sama
