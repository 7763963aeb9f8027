// draw_mask: what Tensor.bernoulli_(p) fills a tensor with, to the last bit. See sama_kernels/mask_draws.py.
//
// torch draws one number after another from its Mersenne Twister (Matsumoto and Nishimura 1998), 4 to 7 ns each. Here a
// block of 624 words is made, tempered and compared at once.
#include <algorithm>
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "isa.h"
#include "tensors.h"

namespace sama {
namespace {

constexpr const char* OP = "draw_mask";
constexpr int64_t N = 624, M = 397; // words of the twister's state; the recurrence's distance
constexpr int64_t MANTISSA = 53;

// What torch.get_rng_state() holds of the CPU's generator.
struct GeneratorState {
  uint64_t seed;
  int32_t left; // 1 + how many words of the block have not been handed out
  int32_t seeded;
  uint64_t next; // the first of them
  uint64_t words[N];
  double normals[4];
  double float_normal;
};
static_assert(sizeof(GeneratorState) == 5056);

inline uint32_t twist(uint32_t u, uint32_t v) {
  return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ ((0u - (v & 1u)) & 0x9908b0dfu);
}

// The next block. A word depends on others at distances of 1 (its old value) and of 227 or more.
SAMA_CLONES void next_block(uint32_t* x) {
  SAMA_IVDEP
  for (int64_t i = 0; i < N - M; ++i) x[i] = x[i + M] ^ twist(x[i], x[i + 1]);
  for (int64_t begin = N - M; begin < N - 1; begin += N - M) {
    const int64_t end = begin + (N - M) < N - 1 ? begin + (N - M) : N - 1;
    SAMA_IVDEP
    for (int64_t i = begin; i < end; ++i) x[i] = x[i + M - N] ^ twist(x[i], x[i + 1]);
  }
  x[N - 1] = x[M - 1] ^ twist(x[N - 1], x[0]);
}

SAMA_CLONES void temper(int64_t n, const uint32_t* x, uint32_t* out) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    uint32_t y = x[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    out[i] = y ^ (y >> 18);
  }
}

// Two words are the high and the low half of 64 random bits; the lower 53 of them, divided by 2^53, are compared with p.
template <class Word>
SAMA_CLONES void compare(int64_t n, const uint32_t* words, uint64_t bound, Word one, Word* out) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t bits = (uint64_t(words[2 * i] & ((1u << (MANTISSA - 32)) - 1)) << 32) | words[2 * i + 1];
    out[i] = int64_t(bits - bound) < 0 ? one : Word(0);
  }
}

// `one`: the bits of 1.0.
template <class Word>
void draw(int64_t n, double p, GeneratorState& state, Word one, void* mask) {
  Word* out = static_cast<Word*>(mask);
  if (n == 0) return;
  const uint64_t bound = uint64_t(std::ceil(std::ldexp(p, MANTISSA))); // k / 2^53 < p is k < bound
  uint32_t block[N];
  for (int64_t i = 0; i < N; ++i) block[i] = uint32_t(state.words[i]);
  int64_t begin = N - (state.left - 1); // of the words that are left
  uint32_t words[N + 1];
  int64_t held = 0; // words that wait in `words`: 0 or 1
  while (n > 0) {
    if (begin == N) {
      next_block(block);
      begin = 0;
    }
    const int64_t taken = std::min(N - begin, 2 * n - held);
    temper(taken, block + begin, words + held);
    begin += taken;
    held += taken;
    const int64_t whole = held / 2;
    compare(whole, words, bound, one, out);
    out += whole;
    n -= whole;
    if (held % 2) words[0] = words[held - 1];
    held %= 2;
  }
  for (int64_t i = 0; i < N; ++i) state.words[i] = block[i];
  state.left = int32_t(N - begin + 1);
  state.next = uint64_t(begin);
}

} // namespace

Tensor draw_mask(const Tensor& mask, double p, const Tensor& state) {
  if (!(p >= 0.0 && p <= 1.0)) fail(OP, "probability: it must be between 0 and 1");
  if (!row_major(mask)) fail(OP, "mask: it must be contiguous");
  using Type = torch::headeronly::ScalarType;
  if (state.numel() != int64_t(sizeof(GeneratorState)) || state.scalar_type() != Type::Byte || !row_major(state))
    fail(OP, "state: it must be what torch.get_rng_state() returns");
  GeneratorState words;
  std::memcpy(&words, state.data_ptr(), sizeof(words));
  if (words.left < 1 || words.left > N) fail(OP, "state: it is not that of a Mersenne Twister");
  switch (mask.scalar_type()) {
    case Type::Float: draw<uint32_t>(mask.numel(), p, words, 0x3f800000u, mask.data_ptr()); break;
    case Type::Double: draw<uint64_t>(mask.numel(), p, words, uint64_t(0x3ff) << 52, mask.data_ptr()); break;
    case Type::BFloat16: draw<uint16_t>(mask.numel(), p, words, 0x3f80u, mask.data_ptr()); break;
    case Type::Half: draw<uint16_t>(mask.numel(), p, words, 0x3c00u, mask.data_ptr()); break;
    default: fail(OP, "mask: its dtype must be float32, float64, bfloat16 or float16");
  }
  Tensor after = torch::stable::empty({int64_t(sizeof(words))}, Type::Byte);
  std::memcpy(after.data_ptr(), &words, sizeof(words));
  return after;
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("draw_mask", TORCH_BOX(&sama::draw_mask));
}
