// restore: theta back from theta+ or theta-, bit for bit. See sama_kernels/ops/restore.py.
#include "packs.h"

namespace sama {
namespace {

// Exclusive or knows no dtypes: every tensor is a list of 2-byte words.
constexpr int64_t kUnit = 2;

__global__ void __launch_bounds__(kThreads) restore_kernel(const Table<2> __grid_constant__ table) {
  const Span span = span_of(table, int(blockIdx.x));
  Operand params = operand(table, 0, span.tensor), bits = operand(table, 1, span.tensor);
  params.dtype = bits.dtype = Dtype::BF16;
  for_each_pack(span, [&](int64_t index, int left) {
    Words<float> p, v;
    load(params, index, left, p);
    load(bits, index, left, v);
    SAMA_UNROLL
    for (int i = 0; i < kPack / 2; ++i) p.word[i] ^= v.word[i];
    store(params, index, left, p);
  });
}

} // namespace

void restore(const TensorList& params, const TensorList& v) {
  const char* op = "restore";
  DeviceOperands operands(op);
  const int p = operands.add("params", params, /*written=*/true);
  const int x = operands.add("v", v);
  operands.require_same_dtype(p, x);
  if (params.empty()) return;
  const Launcher launch(op, params[0]);
  operands.finish();
  const auto words = [&](int64_t i) { return operands.numel(i) * (size_of(operands.dtype(p, i)) / kUnit); };
  for_each_table<2>(operands, {p, x}, words, no_tag, [&](const Table<2>& table, int64_t blocks, int64_t) {
    launch(restore_kernel, blocks, table);
  });
  operands.write_back();
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("restore", TORCH_BOX(&sama::restore));
}
