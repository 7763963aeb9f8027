#include "tiles.h"

namespace sama {
namespace {

// Walks n elements of a strided view in logical order and calls f(offset, index, run, stride) for each run along
// the last dimension.
template <class F>
void walk(const View& view, int64_t start, int64_t n, const F& f) {
  constexpr int kMaxDims = 64; // torch's own limit for element-wise ops
  const int rank = int(view.dims.size());
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = rank - 1; d >= 0; --d) {
    index[d] = start % view.dims[d].size;
    start /= view.dims[d].size;
    offset += index[d] * view.dims[d].stride;
  }
  const Dim last = view.dims[rank - 1];
  for (int64_t done = 0; done < n;) {
    const int64_t left = last.size - index[rank - 1];
    const int64_t run = left < n - done ? left : n - done;
    f(offset, done, run, last.stride);
    done += run;
    offset += run * last.stride;
    index[rank - 1] += run;
    for (int d = rank - 1; d > 0 && index[d] == view.dims[d].size; --d) { // carry
      offset += view.dims[d - 1].stride - view.dims[d].size * view.dims[d].stride;
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class Word>
void gather_words(const View& view, int64_t start, int64_t n, Word* words) {
  const Word* data = reinterpret_cast<const Word*>(view.data);
  walk(view, start, n, [&](int64_t offset, int64_t at, int64_t run, int64_t stride) {
    for (int64_t i = 0; i < run; ++i) words[at + i] = data[offset + i * stride];
  });
}

template <class Word>
void scatter_words(const View& view, int64_t start, int64_t n, const Word* words) {
  Word* data = reinterpret_cast<Word*>(view.data);
  walk(view, start, n, [&](int64_t offset, int64_t at, int64_t run, int64_t stride) {
    for (int64_t i = 0; i < run; ++i) data[offset + i * stride] = words[at + i];
  });
}

template <class S, class T>
SAMA_CLONES void widen_loop(const typename S::Word* words, int64_t n, T* values) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<T>(S::widen(words[i]));
}

template <class S>
SAMA_CLONES void narrow_loop(const typename S::Compute* values, int64_t n, typename S::Word* words) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) words[i] = S::narrow(values[i]);
}

template <class T>
void widen_to(Dtype dtype, const void* words, int64_t n, T* values) {
  dispatch(dtype, [&](auto s) {
    using S = decltype(s);
    widen_loop<S, T>(static_cast<const typename S::Word*>(words), n, values);
  });
}

template <class T>
void narrow_from(Dtype dtype, const T* values, int64_t n, void* words) {
  dispatch(dtype, [&](auto s) {
    using S = decltype(s);
    if constexpr (std::is_same_v<typename S::Compute, T>)
      narrow_loop<S>(values, n, static_cast<typename S::Word*>(words));
  });
}

} // namespace

void gather(const View& view, int64_t start, int64_t n, void* words) {
  switch (size_of(view.dtype)) {
    case 2: return gather_words(view, start, n, static_cast<uint16_t*>(words));
    case 4: return gather_words(view, start, n, static_cast<uint32_t*>(words));
    default: return gather_words(view, start, n, static_cast<uint64_t*>(words));
  }
}

void scatter(const View& view, int64_t start, int64_t n, const void* words) {
  switch (size_of(view.dtype)) {
    case 2: return scatter_words(view, start, n, static_cast<const uint16_t*>(words));
    case 4: return scatter_words(view, start, n, static_cast<const uint32_t*>(words));
    default: return scatter_words(view, start, n, static_cast<const uint64_t*>(words));
  }
}

void widen(Dtype dtype, const void* words, int64_t n, float* values) { widen_to(dtype, words, n, values); }
void widen(Dtype dtype, const void* words, int64_t n, double* values) { widen_to(dtype, words, n, values); }
void narrow(Dtype dtype, const float* values, int64_t n, void* words) { narrow_from(dtype, values, n, words); }
void narrow(Dtype dtype, const double* values, int64_t n, void* words) { narrow_from(dtype, values, n, words); }

} // namespace sama
