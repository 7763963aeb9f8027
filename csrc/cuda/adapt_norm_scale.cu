// adapt_norm_scale: v <- c d and ||v||^2 in one pass. See sama_kernels/ops/adapt_norm.py.
#include "packs.h"
#include "reduce.h"
#include "scalars.h"

namespace sama {
namespace {

struct ScaleArguments {
  double scale;
  Scalar tensor; // another factor, 1 if there is none
};

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    const Table<1> __grid_constant__ table, const ScaleArguments __grid_constant__ arguments, double* slots) {
  const double factor = arguments.scale * read(arguments.tensor);
  const bool write = factor != 1.0;
  const Span span = span_of(table, int(blockIdx.x));
  const Operand v = operand(table, 0, span.tensor);
  double sum = 0.0;
  for_each_pack(span, [&](int64_t index, int left) {
    Words<T> words;
    load(v, index, left, words);
    T values[kPack];
    widen(words, v.dtype, values);
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (write) values[i] = values[i] * T(factor);
      if (i < left) sum = add_square(sum, values[i]);
    }
    if (!write) return;
    narrow(values, v.dtype, words);
    store(v, index, left, words);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) slots[blockIdx.x] = sum;
}

template <class T>
int64_t launch_scale(
    const Launcher& launch, const DeviceOperands& operands, int v, const ScaleArguments& arguments, double* slots) {
  const auto length = [&](int64_t i) { return computes_in<T>(operands.dtype(v, i)) ? operands.numel(i) : 0; };
  return for_each_table<1>(
      operands, {v}, length, no_tag, [&](const Table<1>& table, int64_t blocks, int64_t first_chunk) {
        launch(scale_kernel<T>, blocks, table, arguments, slots + first_chunk);
      });
}

} // namespace

Tensor adapt_norm_scale(const TensorList& v, const std::optional<Tensor>& scale_tensor, double scale) {
  const char* op = "adapt_norm_scale";
  if (v.empty()) fail(op, "v is empty");
  DeviceOperands operands(op);
  const int list = operands.add("v", v, /*written=*/true);
  const ScaleArguments arguments{
      scale, scale_tensor ? scalar(op, "scale_tensor", *scale_tensor, v[0]) : scalar(1.0)};
  const Launcher launch(op, v[0]);
  operands.finish();
  const Slots slots(v[0], total_chunks(operands), 1);
  const int64_t done = launch_scale<float>(launch, operands, list, arguments, slots.slots(0));
  launch_scale<double>(launch, operands, list, arguments, slots.slots(0) + done);
  operands.write_back();
  return slots.total(launch);
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("adapt_norm_scale", TORCH_BOX(&sama::adapt_norm_scale));
}
