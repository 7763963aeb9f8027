// restore: theta back from theta+ or theta-, bit for bit. See sama_kernels/ops/restore.py.
#include <torch/csrc/stable/library.h>

#include "chunks.h"
#include "tiles.h"

namespace sama {
namespace {

template <class Word>
SAMA_CLONES void xor_loop(int64_t n, Word* p, const Word* v) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) p[i] = Word(p[i] ^ v[i]);
}

template <class Word>
void restore_segment(const View& param, const View& bits, const Segment& at) {
  WordTile<Word> param_tile, bits_tile;
  for_each_tile(at.start, at.length, [&](int64_t start, int64_t n) {
    xor_loop(n, param_tile.load(param, start, n), bits_tile.load(bits, start, n));
    param_tile.store(param, start, n);
  });
}

} // namespace

void restore(const TensorList& params, const TensorList& v) {
  Operands operands("restore");
  const int p = operands.add("params", params, /*written=*/true);
  const int x = operands.add("v", v);
  operands.require_same_dtype(p, x);
  operands.finish();
  Chunks(operands).for_each([&](int64_t, const Segment& at) {
    const View& param = operands.view(p, at.tensor);
    const View& bits = operands.view(x, at.tensor);
    switch (size_of(param.dtype)) {
      case 2: return restore_segment<uint16_t>(param, bits, at);
      case 4: return restore_segment<uint32_t>(param, bits, at);
      default: return restore_segment<uint64_t>(param, bits, at);
    }
  });
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("restore", TORCH_BOX(&sama::restore));
}
