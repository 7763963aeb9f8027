#include "reduce.h"

namespace sama {
namespace {

// Vector types of the compiler rather than a loop over lanes, which g++ would first unroll and then not vectorise.
// It splits them for narrower machines; each lane's operations stay the same.
typedef double Doubles __attribute__((vector_size(64)));
constexpr int64_t kWidth = 8, kVectors = Lanes::kCount / kWidth;
static_assert(kVectors == 4, "the loop below is written out for four");

template <class T>
SAMA_INLINE Doubles square(const T* values) {
  typedef T Values __attribute__((vector_size(kWidth * sizeof(T))));
  Values x;
  std::memcpy(&x, values, sizeof x);
  const Doubles wide = __builtin_convertvector(x, Doubles);
  return wide * wide;
}

template <class T>
SAMA_CLONES void add_squares_loop(const T* values, int64_t n, double* sums) {
  Doubles sum[kVectors];
  std::memcpy(sum, sums, sizeof sum);
  int64_t i = 0;
  for (; i + Lanes::kCount <= n; i += Lanes::kCount) {
    sum[0] += square(values + i);
    sum[1] += square(values + i + kWidth);
    sum[2] += square(values + i + 2 * kWidth);
    sum[3] += square(values + i + 3 * kWidth);
  }
  std::memcpy(sums, sum, sizeof sum);
  for (int64_t lane = 0; i < n; ++i, ++lane) {
    const double wide = values[i];
    sums[lane] += wide * wide;
  }
}

} // namespace

void add_squares(const float* values, int64_t n, Lanes& lanes) { add_squares_loop(values, n, lanes.sum); }
void add_squares(const double* values, int64_t n, Lanes& lanes) { add_squares_loop(values, n, lanes.sum); }

} // namespace sama
