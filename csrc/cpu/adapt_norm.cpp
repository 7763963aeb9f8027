// adapt_norm: v <- D d and ||v||^2 in one pass. The formulas and their derivation: sama_kernels/ops/adapt_norm.py.
#include <torch/csrc/stable/library.h>

#include "../common/formulas.h"
#include "bias_corrections.h"
#include "chunks.h"
#include "reduce.h"
#include "tiles.h"

namespace sama {
namespace {

template <class T, bool exact, bool amsgrad, bool decay>
SAMA_CLONES void adam_loop(
    const AdamScalars<T>& k, int64_t n, const T* d, const T* g, const T* m, const T* w, const T* w_max, const T* p,
    T* out) {
  const AdamScalars<T> c = k; // in registers: `out` could alias `k` for all the compiler knows
  WholeRange<T> whole;
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i)
    out[i] = adam_element<T, exact, amsgrad, decay>(
        c, d[i], g[i], m[i], w[i], amsgrad ? w_max[i] : T(0), decay ? p[i] : T(0), whole);
}

template <class T>
using AdamLoop =
    void (*)(const AdamScalars<T>&, int64_t, const T*, const T*, const T*, const T*, const T*, const T*, T*);

template <class T>
AdamLoop<T> adam_loop_for(bool exact, bool amsgrad, bool decay) {
  static constexpr AdamLoop<T> loops[8] = {
      adam_loop<T, false, false, false>, adam_loop<T, false, false, true>, adam_loop<T, false, true, false>,
      adam_loop<T, false, true, true>,   adam_loop<T, true, false, false>, adam_loop<T, true, false, true>,
      adam_loop<T, true, true, false>,   adam_loop<T, true, true, true>};
  return loops[4 * exact + 2 * amsgrad + decay];
}

struct AdamLists {
  int v, g, m, w, w_max, p; // w_max and p: -1 if not given
};

template <class T>
void adam_segment(
    const Operands& operands, const AdamLists& lists, const Segment& at, AdamLoop<T> loop, const AdamScalars<T>& k,
    Lanes& lanes) {
  Tile<T> d, g, m, w, w_max, p, out;
  const auto optional = [&](Tile<T>& tile, int list, int64_t start, int64_t n) {
    return list < 0 ? nullptr : tile.load(operands.view(list, at.tensor), start, n, false);
  };
  const View& v = operands.view(lists.v, at.tensor);
  for_each_tile(at.start, at.length, [&](int64_t start, int64_t n) {
    T* target = out.target(v, start);
    loop(k, n, d.load(v, start, n, false), g.load(operands.view(lists.g, at.tensor), start, n, false),
         m.load(operands.view(lists.m, at.tensor), start, n, false), w.load(operands.view(lists.w, at.tensor), start, n, false),
         optional(w_max, lists.w_max, start, n), optional(p, lists.p, start, n), target);
    add_squares(target, n, lanes);
    out.store(v, start, n);
  });
}

template <class T>
SAMA_CLONES void scale_loop(int64_t n, const T* d, T factor, T* out) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) out[i] = d[i] * factor;
}

template <class T>
void scale_segment(const View& v, const Segment& at, T factor, bool write, Lanes& lanes) {
  Tile<T> d, out;
  for_each_tile(at.start, at.length, [&](int64_t start, int64_t n) {
    const T* values = d.load(v, start, n);
    if (write) {
      T* target = out.target(v, start);
      scale_loop(n, values, factor, target);
      out.store(v, start, n);
      values = target;
    }
    add_squares(values, n, lanes);
  });
}

} // namespace

Tensor adapt_norm_adam(
    const TensorList& v, const TensorList& grads, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
    const TensorList& max_exp_avg_sqs, const TensorList& params, const TensorList& steps,
    const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2, double eps, double weight_decay,
    bool maximize, int64_t mode) {
  const char* op = "adapt_norm_adam";
  const bool decay = weight_decay != 0.0;
  if (v.empty()) fail(op, "v is empty");
  if (mode != kPaper && mode != kExact) fail(op, "mode must be 0 (paper) or 1 (exact), not " + std::to_string(mode));
  if (steps.size() != v.size())
    fail(op, "steps has " + std::to_string(steps.size()) + " tensors, but v has " + std::to_string(v.size()));
  if (decay && params.empty()) fail(op, "params is empty, but weight_decay needs theta");
  Operands operands(op);
  AdamLists lists{};
  lists.v = operands.add("v", v, /*written=*/true);
  lists.g = operands.add("grads", grads);
  lists.m = operands.add("exp_avgs", exp_avgs);
  lists.w = operands.add("exp_avg_sqs", exp_avg_sqs);
  lists.w_max = operands.add_optional("max_exp_avg_sqs", max_exp_avg_sqs);
  lists.p = decay ? operands.add_optional("params", params) : -1;
  operands.finish();
  const bool amsgrad = lists.w_max >= 0;

  const double rate = lr_tensor ? read_scalar(op, "lr_tensor", *lr_tensor) : lr;
  const std::vector<BiasCorrection> corrections = bias_corrections(op, steps, beta1, beta2);

  const Chunks chunks(operands);
  std::vector<Lanes> slots(chunks.count());
  const auto segment = [&](int64_t chunk, const Segment& at, auto zero) {
    using T = decltype(zero);
    const AdamScalars<T> k = adam_scalars<T>(
        rate, corrections[at.tensor].c1, corrections[at.tensor].c2, beta1, beta2, eps, weight_decay, maximize,
        operands.view(lists.m, at.tensor).dtype);
    adam_segment<T>(operands, lists, at, adam_loop_for<T>(mode == kExact, amsgrad, decay), k, slots[chunk]);
  };
  chunks.for_each([&](int64_t chunk, const Segment& at) {
    if (operands.view(lists.v, at.tensor).dtype == Dtype::F64)
      segment(chunk, at, double{});
    else
      segment(chunk, at, float{});
  });
  return make_double(total(slots));
}

Tensor adapt_norm_scale(const TensorList& v, const std::optional<Tensor>& scale_tensor, double scale) {
  const char* op = "adapt_norm_scale";
  if (v.empty()) fail(op, "v is empty");
  Operands operands(op);
  const int list = operands.add("v", v, /*written=*/true);
  operands.finish();
  const double factor = scale_tensor ? scale * read_scalar(op, "scale_tensor", *scale_tensor) : scale;
  const bool write = factor != 1.0;
  const Chunks chunks(operands);
  std::vector<Lanes> slots(chunks.count());
  chunks.for_each([&](int64_t chunk, const Segment& at) {
    const View& view = operands.view(list, at.tensor);
    if (view.dtype == Dtype::F64)
      scale_segment<double>(view, at, factor, write, slots[chunk]);
    else
      scale_segment<float>(view, at, float(factor), write, slots[chunk]);
  });
  return make_double(total(slots));
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("adapt_norm_adam", TORCH_BOX(&sama::adapt_norm_adam));
  m.impl("adapt_norm_scale", TORCH_BOX(&sama::adapt_norm_scale));
}
