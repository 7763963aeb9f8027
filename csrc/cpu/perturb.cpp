// perturb: theta -> theta+ -> theta- in place; v's storage keeps bits(theta) XOR bits(theta+-).
// See sama_kernels/ops/perturb.py.
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "../common/formulas.h"
#include "../common/philox.h"
#include "chunks.h"
#include "reduce.h"
#include "tiles.h"

namespace sama {
namespace {

// `random`: 16 random bits per element, for the dtypes that can be rounded stochastically; else nullptr.
template <class S, bool stochastic>
SAMA_CLONES void plus_loop(
    int64_t n, typename S::Compute epsilon, const uint16_t* random, typename S::Word* p, typename S::Word* v) {
  using Word = typename S::Word;
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const Word old = p[i];
    const auto sum = S::widen(old) + epsilon * S::widen(v[i]);
    Word moved;
    if constexpr (stochastic)
      moved = S::narrow_stochastically(sum, random[i]);
    else
      moved = S::narrow(sum);
    v[i] = Word(old ^ moved);
    p[i] = moved;
  }
}

template <class S>
SAMA_CLONES void minus_loop(int64_t n, typename S::Word* p, typename S::Word* v) {
  using Word = typename S::Word;
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const Word centre = Word(p[i] ^ v[i]);
    const Word moved = mirrored<S>(p[i], v[i]);
    v[i] = Word(centre ^ moved);
    p[i] = moved;
  }
}

template <class S>
SAMA_CLONES void step_loop(
    int64_t n, typename S::Compute epsilon, const typename S::Word* p, const typename S::Word* v,
    typename S::Compute* centre, typename S::Compute* intended) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    centre[i] = S::widen(p[i]);
    intended[i] = epsilon * S::widen(v[i]);
  }
}

// In double: the difference of two numbers far apart is not exact in their own precision.
template <class S>
SAMA_CLONES void realised_loop(
    int64_t n, const typename S::Word* p, const typename S::Compute* centre, const typename S::Compute* intended,
    double* step, double* wide_intended) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    step[i] = double(S::widen(p[i])) - double(centre[i]);
    wide_intended[i] = intended[i];
  }
}

// Random half-words for elements [start, start + n) of a tensor; returns where the first one lies in `halves`.
SAMA_CLONES void random_loop(uint64_t seed, uint32_t tensor, uint64_t block, int64_t blocks, uint32_t* words) {
  SAMA_IVDEP
  for (int64_t i = 0; i < blocks; ++i) {
    const RandomWords random = random_words(seed, tensor, block + uint64_t(i));
    for (int j = 0; j < 4; ++j) words[4 * i + j] = random.word[j];
  }
}

struct RandomTile {
  alignas(64) uint16_t halves[kTile + 2 * kRandomBlock];

  const uint16_t* load(uint64_t seed, int64_t tensor, int64_t start, int64_t n) {
    const int64_t first = start / kRandomBlock, last = (start + n - 1) / kRandomBlock;
    alignas(64) uint32_t words[sizeof halves / 4];
    random_loop(seed, uint32_t(tensor), uint64_t(first), last - first + 1, words);
    std::memcpy(halves, words, sizeof words); // little-endian: the low half comes first
    return halves + start % kRandomBlock;
  }
};
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "RandomTile");

struct Sums {
  Lanes along, squares; // <s, epsilon v>, ||s||^2
};

struct Plus {
  double epsilon;
  bool stochastic;
  uint64_t seed;
};

template <class S>
void plus_tile(
    const Plus& plus, int64_t tensor, int64_t start, int64_t n, typename S::Word* p, typename S::Word* v, Sums* sums) {
  using Compute = typename S::Compute;
  const Compute epsilon = Compute(plus.epsilon);
  Compute centre[kTile], intended[kTile];
  if (sums) step_loop<S>(n, epsilon, p, v, centre, intended);
  if constexpr (sizeof(typename S::Word) == 2) {
    if (plus.stochastic) {
      RandomTile random;
      plus_loop<S, true>(n, epsilon, random.load(plus.seed, tensor, start, n), p, v);
    } else {
      plus_loop<S, false>(n, epsilon, nullptr, p, v);
    }
  } else {
    plus_loop<S, false>(n, epsilon, nullptr, p, v);
  }
  if (sums) {
    double step[kTile], wide_intended[kTile];
    realised_loop<S>(n, p, centre, intended, step, wide_intended);
    add_products(step, wide_intended, n, sums->along);
    add_products(step, step, n, sums->squares);
  }
}

Tensor two(double first, double second) {
  Tensor pair = torch::stable::empty({2}, torch::headeronly::ScalarType::Double);
  static_cast<double*>(pair.data_ptr())[0] = first;
  static_cast<double*>(pair.data_ptr())[1] = second;
  return pair;
}

} // namespace

Tensor perturb(
    const TensorList& params, const TensorList& v, const Tensor& epsilon, int64_t side, int64_t rounding, int64_t seed,
    bool measure) {
  const char* op = "perturb";
  if (side != kPlus && side != kMinus) fail(op, "side must be 0 (plus) or 1 (minus), not " + std::to_string(side));
  if (rounding != kNearest && rounding != kStochastic)
    fail(op, "rounding must be 0 (nearest) or 1 (stochastic), not " + std::to_string(rounding));
  Operands operands(op);
  const int p = operands.add("params", params, /*written=*/true);
  const int x = operands.add("v", v, /*written=*/true);
  operands.require_same_dtype(p, x);
  operands.finish();
  measure = measure && side == kPlus;
  const Plus plus{side == kPlus ? read_double(op, "epsilon", epsilon, "step_size") : 0.0, rounding == kStochastic,
                  uint64_t(seed)};
  // epsilon 0 means "leave theta alone", also where v is Inf or NaN: an epsilon that only underflows to 0 in float32
  // does not.
  const bool still = side == kPlus && plus.epsilon == 0.0;
  const Chunks chunks(operands);
  std::vector<Sums> slots(measure ? chunks.count() : 0);
  chunks.for_each([&](int64_t chunk, const Segment& at) {
    const View& param = operands.view(p, at.tensor);
    const View& bits = operands.view(x, at.tensor);
    dispatch(param.dtype, [&](auto s) {
      using S = decltype(s);
      using Word = typename S::Word;
      WordTile<Word> param_tile, bits_tile;
      for_each_tile(at.start, at.length, [&](int64_t start, int64_t n) {
        Word* theta = param_tile.load(param, start, n);
        Word* difference = bits_tile.load(bits, start, n);
        if (still)
          std::memset(difference, 0, n * sizeof(Word));
        else if (side == kPlus)
          plus_tile<S>(plus, at.tensor, start, n, theta, difference, measure ? &slots[chunk] : nullptr);
        else
          minus_loop<S>(n, theta, difference);
        param_tile.store(param, start, n);
        bits_tile.store(bits, start, n);
      });
    });
  });
  if (!measure) return two(NAN, NAN);
  double along = 0.0, squares = 0.0;
  for (const Sums& slot : slots) { // in the order of the chunks
    along += slot.along.total();
    squares += slot.squares.total();
  }
  return two(along, squares);
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("perturb", TORCH_BOX(&sama::perturb));
}
