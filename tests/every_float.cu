// Roots and reciprocals of csrc/common/arithmetic.h on a GPU, for all 2^32 arguments, against those that IEEE 754 rounds
// correctly. Prints, for each function, how many results are wrong, one such argument, and how many arguments it takes.
//   nvcc -O3 --fmad=false -arch=native -I. tests/every_float.cu
#include <cstdio>

#include "csrc/common/arithmetic.h"

constexpr int kFunctions = 4;
const char* const kNames[kFunctions] = {"square_root", "reciprocal", "UsualRange::root", "UsualRange::inverse_or_zero"};

struct Counts {
  unsigned long long wrong, taken;
  unsigned argument;
};
__device__ Counts counts[kFunctions];

template <int function>
__device__ void count(unsigned long long& taken, bool takes, float argument, float result, float right) {
  if (!takes) return;
  ++taken;
  if (__float_as_uint(result) == __float_as_uint(right) || (result != result && right != right)) return;
  atomicAdd(&counts[function].wrong, 1ull);
  counts[function].argument = __float_as_uint(argument);
}

template <class Float> // arithmetic.h has UsualRange for a GPU's code alone; a template is compiled for nothing else
__global__ void check() {
  unsigned long long taken[kFunctions] = {};
  const unsigned first = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
  for (unsigned long long bits = first; bits < 1ull << 32; bits += stride) {
    const Float x = __uint_as_float(unsigned(bits));
    sama::UsualRange<Float> a, b;
    const Float root = a.root(x), inverse = b.inverse_or_zero(x, false);
    count<0>(taken[0], true, x, sama::square_root(x), __fsqrt_rn(x));
    count<1>(taken[1], true, x, sama::reciprocal(x), __frcp_rn(x));
    count<2>(taken[2], !a.outside, x, root, __fsqrt_rn(x));
    count<3>(taken[3], !b.outside, x, inverse, __frcp_rn(x));
  }
  for (int function = 0; function < kFunctions; ++function) atomicAdd(&counts[function].taken, taken[function]);
}

int main() {
  check<float><<<1056, 256>>>();
  Counts found[kFunctions];
  const cudaError_t status = cudaMemcpyFromSymbol(found, counts, sizeof(found));
  if (status != cudaSuccess) return std::printf("%s\n", cudaGetErrorString(status)), 1;
  for (int function = 0; function < kFunctions; ++function)
    std::printf(
        "%s %llu 0x%08x %llu\n", kNames[function], found[function].wrong, found[function].argument,
        found[function].taken);
}
