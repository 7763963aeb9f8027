// Sums with the same bits in every run: every block adds up in a fixed order and writes to a slot of its own, a second
// kernel adds up the slots in a fixed order. No atomics, and nothing waits for the host.
#pragma once

#include "runtime.h"

namespace sama {

// The sum over the block's threads.
__device__ inline double block_sum(double own) {
  __shared__ double lanes[kThreads];
  __syncthreads(); // a sum before this one may still be read
  lanes[threadIdx.x] = own;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < width) lanes[threadIdx.x] += lanes[threadIdx.x + width];
  }
  __syncthreads(); // only thread 0's is used, but all of them read it
  return lanes[0];
}

// sum += x^2: the product of two float32 is exact in double, so fusing it changes nothing there.
__device__ inline double add_square(double sum, double x) { return fma(x, x, sum); }

// Slots for `sums` sums over `count` blocks, and where the sums go.
class Slots {
 public:
  Slots(TensorRef like, int64_t count, int64_t sums);

  // Of sum number `sum`; slot i belongs to chunk i.
  double* slots(int64_t sum) const { return data_ + sum * count_; }
  // A tensor with the sums, on the device of `like`: shape () for one of them, else (sums,).
  Tensor total(const Launcher& launch) const;

 private:
  int64_t count_, sums_;
  Tensor buffer_, result_;
  double* data_;
};

} // namespace sama
