// Random bits as a function of (seed, tensor, element): Philox4x32-10 (Salmon et al. 2011). The numbering of the
// elements is described in sama_kernels/backends/rounding.py.
#pragma once

#include <cstdint>

#include "inline.h"

namespace sama {

constexpr int64_t kRandomBlock = 8; // elements that share a counter: four words of two half-words each

struct RandomWords {
  uint32_t word[4];
};

// The random words of elements 8 * block .. 8 * block + 7 of a tensor: element j of them takes half-word j, of each
// word the low half first.
SAMA_INLINE RandomWords random_words(uint64_t seed, uint32_t tensor, uint64_t block) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = tensor, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

} // namespace sama
