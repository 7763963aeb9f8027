// The four storage dtypes as traits: how a stored word becomes a number and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "inline.h"

namespace sama {

enum class Dtype : uint8_t { F32, F64, BF16, F16 };

SAMA_BOTH inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::F64 ? 8 : dtype == Dtype::F32 ? 4 : 2;
}

// 2^-23 and so on: the spacing of the numbers next to 1.
SAMA_BOTH inline double epsilon_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::F32: return 0x1p-23;
    case Dtype::F64: return 0x1p-52;
    case Dtype::BF16: return 0x1p-7;
    default: return 0x1p-10;
  }
}

template <class To, class From>
SAMA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same width");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// Word: the bits as stored. Compute: where values of this dtype are added and multiplied.
// `widen` is exact, `narrow` rounds to nearest even, `narrow_stochastically` to one of the two neighbours: away from
// zero if 16 random bits, as a fraction, are less than what rounding towards zero would cut off. All of it is branch-free, so that the loops vectorise on every
// instruction set (the conversion instructions of F16C and AVX512-BF16 are not needed).
struct F32 {
  using Word = uint32_t;
  using Compute = float;
  static constexpr Dtype dtype = Dtype::F32;
  static SAMA_INLINE float widen(uint32_t word) { return bit_cast<float>(word); }
  static SAMA_INLINE uint32_t narrow(float value) { return bit_cast<uint32_t>(value); }
};

struct F64 {
  using Word = uint64_t;
  using Compute = double;
  static constexpr Dtype dtype = Dtype::F64;
  static SAMA_INLINE double widen(uint64_t word) { return bit_cast<double>(word); }
  static SAMA_INLINE uint64_t narrow(double value) { return bit_cast<uint64_t>(value); }
};

struct BF16 {
  using Word = uint16_t;
  using Compute = float;
  static constexpr Dtype dtype = Dtype::BF16;
  static SAMA_INLINE float widen(uint16_t word) { return bit_cast<float>(uint32_t(word) << 16); }
  static SAMA_INLINE uint16_t narrow(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded); // NaN: rounding could turn it into Inf
  }
  static SAMA_INLINE uint16_t narrow_stochastically(float value, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (bits + random) >> 16);
  }
};

struct F16 {
  using Word = uint16_t;
  using Compute = float;
  static constexpr Dtype dtype = Dtype::F16;
  static SAMA_INLINE float widen(uint16_t word) {
    const uint32_t sign = uint32_t(word & 0x8000u) << 16;
    const uint32_t magnitude = word & 0x7fffu;
    const uint32_t shifted = magnitude << 13;
    // Rebias the exponent by 112, and by 112 more for Inf and NaN. Denormals become 0.5 + m 2^-24, minus 0.5: never
    // a float32 denormal on the way, so torch.set_flush_denormal does not matter.
    const uint32_t normal = shifted + (magnitude >= 0x7c00u ? (224u << 23) : (112u << 23));
    const float denormal = bit_cast<float>(0x3f000000u + magnitude) - 0.5f;
    return bit_cast<float>((magnitude < 0x0400u ? bit_cast<uint32_t>(denormal) : normal) | sign);
  }
  static SAMA_INLINE uint16_t narrow(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal: rebias and round to nearest even; a carry out of the mantissa gives the next exponent, or Inf.
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14: adding 0.5 lets the adder round to a multiple of 2^-24.
    const uint32_t denormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u; // NaN, or too large
    const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
    return uint16_t(sign | (magnitude >= 0x47800000u ? special : finite));
  }
  static SAMA_INLINE uint16_t narrow_stochastically(float value, uint32_t random) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + (random & 0x1fffu)) >> 13;
    const float in_units = bit_cast<float>(magnitude < 0x38800000u ? magnitude : 0u) * 0x1p24f; // smallest denormals
    const int32_t whole = int32_t(in_units); // below 1024
    const uint32_t denormal = uint32_t(whole) + (float(random) < (in_units - float(whole)) * 65536.0f ? 1u : 0u);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
    return uint16_t(sign | (magnitude >= 0x47800000u ? special : finite));
  }
};

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, double> ? Dtype::F64 : Dtype::F32;

// Calls `f` with the traits of `dtype`.
template <class F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::F32: return f(F32{});
    case Dtype::F64: return f(F64{});
    case Dtype::BF16: return f(BF16{});
    case Dtype::F16: return f(F16{});
  }
}

} // namespace sama
