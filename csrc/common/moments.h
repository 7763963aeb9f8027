// adapt_norm_moments for one element: the arithmetic of the CPU and the CUDA kernels. The operations and their order are
// those of sama_kernels/backends/moments.py; the derivations are in sama_kernels/ops/adapt_norm_moments.py.
#pragma once

#include <cmath>

#include "arithmetic.h"
#include "dtypes.h"
#include "inline.h"

namespace sama {

enum class Form : int { Linear, Ratio, Centered, Maximum, Delta };
// Where theta before the step comes from, which the gradient contains: nothing is needed; from theta after the step, as
// the update is linear in g, or by an iteration (Delta); or from the momentum buffer that was subtracted.
enum class Decay : int { None, Implicit, Buffer };

constexpr int kCoefficients = 8; // of each tensor: rate, a, b, slope, kappa, omega, eps, tail
constexpr int kHalleySteps = 5; // the error after them: sama_kernels/ops/adapt_norm_moments.py

// What distinguishes the loop bodies. A run-time branch would keep a compiler from vectorising.
template <Form form_, bool firsts_, Decay decay_>
struct MomentsVariant {
  static constexpr Form form = form_;
  static constexpr Decay decay = decay_;
  static constexpr bool linear = form == Form::Linear;
  // Positions among the operands, of which v is the first.
  static constexpr int kGrad = 1, kFirst = 2, kSecond = 2 + firsts_, kParam = 3 + firsts_, kBuffer = 4 + firsts_;
  static constexpr bool firsts = firsts_;
  static constexpr int kLists = linear ? 1 : 3 + firsts + int(decay);
};

// Calls f(variant) with the variant that these arguments ask for. Other combinations are refused before.
template <class F>
void with_moments_variant(Form form, bool firsts, Decay decay, const F& f) {
  switch (form) {
    case Form::Linear: return f(MomentsVariant<Form::Linear, false, Decay::None>{});
    case Form::Ratio:
      if (firsts)
        return decay == Decay::None ? f(MomentsVariant<Form::Ratio, true, Decay::None>{})
                                    : f(MomentsVariant<Form::Ratio, true, Decay::Implicit>{});
      if (decay == Decay::Buffer) return f(MomentsVariant<Form::Ratio, false, Decay::Buffer>{});
      return decay == Decay::None ? f(MomentsVariant<Form::Ratio, false, Decay::None>{})
                                  : f(MomentsVariant<Form::Ratio, false, Decay::Implicit>{});
    case Form::Centered:
      if (decay == Decay::Buffer) return f(MomentsVariant<Form::Centered, true, Decay::Buffer>{});
      return decay == Decay::None ? f(MomentsVariant<Form::Centered, true, Decay::None>{})
                                  : f(MomentsVariant<Form::Centered, true, Decay::Implicit>{});
    case Form::Maximum:
      return decay == Decay::None ? f(MomentsVariant<Form::Maximum, true, Decay::None>{})
                                  : f(MomentsVariant<Form::Maximum, true, Decay::Implicit>{});
    case Form::Delta:
      return decay == Decay::None ? f(MomentsVariant<Form::Delta, true, Decay::None>{})
                                  : f(MomentsVariant<Form::Delta, true, Decay::Implicit>{});
  }
}

// The numbers of one tensor in the compute type.
template <class T>
struct MomentsScalars {
  T rate, a, b, slope, kappa, omega, eps;
  T slope_tail;
  T noise; // |r| / w up to this is rounding of the stored moments
  T weight_decay;
  T decay_g, decay_m; // weight_decay rate a, weight_decay rate b
  T inv_sqrt_omega;
  T closeness; // relative error of |g| + eps and of what g is made of: a maximum this close was made by this step
  T sign; // -1 under maximize
};

// `row`: the tensor's coefficients; `state_ulp`: the spacing of the numbers next to 1 in the dtype of its state.
template <class T>
SAMA_BOTH MomentsScalars<T> moments_scalars(
    const double* row, double weight_decay, bool maximize, double state_ulp) {
  const double own_ulp = epsilon_of(dtype_of<T>), ulp = state_ulp > own_ulp ? state_ulp : own_ulp;
  const double rate = row[0], a = row[1], b = row[2], slope = row[3], omega = row[5];
  MomentsScalars<T> k;
  k.rate = T(rate);
  k.a = T(a);
  k.b = T(b);
  k.slope = T(slope);
  k.kappa = T(row[4]);
  k.omega = T(omega);
  k.eps = T(row[6]);
  k.slope_tail = T(slope * row[7]);
  k.noise = T(8 * ulp * std::abs(slope));
  k.weight_decay = T(weight_decay);
  k.decay_g = T(weight_decay * rate * a);
  k.decay_m = T(weight_decay * rate * b);
  k.inv_sqrt_omega = T(1 / std::sqrt(omega));
  k.closeness = T((weight_decay != 0.0 ? 2 : 1) * ulp);
  k.sign = T(maximize ? -1 : 1);
  return k;
}

// One element of every operand; those that the variant does not have are not read.
template <class T>
struct MomentsElement {
  T d, g, m, w, p, buffer;
};

template <class T>
SAMA_INLINE T held(T x, T bound) {
  x = x > bound ? bound : x; // not std::min: NaN stays
  return x < -bound ? -bound : x;
}

// What the moments saw: under weight decay it contains theta before the step.
template <class T, class Variant>
SAMA_INLINE T effective_gradient(const MomentsScalars<T>& k, const MomentsElement<T>& x, T q, T bound) {
  const T zero = 0;
  T g = k.sign * x.g;
  if constexpr (Variant::decay == Decay::Buffer) g = g + k.weight_decay * (x.p + k.rate * x.buffer);
  if constexpr (Variant::decay == Decay::Implicit) {
    T known = g * q + k.weight_decay * (x.p * q);
    if constexpr (Variant::firsts && Variant::form != Form::Centered) known = known + k.decay_m * x.m;
    const T rest = q - k.decay_g;
    g = held(rest == zero ? zero : known / rest, bound);
  }
  return g;
}

template <class T, class Variant, class Arithmetic>
SAMA_INLINE T ratio_derivative(const MomentsScalars<T>& k, const MomentsElement<T>& x, Arithmetic& arithmetic) {
  constexpr bool centered = Variant::form == Form::Centered;
  const T zero = 0, one = 1;
  T second = x.w;
  if constexpr (centered) {
    second = x.w - x.m * x.m;
    // 0 where it is negative by rounding; NaN stays. Not by a comparison, from which GCC would make a branch.
    second = T(0.5) * (second + std::abs(second));
  }
  const T s = arithmetic.root(second);
  const T q = k.kappa * s + k.eps;
  // One division serves 1/q and 1/(s q): the divider, not memory, bounds this loop for 16-bit storage.
  const bool empty = second == zero;
  const T divisor = empty ? one : s;
  const T inv_sq = arithmetic.inverse_or_zero(divisor * q, q == zero);
  const T inv_q = inv_sq * divisor;
  T bound = zero;
  if constexpr (Variant::decay == Decay::Implicit) bound = (centered ? arithmetic.root(x.w) : s) * k.inv_sqrt_omega;
  const T g = effective_gradient<T, Variant>(k, x, q, bound);
  T numerator = k.a * g;
  if constexpr (Variant::firsts && !centered) numerator = numerator + k.b * x.m;
  T lean = g; // dw/dg = 2 omega lean
  if constexpr (centered) lean = g - x.m;
  T r = k.slope * second - k.omega * (numerator * lean);
  r = (std::abs(r) <= k.noise * x.w) | empty ? zero : r;
  return (k.kappa * (r * inv_sq)) * inv_q + (k.slope_tail * inv_q) * inv_q;
}

template <class T, class Variant, class Arithmetic>
SAMA_INLINE T maximum_derivative(const MomentsScalars<T>& k, const MomentsElement<T>& x, Arithmetic& arithmetic) {
  const T zero = 0;
  const T n = x.w;
  const T inv_n = arithmetic.inverse_or_zero(n, n == zero);
  const T g = effective_gradient<T, Variant>(k, x, n, n);
  const T size = std::abs(g);
  const T scale = Variant::decay == Decay::None ? n : n + k.weight_decay * std::abs(x.p);
  const bool elsewhere = std::abs(n - (size + k.eps)) > k.closeness * scale; // NaN: not, so that it stays
  const T numerator = k.a * g + k.b * x.m;
  const T other = g < zero ? -numerator : zero;
  T r = k.slope * size - (g > zero ? numerator : other);
  r = std::abs(r) <= k.noise * n ? zero : r;
  return ((elsewhere ? k.slope * n : r + k.slope_tail) * inv_n) * inv_n;
}

// y = known + pull y / sqrt(kappa + y^2), |y| <= bound, by Halley's method.
template <class T, class Arithmetic>
SAMA_INLINE T halley(const MomentsScalars<T>& k, T known, T pull, T bound, Arithmetic& arithmetic) {
  const T zero = 0;
  const T lift = pull * k.kappa;
  T y = held(known, bound);
  SAMA_UNROLL
  for (int i = 0; i < kHalleySteps; ++i) {
    const T square = k.kappa + y * y;
    const T s = arithmetic.root(square);
    const T value = s * (y - known) - pull * y;
    const T slope = s * square - lift;
    const T rest = slope * slope - T(1.5) * (lift * (y * value));
    const T move = rest == zero ? zero : ((value * slope) * square) / rest;
    y = held(y - move, bound);
  }
  return y;
}

template <class T, class Variant, class Arithmetic>
SAMA_INLINE T delta_derivative(const MomentsScalars<T>& k, const MomentsElement<T>& x, Arithmetic& arithmetic) {
  const T zero = 0, one = 1;
  const T spread = x.w + k.eps;
  const T inv = arithmetic.inverse_or_zero(spread, spread == zero);
  T known = k.sign * x.g; // and weight_decay theta after the step: 0 where u is
  if constexpr (Variant::decay == Decay::Implicit) known = known + k.weight_decay * x.p;
  // The cells that "paper" leaves out are made 0 here and not at the end, until where it takes registers on a GPU.
  const T kept = (x.g == zero) & (known == zero) ? k.slope_tail : one;
  const T size = ((x.m + k.kappa * k.eps) * inv) * kept;
  T square, share; // omega g^2, and over w + eps
  if constexpr (Variant::decay == Decay::Implicit) {
    const T start = known * arithmetic.root(k.omega * inv), pull = k.decay_g * arithmetic.root(size);
    const T y = halley(k, start, pull, arithmetic.root(x.w * inv), arithmetic);
    share = y * y;
    square = share * spread;
  } else {
    square = k.omega * (known * known);
    share = square * inv;
  }
  const T rest = k.kappa + share;
  const T rms = arithmetic.root(size * arithmetic.inverse_or_zero(rest, rest == zero)); // delta / g
  T r = x.w - square;
  r = std::abs(r) <= k.noise * x.w ? zero : r;
  return rms * ((r + k.eps) * inv);
}

// D d. `arithmetic`: WholeRange or UsualRange.
template <class T, class Variant, class Arithmetic>
SAMA_INLINE T moments_element(const MomentsScalars<T>& k, const MomentsElement<T>& x, Arithmetic& arithmetic) {
  if constexpr (Variant::linear)
    return (k.rate * k.slope) * x.d * k.sign;
  else if constexpr (Variant::form == Form::Maximum)
    return (k.rate * maximum_derivative<T, Variant>(k, x, arithmetic)) * x.d * k.sign;
  else if constexpr (Variant::form == Form::Delta)
    return (k.rate * delta_derivative<T, Variant>(k, x, arithmetic)) * x.d * k.sign;
  else
    return (k.rate * ratio_derivative<T, Variant>(k, x, arithmetic)) * x.d * k.sign;
}

} // namespace sama
