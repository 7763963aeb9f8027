#include "reduce.h"

namespace sama {
namespace {

// Vector types of the compiler rather than a loop over lanes, which g++ would first unroll and then not vectorise.
// It splits them for narrower machines; each lane's operations stay the same.
typedef double Doubles __attribute__((vector_size(64)));
constexpr int64_t kWidth = 8, kVectors = Lanes::kCount / kWidth;
static_assert(kVectors == 4, "the loop below is written out for four");

template <class T>
SAMA_INLINE Doubles wide(const T* values) {
  typedef T Values __attribute__((vector_size(kWidth * sizeof(T))));
  Values x;
  std::memcpy(&x, values, sizeof x);
  return __builtin_convertvector(x, Doubles);
}

template <class T>
SAMA_CLONES void add_products_loop(const T* a, const T* b, int64_t n, double* sums) {
  Doubles sum[kVectors];
  std::memcpy(sum, sums, sizeof sum);
  int64_t i = 0;
  for (; i + Lanes::kCount <= n; i += Lanes::kCount) {
    sum[0] += wide(a + i) * wide(b + i);
    sum[1] += wide(a + i + kWidth) * wide(b + i + kWidth);
    sum[2] += wide(a + i + 2 * kWidth) * wide(b + i + 2 * kWidth);
    sum[3] += wide(a + i + 3 * kWidth) * wide(b + i + 3 * kWidth);
  }
  std::memcpy(sums, sum, sizeof sum);
  for (int64_t lane = 0; i < n; ++i, ++lane) sums[lane] += double(a[i]) * double(b[i]);
}

} // namespace

void add_products(const float* a, const float* b, int64_t n, Lanes& lanes) { add_products_loop(a, b, n, lanes.sum); }
void add_products(const double* a, const double* b, int64_t n, Lanes& lanes) { add_products_loop(a, b, n, lanes.sum); }

} // namespace sama
