// perturb: theta -> theta+ -> theta- in place; v's storage keeps bits(theta) XOR bits(theta+-).
// See sama_kernels/ops/perturb.py.
#include <cmath>

#include <torch/csrc/stable/ops.h>

#include "../common/formulas.h"
#include "packs.h"
#include "reduce.h"
#include "scalars.h"

namespace sama {
namespace {

struct PlusArguments {
  const double* epsilon;
  uint64_t seed;
  bool stochastic;
  double* along; // slots for <s, epsilon v> and ||s||^2 if they are measured, else where every launch writes NaN
  double* squares;
};

// Of the step s that was realised: <s, epsilon v> and ||s||^2.
struct Realised {
  double along = 0.0, squares = 0.0;
};

// Eight elements of theta and v: theta+ and the XOR bits. All of it for one dtype in one place: what is realised is added
// up while theta and epsilon v still are in registers.
template <bool measure, class S, class T>
__device__ inline void plus_pack(
    T epsilon, bool stochastic, const RandomWords& random, int left, Words<T>& p, Words<T>& v, Realised& realised) {
  using Word = typename S::Word;
  const Words<T> old_p = p, old_v = v;
  const auto centre = [&](int i) { return T(S::widen(get<S>(old_p, i))); };
  const auto intended = [&](int i) { return epsilon * T(S::widen(get<S>(old_v, i))); };
  T sum[kPack];
  SAMA_UNROLL
  for (int i = 0; i < kPack; ++i) sum[i] = centre(i) + intended(i);
  if (sizeof(Word) == 2 && stochastic) {
    if constexpr (sizeof(Word) == 2) {
      SAMA_UNROLL
      for (int i = 0; i < kPack; ++i)
        set<S>(p, i, S::narrow_stochastically(sum[i], random.word[i / 2] >> (16 * (i % 2)) & 0xffffu));
    }
  } else {
    narrow_to<S>(sum, p);
  }
  SAMA_UNROLL
  for (int i = 0; i < kPack * int(sizeof(Word)) / 4; ++i) v.word[i] = old_p.word[i] ^ p.word[i];
  if constexpr (measure) {
    SAMA_UNROLL
    for (int i = 0; i < kPack; ++i) {
      // In float64: the difference of two numbers far apart is not exact in their own precision.
      const double step = double(S::widen(get<S>(p, i))) - double(centre(i));
      if (i >= left) continue;
      realised.along = fma(step, double(intended(i)), realised.along);
      realised.squares = add_square(realised.squares, step);
    }
  }
}

// Blocks that a multiprocessor must have room for; 0: as many as ptxas thinks right, which in float32 is one fewer.
template <class T, bool measure>
constexpr int kPlusBlocks = sizeof(T) == 8 ? 0 : measure ? 3 : 4;

template <class T, bool measure>
__global__ void __launch_bounds__(kThreads, kPlusBlocks<T, measure>) plus_kernel(
    const Table<2> __grid_constant__ table, const PlusArguments __grid_constant__ arguments) {
  const double wide_epsilon = *arguments.epsilon;
  const T epsilon = T(wide_epsilon);
  // epsilon 0 means "leave theta alone", also where v is Inf or NaN: an epsilon that only underflows to 0 in float32
  // does not.
  const bool still = wide_epsilon == 0.0;
  const Span span = span_of(table, int(blockIdx.x));
  const Operand params = operand(table, 0, span.tensor), steps = operand(table, 1, span.tensor);
  Realised realised;
  for_each_pack(span, [&](int64_t index, int left) {
    Words<T> p, v;
    load(params, index, left, p);
    load(steps, index, left, v);
    if (still) {
      SAMA_UNROLL
      for (uint32_t& word : v.word) word = 0;
      store(steps, index, left, v);
      return;
    }
    RandomWords random{};
    if (sizeof(T) == 4 && arguments.stochastic && size_of(params.dtype) == 2)
      random = random_words(arguments.seed, uint32_t(table.first + span.tensor), uint64_t(index) / kRandomBlock);
    with_storage<T>(params.dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (std::is_same_v<typename S::Compute, T>)
        plus_pack<measure, S>(epsilon, arguments.stochastic, random, left, p, v, realised);
    });
    store(params, index, left, p);
    store(steps, index, left, v);
  });
  if constexpr (measure) {
    const double along = block_sum(realised.along), squares = block_sum(realised.squares);
    if (threadIdx.x == 0) {
      arguments.along[blockIdx.x] = along;
      arguments.squares[blockIdx.x] = squares;
    }
  } else if (blockIdx.x == 0 && threadIdx.x == 0) {
    *arguments.along = *arguments.squares = NAN;
  }
}

// theta+ and its XOR bits: theta- and its own.
template <class S, class T>
__device__ inline void minus_pack(Words<T>& p, Words<T>& v) {
  using Word = typename S::Word;
  const Words<T> old_p = p, old_v = v;
  SAMA_UNROLL
  for (int i = 0; i < kPack; ++i) {
    const Word plus = get<S>(old_p, i), difference = get<S>(old_v, i);
    const Word moved = mirrored<S>(plus, difference);
    set<S>(p, i, moved);
    set<S>(v, i, Word(Word(plus ^ difference) ^ moved));
  }
}

// Blocks that a multiprocessor must have room for; 0: as many as ptxas thinks right, which in float64 is two.
template <class T>
constexpr int kMinusBlocks = sizeof(T) == 8 ? 3 : 0;

template <class T>
__global__ void __launch_bounds__(kThreads, kMinusBlocks<T>) minus_kernel(
    const Table<2> __grid_constant__ table, double* unmeasured) {
  const Span span = span_of(table, int(blockIdx.x));
  const Operand params = operand(table, 0, span.tensor), bits = operand(table, 1, span.tensor);
  for_each_pack(span, [&](int64_t index, int left) {
    Words<T> p, v;
    load(params, index, left, p);
    load(bits, index, left, v);
    with_storage<T>(params.dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (std::is_same_v<typename S::Compute, T>) minus_pack<S>(p, v);
    });
    store(params, index, left, p);
    store(bits, index, left, v);
  });
  if (blockIdx.x == 0 && threadIdx.x == 0) unmeasured[0] = unmeasured[1] = NAN;
}

// Calls launch(table, blocks, first_chunk) for the tensors whose arithmetic is in T.
template <class T, class Launch>
int64_t for_each_table_in(const DeviceOperands& operands, int p, int x, Launch launch) {
  const auto length = [&](int64_t i) { return computes_in<T>(operands.dtype(p, i)) ? operands.numel(i) : 0; };
  return for_each_table<2>(operands, {p, x}, length, no_tag, launch);
}

template <class T>
int64_t launch_plus(
    const Launcher& launch, const DeviceOperands& operands, int p, int x, const PlusArguments& arguments, bool measure,
    int64_t done) {
  return for_each_table_in<T>(operands, p, x, [&](const Table<2>& table, int64_t blocks, int64_t first_chunk) {
    PlusArguments own = arguments;
    if (measure) {
      own.along += done + first_chunk;
      own.squares += done + first_chunk;
    }
    launch(measure ? plus_kernel<T, true> : plus_kernel<T, false>, blocks, table, own);
  });
}

template <class T>
void launch_minus(const Launcher& launch, const DeviceOperands& operands, int p, int x, double* unmeasured) {
  for_each_table_in<T>(operands, p, x, [&](const Table<2>& table, int64_t blocks, int64_t) {
    launch(minus_kernel<T>, blocks, table, unmeasured);
  });
}

// theta+; returns the sums.
Tensor measured_plus(
    const Launcher& launch, const DeviceOperands& operands, int p, int x, PlusArguments arguments, TensorRef like) {
  const Slots slots(like, total_chunks(operands), 2);
  arguments.along = slots.slots(0);
  arguments.squares = slots.slots(1);
  const int64_t done = launch_plus<float>(launch, operands, p, x, arguments, true, 0);
  launch_plus<double>(launch, operands, p, x, arguments, true, done);
  return slots.total(launch);
}

// theta+ or theta-; returns two NaN.
Tensor unmeasured(
    const Launcher& launch, const DeviceOperands& operands, int p, int x, PlusArguments arguments, int64_t side,
    TensorRef like) {
  using torch::headeronly::ScalarType;
  Tensor result = torch::stable::new_empty(like.owned(), {2}, ScalarType::Double);
  if (total_chunks(operands) == 0) return torch::stable::fill_(result, NAN);
  double* const target = static_cast<double*>(result.data_ptr());
  arguments.along = target;
  arguments.squares = target + 1;
  if (side == kPlus) {
    launch_plus<float>(launch, operands, p, x, arguments, false, 0);
    launch_plus<double>(launch, operands, p, x, arguments, false, 0);
  } else {
    launch_minus<float>(launch, operands, p, x, target);
    launch_minus<double>(launch, operands, p, x, target);
  }
  return result;
}

} // namespace

Tensor perturb(
    const TensorList& params, const TensorList& v, const Tensor& epsilon, int64_t side, int64_t rounding, int64_t seed,
    bool measure) {
  const char* op = "perturb";
  if (side != kPlus && side != kMinus) fail(op, "side must be 0 (plus) or 1 (minus), not " + std::to_string(side));
  if (rounding != kNearest && rounding != kStochastic)
    fail(op, "rounding must be 0 (nearest) or 1 (stochastic), not " + std::to_string(rounding));
  DeviceOperands operands(op);
  const int p = operands.add("params", params, /*written=*/true);
  const int x = operands.add("v", v, /*written=*/true);
  operands.require_same_dtype(p, x);
  const TensorRef like = params.empty() ? TensorRef(epsilon) : params[0];
  PlusArguments arguments{nullptr, uint64_t(seed), rounding == kStochastic, nullptr, nullptr};
  if (side == kPlus) arguments.epsilon = device_double(op, "epsilon", epsilon, "step_size", like);
  const Launcher launch(op, like);
  operands.finish();
  Tensor sums = measure && side == kPlus ? measured_plus(launch, operands, p, x, arguments, like)
                                         : unmeasured(launch, operands, p, x, arguments, side, like);
  operands.write_back();
  return sums;
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("perturb", TORCH_BOX(&sama::perturb));
}
