// adapt_norm_moments: v <- D d and ||v||^2 in one pass. See sama_kernels/ops/adapt_norm_moments.py.
#include "../common/moments_arguments.h"
#include "packs.h"
#include "reduce.h"

namespace sama {
namespace {

struct MomentsRows {
  const double* coefficients; // one row for each tensor of the list
  double weight_decay;
  bool maximize;
};

template <class T, class Variant>
struct MomentsKernel {
  static constexpr int kLists = Variant::kLists;

  // The scalars of the block's tensor. One thread computes them: double precision is slow on many GPUs. They stay in shared
  // memory: eight registers fewer let more blocks be on a multiprocessor at once.
  static __device__ const MomentsScalars<T>& scalars(
      const Table<kLists>& table, const MomentsRows& rows, const Operand (&operands)[kLists], int tensor) {
    __shared__ MomentsScalars<T> shared;
    if (threadIdx.x == 0) {
      double ulp = 0.0;
      if constexpr (!Variant::linear) ulp = epsilon_of(operands[Variant::kSecond].dtype);
      if constexpr (Variant::firsts) ulp = fmax(ulp, epsilon_of(operands[Variant::kFirst].dtype));
      const double* row = rows.coefficients + int64_t(kCoefficients) * (table.first + tensor);
      shared = moments_scalars<T>(row, rows.weight_decay, rows.maximize, ulp);
    }
    __syncthreads();
    return shared;
  }

  // Of one pack: D d to v, and the sum of its squares.
  static __device__ double pack(
      const MomentsScalars<T>& k, const Operand (&operands)[kLists], int64_t index, int left, double sum) {
    Words<T> words[kLists];
    SAMA_UNROLL
    for (int list = 0; list < kLists; ++list) load(operands[list], index, left, words[list]);
    T values[kLists][kPack];
    SAMA_UNROLL
    for (int list = 0; list < kLists; ++list) widen(words[list], operands[list].dtype, values[list]);
    // The element whose value of a list is value(list).
    const auto element = [&](const auto& value, auto& arithmetic) {
      MomentsElement<T> x{};
      x.d = value(0);
      if constexpr (!Variant::linear) x.g = value(Variant::kGrad);
      if constexpr (!Variant::linear) x.w = value(Variant::kSecond);
      if constexpr (Variant::firsts) x.m = value(Variant::kFirst);
      if constexpr (Variant::decay != Decay::None) x.p = value(Variant::kParam);
      if constexpr (Variant::decay == Decay::Buffer) x.buffer = value(Variant::kBuffer);
      return moments_element<T, Variant>(k, x, arithmetic);
    };
    T adapted[kPack];
    compute<T>(
        left, [&](int i, auto& a) { return element([&](int list) { return values[list][i]; }, a); },
        [&](int i, auto& a) { return element([&](int list) { return load_one<T>(operands[list], index + i); }, a); },
        adapted);
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) sum = add_square(sum, adapted[i]);
    narrow(adapted, operands[0].dtype, words[0]);
    store(operands[0], index, left, words[0]);
    return sum;
  }
};

// Blocks that a multiprocessor must have room for; 0: as many as ptxas thinks right. Without weight decay a kernel fits into
// the 64 registers of four blocks on sm_90, into the 80 of three on sm_80, all but two of them: the one for RMSprop would
// spill 4 bytes if it had to, but needs no more if let, the one for Adamax spills 8 on sm_80. A kernel with weight decay
// spills wherever it has fewer than the 128 of two. Four blocks instead of two and three took a bfloat16 Adadelta from
// 82 % of a copy's bandwidth to 96 %, NAdam from 93 to 97 %, RMSprop from 87 to 93 % (H100).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksOfMaximum = 2, kBlocksWithoutDecay = 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr int kBlocksOfMaximum = 4, kBlocksWithoutDecay = 4;
#else
constexpr int kBlocksOfMaximum = 0, kBlocksWithoutDecay = 0; // the 80 of three
#endif
template <class Variant>
constexpr int kBlocksOfFloat = Variant::decay != Decay::None    ? 2
    : Variant::form == Form::Maximum                            ? kBlocksOfMaximum
    : Variant::form == Form::Ratio && !Variant::firsts          ? 0
                                                                : kBlocksWithoutDecay;
template <class T, class Variant>
constexpr int kBlocks = sizeof(T) == 4 ? kBlocksOfFloat<Variant> : 0;

template <class T, class Variant>
__global__ void __launch_bounds__(kThreads, kBlocks<T, Variant>) moments_kernel(
    const Table<Variant::kLists> __grid_constant__ table, const MomentsRows __grid_constant__ rows, double* slots) {
  using Kernel = MomentsKernel<T, Variant>;
  const Span span = span_of(table, int(blockIdx.x));
  Operand operands[Kernel::kLists];
  SAMA_UNROLL
  for (int list = 0; list < Kernel::kLists; ++list) operands[list] = operand(table, list, span.tensor);
  const MomentsScalars<T>& k = Kernel::scalars(table, rows, operands, span.tensor);
  double sum = 0.0;
  for_each_pack(span, [&](int64_t index, int left) { sum = Kernel::pack(k, operands, index, left, sum); });
  sum = block_sum(sum);
  if (threadIdx.x == 0) slots[blockIdx.x] = sum;
}

template <class T, class Variant>
int64_t launch_moments(const Launcher& launch, const DeviceOperands& operands, const MomentsRows& rows, double* slots) {
  constexpr int kLists = Variant::kLists;
  std::array<int, kLists> order;
  for (int list = 0; list < kLists; ++list) order[list] = list;
  const auto length = [&](int64_t i) { return computes_in<T>(operands.dtype(0, i)) ? operands.numel(i) : 0; };
  return for_each_table<kLists>(
      operands, order, length, no_tag, [&](const Table<kLists>& table, int64_t blocks, int64_t first_chunk) {
        launch(moments_kernel<T, Variant>, blocks, table, rows, slots + first_chunk);
      });
}

} // namespace

Tensor adapt_norm_moments(
    const TensorList& v, const TensorList& grads, const TensorList& firsts, const TensorList& seconds,
    const TensorList& params, const TensorList& buffers, const Tensor& coefficients, double weight_decay,
    bool maximize, int64_t form) {
  const char* op = "adapt_norm_moments";
  DeviceOperands operands(op);
  const MomentsArguments arguments = add_moments_lists(
      op, operands, v, grads, firsts, seconds, params, buffers, coefficients, weight_decay, form);
  const MomentsRows rows{arguments.coefficients, weight_decay, maximize};
  const Launcher launch(op, v[0]);
  operands.finish();
  const Slots slots(v[0], total_chunks(operands), 1);
  with_moments_variant(arguments.form, arguments.firsts, arguments.decay, [&](auto variant) {
    using Variant = decltype(variant);
    const int64_t done = launch_moments<float, Variant>(launch, operands, rows, slots.slots(0));
    launch_moments<double, Variant>(launch, operands, rows, slots.slots(0) + done);
  });
  operands.write_back();
  return slots.total(launch);
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("adapt_norm_moments", TORCH_BOX(&sama::adapt_norm_moments));
}
