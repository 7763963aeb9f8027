// adapt_norm_moments: v <- D d and ||v||^2 in one pass. See sama_kernels/ops/adapt_norm_moments.py.
#include <array>

#include <torch/csrc/stable/library.h>

#include "../common/moments_arguments.h"
#include "chunks.h"
#include "reduce.h"
#include "tiles.h"

namespace sama {
namespace {

// `x`: the operands in the order of Variant's positions.
template <class T, class Variant>
SAMA_CLONES void moments_loop(const MomentsScalars<T>& k, int64_t n, const T* const* x, T* out) {
  const MomentsScalars<T> c = k; // in registers: `out` could alias `k` for all the compiler knows
  const T* const d = x[0];
  const T* const g = Variant::linear ? d : x[Variant::kGrad];
  const T* const m = Variant::firsts ? x[Variant::kFirst] : d;
  const T* const w = Variant::linear ? d : x[Variant::kSecond];
  const T* const p = Variant::decay != Decay::None ? x[Variant::kParam] : d;
  const T* const buffer = Variant::decay == Decay::Buffer ? x[Variant::kBuffer] : d;
  WholeRange<T> whole;
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i)
    out[i] = moments_element<T, Variant>(c, MomentsElement<T>{d[i], g[i], m[i], w[i], p[i], buffer[i]}, whole);
}

template <class T, class Variant>
void moments_segment(const Operands& operands, const Segment& at, const MomentsScalars<T>& k, Lanes& lanes) {
  Tile<T> tiles[Variant::kLists], out;
  const View& v = operands.view(0, at.tensor);
  for_each_tile(at.start, at.length, [&](int64_t start, int64_t n) {
    const T* x[Variant::kLists];
    for (int list = 0; list < Variant::kLists; ++list)
      x[list] = tiles[list].load(operands.view(list, at.tensor), start, n, /*ahead=*/Variant::linear);
    T* target = out.target(v, start);
    moments_loop<T, Variant>(k, n, x, target);
    add_squares(target, n, lanes);
    out.store(v, start, n);
  });
}

} // namespace

Tensor adapt_norm_moments(
    const TensorList& v, const TensorList& grads, const TensorList& firsts, const TensorList& seconds,
    const TensorList& params, const TensorList& buffers, const Tensor& coefficients, double weight_decay,
    bool maximize, int64_t form) {
  const char* op = "adapt_norm_moments";
  Operands operands(op);
  const MomentsArguments arguments = add_moments_lists(
      op, operands, v, grads, firsts, seconds, params, buffers, coefficients, weight_decay, form);
  operands.finish();

  const Chunks chunks(operands);
  std::vector<Lanes> slots(chunks.count());
  with_moments_variant(arguments.form, arguments.firsts, arguments.decay, [&](auto variant) {
    using Variant = decltype(variant);
    const auto segment = [&](int64_t chunk, const Segment& at, auto zero) {
      using T = decltype(zero);
      const double* row = arguments.coefficients + kCoefficients * at.tensor;
      const double ulp = state_ulp(operands, arguments, at.tensor);
      moments_segment<T, Variant>(operands, at, moments_scalars<T>(row, weight_decay, maximize, ulp), slots[chunk]);
    };
    chunks.for_each([&](int64_t chunk, const Segment& at) {
      if (operands.view(0, at.tensor).dtype == Dtype::F64)
        segment(chunk, at, double{});
      else
        segment(chunk, at, float{});
    });
  });
  return make_double(total(slots));
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("adapt_norm_moments", TORCH_BOX(&sama::adapt_norm_moments));
}
