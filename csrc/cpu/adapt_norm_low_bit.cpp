// adapt_norm_low_bit_adam: v <- D d and ||v||^2 in one pass. See sama_kernels/ops/adapt_norm_low_bit.py.
#include <torch/csrc/stable/library.h>

#include "../common/low_bit.h"
#include "../common/low_bit_arguments.h"
#include "bias_corrections.h"
#include "chunks.h"
#include "reduce.h"
#include "tiles.h"

namespace sama {
namespace {

// A moment of one tensor.
struct Stored {
  const uint8_t* codes;
  const float* scales;
  const float* table;
};

Stored stored(const Operands& operands, int moment, int64_t tensor) {
  return {operands.view(moment + kCodes, tensor).at<const uint8_t>(0),
          operands.view(moment + kScales, tensor).at<const float>(0),
          operands.view(moment + kLookup, tensor).at<const float>(0)};
}

// Codes of 4 bits, from element `start` on, as bytes.
SAMA_CLONES void unpack(const uint8_t* packed, int64_t start, int64_t n, uint8_t* codes) {
  const uint8_t* from = packed + start / 2;
  int64_t i = 0;
  if (start % 2 == 1) codes[i++] = *from++ & 15;
  const int64_t pairs = (n - i) / 2;
  SAMA_IVDEP
  for (int64_t k = 0; k < pairs; ++k) {
    codes[i + 2 * k] = from[k] >> 4;
    codes[i + 2 * k + 1] = from[k] & 15;
  }
  if ((n - i) % 2 == 1) codes[n - 1] = from[pairs] >> 4;
}

template <class T>
SAMA_CLONES void dequantise_loop(const uint8_t* codes, int64_t n, const float* table, float scale, T* values) {
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i) values[i] = table[codes[i]] * scale; // the product in float32, as the optimizers have it
}

// Elements [start, start + n) of a moment, n <= kTile.
template <class T>
void dequantise(const Stored& from, bool packed, int64_t block_size, int64_t start, int64_t n, T* values) {
  uint8_t unpacked[kTile];
  const uint8_t* codes = from.codes + start;
  if (packed) {
    unpack(from.codes, start, n, unpacked);
    codes = unpacked;
  }
  for (int64_t done = 0; done < n;) {
    const int64_t block = (start + done) / block_size;
    const int64_t run = std::min(n - done, (block + 1) * block_size - (start + done));
    dequantise_loop(codes + done, run, from.table, from.scales[block], values + done);
    done += run;
  }
}

// `first` is a template argument, as with a run-time one the loop would not be vectorised.
template <class T, bool exact, bool first>
SAMA_CLONES void low_bit_adam_loop(
    const AdamScalars<T>& k, int64_t n, const T* d, const T* g, const T* m, const T* w, T* out) {
  const AdamScalars<T> c = k; // in registers: `out` could alias `k` for all the compiler knows
  WholeRange<T> whole;
  SAMA_IVDEP
  for (int64_t i = 0; i < n; ++i)
    out[i] = low_bit_adam_element<T, exact>(c, d[i], g[i], known_moments<T, first>(c, g[i], m[i], w[i]), whole);
}

template <class T>
auto low_bit_adam_loop_for(bool exact, bool first) {
  if (exact) return first ? low_bit_adam_loop<T, true, true> : low_bit_adam_loop<T, true, false>;
  return first ? low_bit_adam_loop<T, false, true> : low_bit_adam_loop<T, false, false>;
}

struct Call {
  const Operands& operands;
  bool packed, exact;
  int64_t block_size;
};

template <class T>
void low_bit_adam_segment(const Call& call, const Segment& at, const AdamScalars<T>& k, bool first, Lanes& lanes) {
  const View& v = call.operands.view(kLowBitV, at.tensor);
  const View& grad = call.operands.view(kLowBitGrad, at.tensor);
  const Stored stored_m = stored(call.operands, kLowBitM, at.tensor);
  const Stored stored_w = stored(call.operands, kLowBitW, at.tensor);
  const auto loop = low_bit_adam_loop_for<T>(call.exact, first);
  Tile<T> d, g, out;
  alignas(64) T m[kTile], w[kTile];
  for_each_tile(at.start, at.length, [&](int64_t start, int64_t n) {
    dequantise(stored_m, call.packed, call.block_size, start, n, m);
    dequantise(stored_w, call.packed, call.block_size, start, n, w);
    T* target = out.target(v, start);
    loop(k, n, d.load(v, start, n, false), g.load(grad, start, n, false), m, w, target);
    add_squares(target, n, lanes);
    out.store(v, start, n);
  });
}

} // namespace

Tensor adapt_norm_low_bit_adam(
    const TensorList& v, const TensorList& grads, const TensorList& exp_avg_codes, const TensorList& exp_avg_scales,
    const TensorList& exp_avg_tables, const TensorList& exp_avg_sq_codes, const TensorList& exp_avg_sq_scales,
    const TensorList& exp_avg_sq_tables, const TensorList& steps, int64_t block_size,
    const std::optional<Tensor>& lr_tensor, double lr, double beta1, double beta2, double eps, int64_t mode) {
  const char* op = "adapt_norm_low_bit_adam";
  Operands operands(op);
  const bool packed = add_low_bit_lists(
      op, operands, v, grads, {exp_avg_codes, exp_avg_scales, exp_avg_tables},
      {exp_avg_sq_codes, exp_avg_sq_scales, exp_avg_sq_tables}, steps, block_size, mode);
  operands.finish();
  const double rate = lr_tensor ? read_scalar(op, "lr_tensor", *lr_tensor) : lr;
  const std::vector<BiasCorrection> corrections = bias_corrections(op, steps, beta1, beta2);

  const Call call{operands, packed, mode == kExact, block_size};
  const Chunks chunks(operands);
  std::vector<Lanes> slots(chunks.count());
  const auto segment = [&](int64_t chunk, const Segment& at, auto zero) {
    using T = decltype(zero);
    const BiasCorrection& own = corrections[at.tensor];
    const AdamScalars<T> k = low_bit_scalars<T>(rate, own.c1, own.c2, beta1, beta2, eps);
    low_bit_adam_segment<T>(call, at, k, own.t == 1, slots[chunk]);
  };
  chunks.for_each([&](int64_t chunk, const Segment& at) {
    if (operands.view(kLowBitV, at.tensor).dtype == Dtype::F64)
      segment(chunk, at, double{});
    else
      segment(chunk, at, float{});
  });
  return make_double(total(slots));
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("adapt_norm_low_bit_adam", TORCH_BOX(&sama::adapt_norm_low_bit_adam));
}
