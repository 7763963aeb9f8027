// Square root and reciprocal, rounded as IEEE 754 says, on the CPU and the GPU.
//
// On a GPU the compiler's own have a branch each, to a slow path for zero, for denormals and for the ends of the range.
// Three branches to an element keep a thread's eight elements one behind the other, each waiting for the one before: with
// them adapt_norm_adam of bfloat16 reached 82 % of a copy's bandwidth, that for Adadelta 60 % (H100). Here arguments from
// the ends of the range are scaled by a power of two, which is exact, so that one sequence does for all of them: the
// compiler's fast one, an estimate and a step of Newton's method in fused arithmetic. With the scaling a root and a
// reciprocal still are 27 of 50 instructions; `UsualRange` has 14, and tells when they are not enough.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace sama {

template <class T>
SAMA_INLINE T square_root(T x) {
  return std::sqrt(x);
}

template <class T>
SAMA_INLINE T reciprocal(T x) {
  return T(1) / x;
}

// The emulation has the sequences, too, with other estimates, which take denormals for 0 as the GPU's do.
#if defined(__CUDA_ARCH__) || defined(SAMA_EMULATION)

#ifdef __CUDA_ARCH__
__device__ inline float root_estimate(float x) { // of 1 / sqrt(x)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_estimate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float flushed(float x) { return std::abs(x) < 0x1p-126f ? 0.0f * x : x; }
inline float root_estimate(float x) { return flushed(float(1 / std::sqrt(double(flushed(x))))); }
inline float reciprocal_estimate(float x) { return flushed(float(1 / double(flushed(x)))); }
#endif

template <>
SAMA_INLINE float square_root(float x) {
  const bool small = x < 0x1p-96f; // there the residual would be a denormal
  const float scaled = small ? x * 0x1p64f : x;
  const float estimate = root_estimate(scaled);
  const float root = scaled * estimate;
  const float residual = fmaf(-root, root, scaled);
  const float better = fmaf(residual, 0.5f * estimate, root) * (small ? 0x1p-32f : 1.0f);
  return x == 0.0f || x == INFINITY ? x : better; // there the root is 0 Inf
}

template <>
SAMA_INLINE float reciprocal(float x) {
  const float size = fabsf(x);
  const bool small = size < 0x1p-126f, large = size > 0x1p126f;
  const float scaled = x * (small ? 0x1p64f : large ? 0x1p-64f : 1.0f);
  // Where the result is a denormal it must be rounded once, as one: by the last fused operation, with factors that the
  // denormals can hold. So the estimate keeps 21 of its bits there, and Newton's step becomes Halley's.
  const float estimate = bit_cast<float>(bit_cast<uint32_t>(reciprocal_estimate(scaled)) & (large ? ~7u : ~0u));
  // Of 0 and Inf the estimate is right and the residual 0 Inf, in whose place fminf takes a number.
  const float residual = fminf(fmaf(-scaled, estimate, 1.0f), 0.5f);
  const float correction = large ? fmaf(residual, residual, residual) : residual;
  const float start = estimate * (large ? 0x1p-64f : 1.0f);
  return fmaf(start, correction, start) * (small ? 0x1p64f : 1.0f);
}

#endif

// The arithmetic of a formula, for all arguments.
template <class T>
struct WholeRange {
  SAMA_INLINE T root(T x) { return square_root(x); }
  // 1 / x, or 0 instead. Both are there before one is chosen: of `none ? 0 : 1 / x` a compiler makes a branch.
  SAMA_INLINE T inverse_or_zero(T x, bool none) {
    const T inverse = reciprocal(x);
    return none ? T(0) : inverse;
  }
};

// The same in fewer instructions, unless an argument was `outside`: what came out then counts for nothing.
template <class T>
struct UsualRange : WholeRange<T> {};
template <class T>
constexpr bool kHasUsualRange = false;

#if defined(__CUDA_ARCH__) || defined(SAMA_EMULATION)

template <>
constexpr bool kHasUsualRange<float> = true;
template <>
struct UsualRange<float> {
  bool outside = false;

  // Of any number from 0 to 2^62; of a negative one NaN.
  SAMA_INLINE float root(float x) {
    outside |= !(x <= 0x1p62f);
    const float scaled = x * 0x1p64f; // denormals, too, are far from the end of the range then
    const float estimate = root_estimate(fmaf(x, 0x1p64f, 0x1p-126f)); // the last term changes only 0, to have it finite
    const float root = scaled * estimate;
    return fmaf(fmaf(-root, root, scaled), 0.5f * estimate, root) * 0x1p-32f;
  }

  // x is 0 where there is `none`, which is outside.
  SAMA_INLINE float inverse_or_zero(float x, bool) {
    const float size = fabsf(x);
    outside |= !(size >= 0x1p-126f) | !(size <= 0x1p126f);
    const float estimate = reciprocal_estimate(x);
    return fmaf(estimate, fmaf(-x, estimate, 1.0f), estimate);
  }
};

#endif

} // namespace sama
