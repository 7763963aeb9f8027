// What the ops do to one element: the one place for the arithmetic of the CPU and the CUDA kernels. The operations and
// their order are those of sama_kernels/backends/reference.py; the derivations are in sama_kernels/ops/.
#pragma once

#include <cmath>

#include "arithmetic.h"
#include "dtypes.h"

namespace sama {

constexpr int64_t kPaper = 0, kExact = 1; // adapt_norm_adam
constexpr int64_t kPlus = 0, kMinus = 1; // perturb
constexpr int64_t kNearest = 0, kStochastic = 1;

// The scalars of one tensor in the compute type; bias corrections come from its own step counter.
template <class T>
struct AdamScalars {
  T rate; // lr / c1 with c1 = 1 - beta1^t
  T inv_sqrt_c2; // 1 / sqrt(c2) with c2 = 1 - beta2^t
  T paper_rate; // lr / (c1 c2)
  T tail_rate; // lr / c1 (1 - beta1) eps
  T one_minus_beta1, one_minus_beta2;
  T eps, weight_decay;
  T noise; // |r| up to this is rounding of the stored moments
  T sign; // -1 under maximize
};

// From double: c1 and c2 of the tensor's own step; `moments`: the dtype that m is stored in.
template <class T>
SAMA_BOTH AdamScalars<T> adam_scalars(
    double lr, double c1, double c2, double beta1, double beta2, double eps, double weight_decay, bool maximize,
    Dtype moments) {
  AdamScalars<T> k;
  k.rate = T(lr / c1);
  k.inv_sqrt_c2 = T(1 / std::sqrt(c2));
  k.paper_rate = T(lr / (c1 * c2));
  k.tail_rate = T(lr / c1 * (1 - beta1) * eps);
  k.one_minus_beta1 = T(1 - beta1);
  k.one_minus_beta2 = T(1 - beta2);
  k.eps = T(eps);
  k.weight_decay = T(weight_decay);
  k.noise = T(8 * epsilon_of(moments) * (1 - beta1));
  k.sign = T(maximize ? -1 : 1);
  return k;
}

// D d of Adam. `exact`, `amsgrad` and `decay` are template arguments because each is a different loop body: a run-time
// branch would keep a compiler from vectorising. `w_max` and `p` count only with `amsgrad` and `decay`. `arithmetic`:
// WholeRange or UsualRange.
template <class T, bool exact, bool amsgrad, bool decay, class Arithmetic>
SAMA_INLINE T adam_element(const AdamScalars<T>& k, T d, T g, T m, T w, T w_max, T p, Arithmetic& arithmetic) {
  const T zero = 0, one = 1;
  const T second = amsgrad ? w_max : w;
  const T s = arithmetic.root(second) * k.inv_sqrt_c2;
  const T q = s + k.eps;
  // One division serves 1/q and 1/(s q): the divider, not memory, bounds this loop for 16-bit storage.
  const bool empty = second == zero;
  const T divisor = empty ? one : s;
  const T inv_sq = arithmetic.inverse_or_zero(divisor * q, q == zero);
  const T inv_q = inv_sq * divisor;
  T gradient = k.sign * g;
  if (decay) gradient = gradient + k.weight_decay * (p + k.rate * (m * inv_q));
  T part = k.one_minus_beta2 * (m * gradient);
  if (amsgrad) part = w == second ? part : zero;
  T numerator = k.one_minus_beta1 * second - part; // r w
  numerator = (std::abs(numerator) <= k.noise * second) | empty ? zero : numerator;
  T adapted = (k.paper_rate * (numerator * inv_sq)) * inv_q;
  if (exact) adapted = adapted + (k.tail_rate * inv_q) * inv_q;
  return k.sign * (adapted * d);
}

// theta- from theta+ and the XOR bits of both with theta: the mirror image of the step that was realised.
template <class S>
SAMA_INLINE typename S::Word mirrored(typename S::Word plus, typename S::Word difference) {
  using Word = typename S::Word;
  using Compute = typename S::Compute;
  const Word centre = Word(plus ^ difference);
  const Compute at = S::widen(centre);
  const Word moved = S::narrow(at - (S::widen(plus) - at));
  return difference == 0 ? centre : moved;
}

} // namespace sama
