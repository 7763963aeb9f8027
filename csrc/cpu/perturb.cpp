// perturb: theta -> theta+ -> theta- in place; v's storage keeps bits(theta) XOR bits(theta+-).
// See sama_kernels/ops/perturb.py.
#include <torch/csrc/stable/library.h>

#include "chunks.h"
#include "tiles.h"

namespace sama {
namespace {

constexpr int64_t kPlus = 0, kMinus = 1;

template <class S>
SAMA_CLONES void plus_loop(int64_t n, typename S::Compute epsilon, typename S::Word* p, typename S::Word* v) {
  using Word = typename S::Word;
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const Word old = p[i];
    const Word moved = S::narrow(S::widen(old) + epsilon * S::widen(v[i]));
    v[i] = Word(old ^ moved);
    p[i] = moved;
  }
}

template <class S>
SAMA_CLONES void minus_loop(int64_t n, typename S::Word* p, typename S::Word* v) {
  using Word = typename S::Word;
  using Compute = typename S::Compute;
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const Word difference = v[i], old = p[i];
    const Word centre = Word(old ^ difference);
    const Compute at = S::widen(centre);
    const Word mirrored = S::narrow(at - (S::widen(old) - at));
    const Word moved = difference == 0 ? centre : mirrored;
    v[i] = Word(centre ^ moved);
    p[i] = moved;
  }
}

} // namespace

void perturb(const TensorList& params, const TensorList& v, const Tensor& epsilon, int64_t side) {
  const char* op = "perturb";
  if (side != kPlus && side != kMinus) fail(op, "side must be 0 (plus) or 1 (minus), not " + std::to_string(side));
  Operands operands(op);
  const int p = operands.add("params", params, /*written=*/true);
  const int x = operands.add("v", v, /*written=*/true);
  operands.require_same_dtype(p, x);
  operands.finish();
  const double step = side == kPlus ? read_double(op, "epsilon", epsilon, "step_size") : 0.0;
  // epsilon 0 means "leave theta alone", also where v is Inf or NaN: an epsilon that only underflows to 0 in float32
  // does not.
  const bool still = side == kPlus && step == 0.0;
  Chunks(operands).for_each([&](int64_t, const Segment& at) {
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
          plus_loop<S>(n, typename S::Compute(step), theta, difference);
        else
          minus_loop<S>(n, theta, difference);
        param_tile.store(param, start, n);
        bits_tile.store(bits, start, n);
      });
    });
  });
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("perturb", TORCH_BOX(&sama::perturb));
}
