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

// D d of Adam at the stored m and w, put right by what is known exactly: all of it at the first step; later that w was no
// smaller than the term which this step added. NaN stays.
template <class T, bool exact>
SAMA_INLINE T low_bit_adam_element(const AdamScalars<T>& k, bool first, T d, T g, T m, T w) {
  const T added = k.one_minus_beta2 * (g * g);
  const bool stored = !first & ((w >= added) | (w != w));
  const T mean = first ? k.one_minus_beta1 * g : m;
  const T square = stored ? w : added;
  return adam_element<T, exact, false, false>(k, d, g, mean, square, square, T(0));
}

} // namespace sama
