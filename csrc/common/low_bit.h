// adapt_norm_low_bit_adam for one element: the arithmetic of the CPU and the CUDA kernels, that of
// sama_kernels/backends/low_bit.py. The derivation is in sama_kernels/ops/adapt_norm_low_bit.py.
#pragma once

#include "formulas.h"

namespace sama {

// The scalars of one tensor, from double: c1 and c2 of its own step.
template <class T>
SAMA_BOTH AdamScalars<T> low_bit_scalars(
    double lr, double c1, double c2, double beta1, double beta2, double eps) {
  return adam_scalars<T>(lr, c1, c2, beta1, beta2, eps, 0.0, false, dtype_of<T>);
}

// m and w of the step: as they are stored, put right by what is known exactly. That is all of it at the first step; later
// that w was no smaller than the term which this step added. NaN stays.
template <class T>
struct KnownMoments {
  T m, w;
};

template <class T, bool first>
SAMA_INLINE KnownMoments<T> known_moments(const AdamScalars<T>& k, T g, T m, T w) {
  const T added = k.one_minus_beta2 * (g * g);
  if (first) return {k.one_minus_beta1 * g, added};
  return {m, (w >= added) | (w != w) ? w : added};
}

// D d of Adam at these.
template <class T, bool exact, class Arithmetic>
SAMA_INLINE T low_bit_adam_element(
    const AdamScalars<T>& k, T d, T g, const KnownMoments<T>& known, Arithmetic& arithmetic) {
  return adam_element<T, exact, false, false>(k, d, g, known.m, known.w, known.w, T(0), arithmetic);
}

} // namespace sama
