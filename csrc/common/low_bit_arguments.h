// The arguments of adapt_norm_low_bit_adam, wherever its kernels run: checked, and as the kernels take them.
#pragma once

#include "tensor_lists.h"

namespace sama {

// A moment of all tensors as it is stored: value i of a tensor is table[code i] * scales[i / block_size], in float32.
struct StoredMoments {
  const TensorList& codes;
  const TensorList& scales;
  const TensorList& tables;
};

// Lists of the op in the order in which they are added.
constexpr int kLowBitV = 0, kLowBitGrad = 1, kLowBitM = 2, kLowBitW = 5, kLowBitLists = 8;
// Within a moment.
constexpr int kCodes = 0, kScales = 1, kLookup = 2;

constexpr int64_t kMostPerScale = int64_t(1) << 30; // with an index within a chunk added still an int32
constexpr int kByteCodes = 256, kPackedCodes = 16; // entries of a lookup table

// Adds the lists and checks all arguments but the values of `steps`. The messages are those of
// sama_kernels/backends/low_bit.py. Returns whether codes have 4 bits, two in a byte, the first in the upper half.
bool add_low_bit_lists(
    const char* op, TensorLists& operands, const TensorList& v, const TensorList& grads, const StoredMoments& m,
    const StoredMoments& w, const TensorList& steps, int64_t block_size, int64_t mode);

} // namespace sama
