// central_difference: the meta gradient from the two perturbed passes. See sama_kernels/ops/central_difference.py.
#include <cmath>

#include "packs.h"
#include "scalars.h"

namespace sama {
namespace {

struct DifferenceArguments {
  const double* epsilon;
  const double* norm;
};

template <class T, bool explicit_given>
__global__ void __launch_bounds__(kThreads) difference_kernel(
    const Table<2 + explicit_given> __grid_constant__ table, const DifferenceArguments __grid_constant__ arguments) {
  const double epsilon = *arguments.epsilon;
  const bool use_difference = epsilon != 0.0;
  const bool use_extra = explicit_given && std::isfinite(*arguments.norm);
  const T factor = T(-0.5 / epsilon), zero = 0;
  const Span span = span_of(table, int(blockIdx.x));
  const Operand plus = operand(table, 0, span.tensor), minus = operand(table, 1, span.tensor);
  const Operand extra = operand(table, explicit_given ? 2 : 0, span.tensor);
  for_each_pack(span, [&](int64_t index, int left) {
    Words<T> a_words, b_words, c_words;
    load(plus, index, left, a_words);
    load(minus, index, left, b_words);
    if (use_extra) load(extra, index, left, c_words);
    T a[kPack], b[kPack], c[kPack] = {};
    widen(a_words, plus.dtype, a);
    widen(b_words, minus.dtype, b);
    if (use_extra) widen(c_words, extra.dtype, c);
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) {
      const T difference = (a[i] - b[i]) * factor;
      const T with_extra = use_difference ? difference + c[i] : c[i];
      a[i] = use_extra ? with_extra : use_difference ? difference : zero;
    }
    narrow(a, plus.dtype, a_words);
    store(plus, index, left, a_words);
  });
}

template <class T, bool explicit_given>
void launch_difference(
    const Launcher& launch, const DeviceOperands& operands, const std::array<int, 2 + explicit_given>& lists,
    const DifferenceArguments& arguments) {
  constexpr int kLists = 2 + explicit_given;
  const auto length = [&](int64_t i) { return computes_in<T>(operands.dtype(lists[0], i)) ? operands.numel(i) : 0; };
  for_each_table<kLists>(operands, lists, length, no_tag, [&](const Table<kLists>& table, int64_t blocks, int64_t) {
    launch(difference_kernel<T, explicit_given>, blocks, table, arguments);
  });
}

} // namespace

void central_difference(
    const TensorList& grads_plus, const TensorList& grads_minus, const TensorList& explicit_grads,
    const Tensor& epsilon, const Tensor& norm) {
  const char* op = "central_difference";
  DeviceOperands operands(op);
  const int plus = operands.add("grads_plus", grads_plus, /*written=*/true);
  const int minus = operands.add("grads_minus", grads_minus);
  const int extra = operands.add_optional("explicit", explicit_grads);
  const TensorRef like = grads_plus.empty() ? TensorRef(epsilon) : grads_plus[0];
  const DifferenceArguments arguments{
      device_double(op, "epsilon", epsilon, "step_size", like), device_double(op, "norm", norm, "step_size", like)};
  if (grads_plus.empty()) return;
  const Launcher launch(op, like);
  operands.finish();
  if (extra >= 0) {
    launch_difference<float, true>(launch, operands, {plus, minus, extra}, arguments);
    launch_difference<double, true>(launch, operands, {plus, minus, extra}, arguments);
  } else {
    launch_difference<float, false>(launch, operands, {plus, minus}, arguments);
    launch_difference<double, false>(launch, operands, {plus, minus}, arguments);
  }
  operands.write_back();
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("central_difference", TORCH_BOX(&sama::central_difference));
}
