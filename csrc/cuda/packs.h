// Eight consecutive elements of a tensor in one thread's registers: memory to stored words to numbers, and back.
//
// Operands may have different dtypes and be aligned differently, both known only at run time. Both are the same for a
// whole block, so the branches below never diverge; they replace a kernel for every combination of dtypes.
#pragma once

#include "../common/arithmetic.h"
#include "../common/philox.h"
#include "table.h"

namespace sama {

constexpr int kPack = 8; // 16 bytes of the narrowest dtype
static_assert(kPack == kRandomBlock, "a pack takes one counter of the generator");
static_assert(kChunk % kPack == 0, "packs do not straddle chunks");

// Eight elements as they are stored, packed; T: the dtype for arithmetic, float or double. Storage that is wider than
// T (float64 beside float32) is narrowed when it is loaded.
template <class T>
struct Words {
  static constexpr int kCount = kPack * sizeof(T) / 4;
  uint32_t word[kCount];
};

template <class S, class T>
__device__ inline typename S::Word get(const Words<T>& words, int i) {
  if constexpr (sizeof(typename S::Word) == 2)
    return uint16_t(words.word[i / 2] >> (16 * (i % 2)));
  else if constexpr (sizeof(typename S::Word) == 4)
    return words.word[i];
  else
    return words.word[2 * i] | uint64_t(words.word[2 * i + 1]) << 32;
}

// Elements must be set in order: the first half of a word clears the second.
template <class S, class T>
__device__ inline void set(Words<T>& words, int i, typename S::Word value) {
  if constexpr (sizeof(typename S::Word) == 2) {
    words.word[i / 2] = i % 2 == 0 ? value : words.word[i / 2] | uint32_t(value) << 16;
  } else if constexpr (sizeof(typename S::Word) == 4) {
    words.word[i] = value;
  } else {
    words.word[2 * i] = uint32_t(value);
    words.word[2 * i + 1] = uint32_t(value >> 32);
  }
}

// Calls f with the traits of what `words` of this dtype hold.
template <class T, class F>
__device__ inline void with_storage(Dtype dtype, const F& f) {
  if (dtype == Dtype::BF16) return f(BF16{});
  if (dtype == Dtype::F16) return f(F16{});
  if constexpr (sizeof(T) == 8)
    if (dtype == Dtype::F64) return f(F64{});
  return f(F32{});
}

// For moving words it only matters how wide they are: one of two 16-bit dtypes stands for both.
__device__ inline Dtype same_width(Dtype dtype) {
  return dtype == Dtype::F16 ? Dtype::BF16 : dtype;
}

template <int begin, int end, class T>
__device__ inline void load_quads(const char* address, Words<T>& words) {
  SAMA_UNROLL
  for (int i = begin; i < end; ++i) {
    const uint4 quad = load16(address + 16 * i);
    words.word[4 * i] = quad.x;
    words.word[4 * i + 1] = quad.y;
    words.word[4 * i + 2] = quad.z;
    words.word[4 * i + 3] = quad.w;
  }
}

template <class T>
__device__ inline uint4 quad(const Words<T>& words, int i) {
  return {words.word[4 * i], words.word[4 * i + 1], words.word[4 * i + 2], words.word[4 * i + 3]};
}

template <int quads, class T>
__device__ inline void store_quads(char* address, const Words<T>& words) {
  SAMA_UNROLL
  for (int i = 0; i < quads; ++i) store16(address + 16 * i, quad(words, i));
}

// The same for a whole warp. Memory takes 32 bytes at a time, and those of one instruction together: two neighbouring
// quads that a lane stores one after the other are two requests of half the size. (Loads find the second half in L1.) So
// lanes 2 k and 2 k + 1 swap quads, and store one sector of the first, then one of the second.
template <int quads, class T>
__device__ inline void store_sectors(char* address, const Words<T>& words) {
  const bool odd = threadIdx.x % 2 == 1;
  char* const even = odd ? address - 16 * quads + 16 : address;
  SAMA_UNROLL
  for (int i = 0; i < quads; i += 2) {
    const uint4 first = quad(words, i), second = quad(words, i + 1);
    const uint4 other = swap_with_neighbour(odd ? first : second);
    store16(even + 16 * i, odd ? other : first);
    store16(even + 16 * (quads + i), odd ? second : other);
  }
}

// In what follows an operand's elements [index, index + left) are the thread's to work on, and the first eight of them,
// or as many as there are, its pack.

// All operands are loaded before the first of them is widened: the requests are under way together. What lies behind
// `left` is zero.
template <class T>
__device__ inline void load(const Operand& from, int64_t index, int left, Words<T>& words) {
  const char* address = from.data + index * size_of(from.dtype);
  if (sizeof(T) == 4 && from.dtype == Dtype::F64) {
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i)
      set<F32>(words, i, i < left ? F32::narrow(float(reinterpret_cast<const double*>(address)[i])) : 0);
  } else if (from.aligned && left >= kPack) {
    load_quads<0, 1>(address, words);
    if (size_of(from.dtype) >= 4) load_quads<1, 2>(address, words);
    if constexpr (sizeof(T) == 8)
      if (size_of(from.dtype) == 8) load_quads<2, 4>(address, words);
  } else {
    with_storage<T>(same_width(from.dtype), [&](auto s) {
      using S = decltype(s);
      SAMA_UNROLL
      for (int i = 0; i < kPack; ++i)
        set<S>(words, i, i < left ? reinterpret_cast<const typename S::Word*>(address)[i] : 0);
    });
  }
}

template <class T>
__device__ inline void store(const Operand& to, int64_t index, int left, const Words<T>& words) {
  char* address = to.data + index * size_of(to.dtype);
  const bool whole_warp = left >= (kWarp - int(threadIdx.x) % kWarp) * kPack; // the same for all its lanes
  with_storage<T>(same_width(to.dtype), [&](auto s) {
    using S = decltype(s);
    constexpr int kQuads = kPack * sizeof(typename S::Word) / 16;
    if (kQuads > 1 && to.aligned && whole_warp) {
      store_sectors<kQuads>(address, words);
    } else if (to.aligned && left >= kPack) {
      store_quads<kQuads>(address, words);
    } else {
      SAMA_UNROLL
      for (int i = 0; i < kPack; ++i)
        if (i < left) reinterpret_cast<typename S::Word*>(address)[i] = get<S>(words, i);
    }
  });
}

template <class S, class T>
__device__ inline void widen_from(const Words<T>& words, T (&values)[kPack]) {
  SAMA_UNROLL
  for (int i = 0; i < kPack; ++i) values[i] = T(S::widen(get<S>(words, i)));
}

template <class T>
__device__ inline void widen(const Words<T>& words, Dtype dtype, T (&values)[kPack]) {
  with_storage<T>(dtype, [&](auto s) { widen_from<decltype(s)>(words, values); });
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Two numbers in one instruction, for which S::narrow takes a dozen. The same bits, but for those of NaN.
template <class S>
__device__ inline uint32_t narrow_two(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<S, BF16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#else
template <class S>
__device__ inline uint32_t narrow_two(float low, float high) {
  return S::narrow(low) | uint32_t(S::narrow(high)) << 16;
}
#endif

// Only to dtypes whose arithmetic is in T.
template <class S, class T>
__device__ inline void narrow_to(const T (&values)[kPack], Words<T>& words) {
  if constexpr (sizeof(typename S::Word) == 2 && sizeof(T) == 4) {
    SAMA_UNROLL
    for (int i = 0; i < kPack; i += 2) words.word[i / 2] = narrow_two<S>(values[i], values[i + 1]);
  } else if constexpr (sizeof(typename S::Compute) == sizeof(T)) {
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) set<S>(words, i, S::narrow(values[i]));
  }
}

template <class T>
__device__ inline void narrow(const T (&values)[kPack], Dtype dtype, Words<T>& words) {
  with_storage<T>(dtype, [&](auto s) { narrow_to<decltype(s)>(values, words); });
}

// The first of them alone.
template <class T>
__device__ inline T load_one(const Operand& from, int64_t index) {
  Words<T> words;
  T values[kPack];
  load(from, index, 1, words);
  widen(words, from.dtype, values);
  return values[0];
}

// Sets results[i] to element(i, arithmetic) for a whole pack in the quick arithmetic; where some argument was outside its
// range, to element_alone(i, arithmetic), one after the other in the arithmetic for the whole range. That is rare and must
// not take registers, so it reads memory again; the threads then store together. What lies behind `left` is zero.
template <class T, class Element, class ElementAlone>
__device__ inline void compute(int left, const Element& element, const ElementAlone& element_alone, T (&results)[kPack]) {
  UsualRange<T> usual;
  SAMA_UNROLL
  for (int i = 0; i < kPack; ++i) results[i] = element(i, usual);
  if constexpr (kHasUsualRange<T>)
    if (usual.outside) {
      WholeRange<T> whole;
      SAMA_NO_UNROLL
      for (int at = 0; at < kPack && at < left; ++at) {
        const T result = element_alone(at, whole);
        SAMA_UNROLL
        for (int i = 0; i < kPack; ++i) results[i] = i == at ? result : results[i]; // no array that is indexed at run time
      }
    }
  if (left < kPack) {
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) results[i] = i < left ? results[i] : T(0);
  }
}

// Calls f(index, left) for the packs of this thread; neighbouring threads take neighbouring packs.
template <class F>
__device__ inline void for_each_pack(const Span& span, const F& f) {
  for (int at = int(threadIdx.x) * kPack; at < span.length; at += kThreads * kPack)
    f(span.start + at, span.length - at);
}

// Whether arithmetic on a dtype is in T.
template <class T>
bool computes_in(Dtype dtype) {
  return (dtype == Dtype::F64) == (sizeof(T) == 8);
}

} // namespace sama
