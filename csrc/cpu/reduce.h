// Sums with the same bits in every run, on every instruction set and for any number of threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "isa.h"

namespace sama {

// Partial sums in double: fixed in number, whatever the width of the machine's vectors. 32 of them, so that several
// additions are under way at a time; with 8 the sum is bound by the latency of an addition, half as fast.
struct Lanes {
  static constexpr int64_t kCount = 32;
  alignas(64) double sum[kCount] = {};

  double total() const {
    double left[kCount];
    std::memcpy(left, sum, sizeof left);
    for (int64_t width = kCount / 2; width > 0; width /= 2)
      for (int64_t lane = 0; lane < width; ++lane) left[lane] += left[lane + width];
    return left[0];
  }
};

// lanes += a * b; element i goes to lane i mod 32.
void add_products(const float* a, const float* b, int64_t n, Lanes& lanes);
void add_products(const double* a, const double* b, int64_t n, Lanes& lanes);

template <class T>
void add_squares(const T* values, int64_t n, Lanes& lanes) {
  add_products(values, values, n, lanes);
}

// One slot per chunk, summed in the order of the chunks.
inline double total(const std::vector<Lanes>& slots) {
  double sum = 0.0;
  for (const Lanes& slot : slots) sum += slot.total();
  return sum;
}

} // namespace sama
