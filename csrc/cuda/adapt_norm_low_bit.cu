// adapt_norm_low_bit_adam: v <- D d and ||v||^2 in one pass. See sama_kernels/ops/adapt_norm_low_bit.py.
#include "../common/low_bit.h"
#include "../common/low_bit_arguments.h"
#include "bias_corrections.h"
#include "packs.h"
#include "reduce.h"

namespace sama {
namespace {

struct LowBitArguments {
  Scalar lr;
  double beta1, beta2, eps;
  BiasCorrections corrections;
  int32_t block_size;
  int32_t shift; // block_size is 2^shift; -1 if it is no power of two
};
static_assert(sizeof(LowBitArguments) + sizeof(double*) <= kParameterBytes - kTableBytes, "fits beside the table");

using LowBitTable = Table<kLowBitLists>;

// What is the same for all elements of a block's tensor.
template <class T>
struct LowBitShared {
  AdamScalars<T> adam;
  bool first;
  float lookup[2][kByteCodes]; // of m and of w
};

// One thread computes the scalars: double precision is slow on many GPUs.
template <class T, bool packed>
__device__ inline const LowBitShared<T>& block_shared(
    const LowBitTable& table, const LowBitArguments& a, int tensor) {
  __shared__ LowBitShared<T> shared;
  constexpr int kEntries = packed ? kPackedCodes : kByteCodes;
  for (int i = int(threadIdx.x); i < kEntries; i += kThreads) {
    shared.lookup[0][i] = reinterpret_cast<const float*>(table.data[kLowBitM + kLookup][tensor])[i];
    shared.lookup[1][i] = reinterpret_cast<const float*>(table.data[kLowBitW + kLookup][tensor])[i];
  }
  if (threadIdx.x == 0) {
    const BiasCorrection at = a.corrections.of(tag(table, tensor), table.first + tensor);
    shared.adam = low_bit_scalars<T>(read(a.lr), at.c1, at.c2, a.beta1, a.beta2, a.eps);
    shared.first = at.first;
  }
  __syncthreads();
  return shared;
}

// The codes of a pack of elements as they are stored: 8 bytes, or 4. What lies behind `left` is zero.
template <bool packed>
__device__ inline uint64_t load_codes(const char* codes, int64_t index, int left) {
  using Word = std::conditional_t<packed, uint32_t, uint64_t>;
  const char* address = codes + (packed ? index / 2 : index);
  if (left >= kPack && reinterpret_cast<uintptr_t>(address) % sizeof(Word) == 0)
    return *reinterpret_cast<const Word*>(address);
  const int bytes = packed ? (left + 1) / 2 : left;
  Word word = 0;
  SAMA_UNROLL
  for (int i = 0; i < int(sizeof(Word)); ++i)
    if (i < bytes) word |= Word(reinterpret_cast<const uint8_t*>(address)[i]) << (8 * i);
  return word;
}

template <bool packed>
__device__ inline int code(uint64_t codes, int i) {
  return packed ? int(codes >> (8 * (i / 2) + 4 * (1 - i % 2))) & 15 : int(codes >> (8 * i)) & 255;
}

// Which of a tensor's scales an element has, and how many elements before it have that one, too.
struct ScalePlace {
  int64_t block;
  uint32_t before;
};

// Where the element that comes `from` elements behind the beginning of block `block` belongs.
__device__ inline ScalePlace place(int64_t block, uint32_t from, const LowBitArguments& a) {
  const uint32_t block_size = uint32_t(a.block_size);
  if (a.shift >= 0) return {block + (from >> a.shift), from & (block_size - 1)}; // a division takes 20 instructions
  return {block + from / block_size, from % block_size};
}

// A pack of a moment; `scales`: that of its first element, which is `scale`, and those behind it.
template <class T, bool packed>
__device__ inline void dequantise(
    uint64_t codes, const float* lookup, const float* scales, float scale, uint32_t before, uint32_t block_size,
    int left, T (&values)[kPack]) {
  if (before + kPack <= block_size) { // always, if blocks are multiples of 8
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) values[i] = T(lookup[code<packed>(codes, i)] * scale);
  } else {
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if (i < left) scale = scales[(before + uint32_t(i)) / block_size];
      values[i] = T(lookup[code<packed>(codes, i)] * scale);
    }
  }
}

// Blocks that a multiprocessor must have room for; 0: as many as ptxas thinks right, which would be four in float32 on sm_80
// and two in float64 on sm_100, and one variant of three in float32 there, by pressing kernels into 64, 128 or 80 registers
// and spilling. Told to have room for three in float32, it spills none.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
constexpr int kLowBitBlocksOfFloat = 0; // three
#else
constexpr int kLowBitBlocksOfFloat = 3;
#endif
template <class T>
constexpr int kLowBitBlocks = sizeof(T) == 8 ? 1 : kLowBitBlocksOfFloat;

template <class T, bool exact, bool packed>
__global__ void __launch_bounds__(kThreads, kLowBitBlocks<T>) low_bit_adam_kernel(
    const LowBitTable __grid_constant__ table, const LowBitArguments __grid_constant__ arguments, double* slots) {
  const Span span = span_of(table, int(blockIdx.x));
  const LowBitShared<T>& shared = block_shared<T, packed>(table, arguments, span.tensor);
  const AdamScalars<T>& k = shared.adam; // left where it is: a copy makes ptxas spill on sm_100
  const bool first = shared.first;
  const Operand v = operand(table, kLowBitV, span.tensor), grad = operand(table, kLowBitGrad, span.tensor);
  const char* const m_codes = table.data[kLowBitM + kCodes][span.tensor];
  const char* const w_codes = table.data[kLowBitW + kCodes][span.tensor];
  const float* const m_scales = reinterpret_cast<const float*>(table.data[kLowBitM + kScales][span.tensor]);
  const float* const w_scales = reinterpret_cast<const float*>(table.data[kLowBitW + kScales][span.tensor]);
  const uint32_t block_size = uint32_t(arguments.block_size);
  const int64_t block = span.start / block_size;
  const ScalePlace chunk{block, uint32_t(span.start - block * block_size)};
  double sum = 0.0;
  for_each_pack(span, [&](int64_t index, int left) {
    const ScalePlace pack = place(chunk.block, chunk.before + uint32_t(span.length - left), arguments);
    Words<T> words, grad_words;
    load(v, index, left, words);
    load(grad, index, left, grad_words);
    const uint64_t of_m = load_codes<packed>(m_codes, index, left), of_w = load_codes<packed>(w_codes, index, left);
    const float m_scale = m_scales[pack.block], w_scale = w_scales[pack.block]; // under way with all the others
    T d[kPack], g[kPack], m[kPack], w[kPack], adapted[kPack];
    widen(words, v.dtype, d);
    widen(grad_words, grad.dtype, g);
    dequantise<T, packed>(
        of_m, shared.lookup[0], m_scales + pack.block, m_scale, pack.before, block_size, left, m);
    dequantise<T, packed>(
        of_w, shared.lookup[1], w_scales + pack.block, w_scale, pack.before, block_size, left, w);
    const auto element = [&](T of_v, T of_grad, T first_moment, T second_moment, auto& arithmetic) {
      const KnownMoments<T> known = first ? known_moments<T, true>(k, of_grad, first_moment, second_moment)
                                          : known_moments<T, false>(k, of_grad, first_moment, second_moment);
      return low_bit_adam_element<T, exact>(k, of_v, of_grad, known, arithmetic);
    };
    compute<T>(
        left, [&](int i, auto& a) { return element(d[i], g[i], m[i], w[i], a); },
        [&](int i, auto& a) {
          const int64_t at = place(pack.block, pack.before + uint32_t(i), arguments).block;
          return element(
              load_one<T>(v, index + i), load_one<T>(grad, index + i),
              T(shared.lookup[0][code<packed>(of_m, i)] * m_scales[at]),
              T(shared.lookup[1][code<packed>(of_w, i)] * w_scales[at]), a);
        },
        adapted);
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) sum = add_square(sum, adapted[i]);
    narrow(adapted, v.dtype, words);
    store(v, index, left, words);
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) slots[blockIdx.x] = sum;
}

// log2 of a power of two, else -1.
int32_t shift_of(int64_t block_size) {
  for (int32_t shift = 0; shift < 31; ++shift)
    if (int64_t(1) << shift == block_size) return shift;
  return -1;
}

struct LowBitCall {
  const Launcher& launch;
  const DeviceOperands& operands;
  const std::vector<uint8_t>& tags;
  const LowBitArguments& arguments;
  double* slots;
};

template <class T, bool exact, bool packed>
int64_t launch_low_bit(const LowBitCall& call, int64_t done) {
  std::array<int, kLowBitLists> order;
  for (int list = 0; list < kLowBitLists; ++list) order[list] = list;
  const auto length = [&](int64_t i) {
    return computes_in<T>(call.operands.dtype(kLowBitV, i)) ? call.operands.numel(i) : 0;
  };
  const auto tag_of = [&](int64_t i) { return int(call.tags[i]); };
  return for_each_table<kLowBitLists>(
      call.operands, order, length, tag_of, [&](const LowBitTable& table, int64_t blocks, int64_t first_chunk) {
        double* const slots = call.slots + done + first_chunk;
        call.launch(low_bit_adam_kernel<T, exact, packed>, blocks, table, call.arguments, slots);
      });
}

template <bool exact, bool packed>
void launch_both(const LowBitCall& call) {
  const int64_t done = launch_low_bit<float, exact, packed>(call, 0);
  launch_low_bit<double, exact, packed>(call, done);
}

} // namespace

Tensor adapt_norm_low_bit_adam(
    const TensorList& v, const TensorList& grads, const TensorList& exp_avg_codes, const TensorList& exp_avg_scales,
    const TensorList& exp_avg_tables, const TensorList& exp_avg_sq_codes, const TensorList& exp_avg_sq_scales,
    const TensorList& exp_avg_sq_tables, const TensorList& steps, int64_t block_size,
    const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2, double eps, int64_t mode) {
  const char* op = "adapt_norm_low_bit_adam";
  DeviceOperands operands(op);
  const bool packed = add_low_bit_lists(
      op, operands, v, grads, {exp_avg_codes, exp_avg_scales, exp_avg_tables},
      {exp_avg_sq_codes, exp_avg_sq_scales, exp_avg_sq_tables}, steps, block_size, mode);
  const Scalar rate = lr_tensor ? scalar(op, "lr_tensor", *lr_tensor, v[0]) : scalar(lr);
  std::vector<Scalar> counters(steps.size());
  for (size_t i = 0; i < steps.size(); ++i)
    counters[i] = scalar(op, Name("steps", int64_t(i)), steps[i], v[0]);

  const Launcher launch(op, v[0]);
  operands.finish();
  const StepCorrections corrections(launch, v[0], counters, beta1, beta2);
  const LowBitArguments arguments{
      rate, beta1, beta2, eps, corrections.argument(), int32_t(block_size), shift_of(block_size)};
  const Slots slots(v[0], total_chunks(operands), 1);
  static constexpr void (*variants[4])(const LowBitCall&) = {
      launch_both<false, false>, launch_both<false, true>, launch_both<true, false>, launch_both<true, true>};
  variants[2 * (mode == kExact) + packed]({launch, operands, corrections.tags(), arguments, slots.slots(0)});
  operands.write_back();
  return slots.total(launch);
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("adapt_norm_low_bit_adam", TORCH_BOX(&sama::adapt_norm_low_bit_adam));
}
