// adapt_norm_adam: v <- D d and ||v||^2 in one pass. The formulas and their derivation: sama_kernels/ops/adapt_norm.py.
#include <cmath>

#include "../common/formulas.h"
#include "bias_corrections.h"
#include "packs.h"
#include "reduce.h"

namespace sama {
namespace {

constexpr int kMoments = 2; // which list of the table m is

struct AdamArguments {
  Scalar lr;
  double beta1, beta2, eps, weight_decay;
  BiasCorrections corrections;
  bool maximize;
};

template <class T, bool exact, bool amsgrad, bool decay>
struct AdamKernel {
  static constexpr int kLists = 4 + amsgrad + decay; // v, g, m, w, and w_max and p if they are given
  static constexpr int kMaximum = 4, kParams = 4 + amsgrad;

  // Of one pack: D d to v, and the sum of its squares.
  static __device__ double pack(
      const AdamScalars<T>& k, const Operand (&operands)[kLists], int64_t index, int left, double sum) {
    Words<T> words[kLists];
    SAMA_UNROLL
    for (int list = 0; list < kLists; ++list) load(operands[list], index, left, words[list]);
    T values[kLists][kPack];
    SAMA_UNROLL
    for (int list = 0; list < kLists; ++list) widen(words[list], operands[list].dtype, values[list]);
    // The element whose value of a list is value(list).
    const auto element = [&](const auto& value, auto& arithmetic) {
      const T maximum = amsgrad ? value(amsgrad ? kMaximum : 0) : T(0), param = decay ? value(decay ? kParams : 0) : T(0);
      return adam_element<T, exact, amsgrad, decay>(
          k, value(0), value(1), value(2), value(3), maximum, param, arithmetic);
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

// The scalars of the block's tensor. One thread computes them: double precision is slow on many GPUs.
template <class T, int lists>
__device__ inline const AdamScalars<T>& block_scalars(const Table<lists>& table, const AdamArguments& a, const Span& span) {
  __shared__ AdamScalars<T> shared;
  if (threadIdx.x == 0) {
    const BiasCorrection at = a.corrections.of(tag(table, span.tensor), table.first + span.tensor);
    shared = adam_scalars<T>(
        read(a.lr), at.c1, at.c2, a.beta1, a.beta2, a.eps, a.weight_decay, a.maximize,
        operand(table, kMoments, span.tensor).dtype);
  }
  __syncthreads();
  return shared;
}

// Blocks on a multiprocessor at once; 0: as the compiler likes. Plain Adam in float32 fits into the 80 registers of
// three blocks (it takes 98, of two, on sm_80 if let), with all loads under way before the first is waited for. The
// variants with more operands would spill, into which the compiler presses them on sm_100.
template <bool amsgrad, bool decay>
constexpr int kAdamBlocksOfFloat = amsgrad || decay ? 2 : 3;
template <class T, bool amsgrad, bool decay>
constexpr int kBlocksAtOnce = sizeof(T) == sizeof(float) ? kAdamBlocksOfFloat<amsgrad, decay> : 0;

template <class T, bool exact, bool amsgrad, bool decay>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, amsgrad, decay>) adam_kernel(
    const Table<4 + amsgrad + decay> __grid_constant__ table, const AdamArguments __grid_constant__ arguments,
    double* slots) {
  using Kernel = AdamKernel<T, exact, amsgrad, decay>;
  const Span span = span_of(table, int(blockIdx.x));
  const AdamScalars<T>& k = block_scalars<T>(table, arguments, span);
  Operand operands[Kernel::kLists];
  SAMA_UNROLL
  for (int list = 0; list < Kernel::kLists; ++list) operands[list] = operand(table, list, span.tensor);
  double sum = 0.0;
  for_each_pack(span, [&](int64_t index, int left) { sum = Kernel::pack(k, operands, index, left, sum); });
  sum = block_sum(sum);
  if (threadIdx.x == 0) slots[blockIdx.x] = sum;
}

struct AdamCall {
  const Launcher& launch;
  const DeviceOperands& operands;
  int v, g, m, w, w_max, p; // w_max and p: -1 if not given
  const std::vector<uint8_t>& tags;
  const AdamArguments& arguments;
  double* slots;
};

template <bool amsgrad, bool decay>
std::array<int, 4 + amsgrad + decay> lists_of(const AdamCall& call) {
  std::array<int, 4 + amsgrad + decay> lists{call.v, call.g, call.m, call.w};
  if constexpr (amsgrad) lists[4] = call.w_max;
  if constexpr (decay) lists[4 + amsgrad] = call.p;
  return lists;
}

template <class T, bool exact, bool amsgrad, bool decay>
int64_t launch_adam(const AdamCall& call, int64_t done) {
  constexpr int kLists = 4 + amsgrad + decay;
  const auto length = [&](int64_t i) {
    return computes_in<T>(call.operands.dtype(call.v, i)) ? call.operands.numel(i) : 0;
  };
  const auto tag_of = [&](int64_t i) { return int(call.tags[i]); };
  return for_each_table<kLists>(
      call.operands, lists_of<amsgrad, decay>(call), length, tag_of,
      [&](const Table<kLists>& table, int64_t blocks, int64_t first_chunk) {
        double* const slots = call.slots + done + first_chunk;
        call.launch(adam_kernel<T, exact, amsgrad, decay>, blocks, table, call.arguments, slots);
      });
}

template <bool exact, bool amsgrad, bool decay>
void launch_both(const AdamCall& call) {
  const int64_t done = launch_adam<float, exact, amsgrad, decay>(call, 0);
  launch_adam<double, exact, amsgrad, decay>(call, done);
}

void launch_variant(const AdamCall& call, bool exact) {
  static constexpr void (*variants[8])(const AdamCall&) = {
      launch_both<false, false, false>, launch_both<false, false, true>, launch_both<false, true, false>,
      launch_both<false, true, true>,   launch_both<true, false, false>, launch_both<true, false, true>,
      launch_both<true, true, false>,   launch_both<true, true, true>};
  variants[4 * exact + 2 * (call.w_max >= 0) + (call.p >= 0)](call);
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
  DeviceOperands operands(op);
  const int list_v = operands.add("v", v, /*written=*/true);
  const int list_g = operands.add("grads", grads);
  const int list_m = operands.add("exp_avgs", exp_avgs);
  const int list_w = operands.add("exp_avg_sqs", exp_avg_sqs);
  const int list_max = operands.add_optional("max_exp_avg_sqs", max_exp_avg_sqs);
  const int list_p = decay ? operands.add_optional("params", params) : -1;
  const Scalar rate = lr_tensor ? scalar(op, "lr_tensor", *lr_tensor, v[0]) : scalar(lr);
  std::vector<Scalar> counters(steps.size());
  for (size_t i = 0; i < steps.size(); ++i)
    counters[i] = scalar(op, Name("steps", int64_t(i)), steps[i], v[0]);

  const Launcher launch(op, v[0]);
  operands.finish();
  const StepCorrections corrections(launch, v[0], counters, beta1, beta2);
  const AdamArguments arguments{rate, beta1, beta2, eps, weight_decay, corrections.argument(), maximize};
  const Slots slots(v[0], total_chunks(operands), 1);
  launch_variant(
      {launch, operands, list_v, list_g, list_m, list_w, list_max, list_p, corrections.tags(), arguments,
       slots.slots(0)},
      mode == kExact);
  operands.write_back();
  return slots.total(launch);
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("adapt_norm_adam", TORCH_BOX(&sama::adapt_norm_adam));
}
