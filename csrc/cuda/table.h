// A list of tensors as one kernel launch: which block works on which part of which tensor.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <memory>

#include "operands.h"

namespace sama {

// A block takes one chunk. Large enough that finding the tensor (a dozen reads of constant memory) and adding up the
// block's sum do not matter, small enough that a hundred million elements are 6,100 blocks: some ten rounds on a large
// GPU, so that the last round, which leaves processors idle, counts little. A multiple of 8 elements, so that every
// chunk of an aligned tensor begins at a multiple of 16 bytes.
constexpr int64_t kChunk = 16384;

constexpr int64_t kParameterBytes = 32764; // of one kernel, from compute capability 7.0 and CUDA 12.1 on
constexpr int64_t kTableBytes = kParameterBytes - 512; // the rest is for the other parameters of the op

constexpr int kTags = 16;

// Travels by value as a kernel parameter: nothing to allocate or copy, no lifetime to care for, and a CUDA graph
// records it as it is. Arrays rather than an array of records: no padding. Tensors that are empty, or that another
// launch takes care of, have no chunks.
template <int lists>
struct Table {
  static_assert(lists >= 1 && lists <= 8, "those after the sixth must have Dtype 0, as `codes` has no bits for them");
  static constexpr int kCapacity = int((kTableBytes - 16) / (8 * lists + 8));

  char* data[lists][kCapacity];
  int32_t chunks_up_to[kCapacity]; // chunks of this tensor and those before it
  uint16_t last_chunk[kCapacity]; // elements in the tensor's last chunk
  uint16_t codes[kCapacity]; // Dtype of list l in bits 2 l and 2 l + 1; the tag in the upper four
  int32_t count;
  int32_t first; // position in the list of the table's first tensor
};
static_assert(sizeof(Table<2>) <= kTableBytes && sizeof(Table<4>) <= kTableBytes, "fits");
static_assert(kChunk <= std::numeric_limits<uint16_t>::max(), "last_chunk");

// What one block does: elements [start, start + length) of a tensor of the table.
struct Span {
  int tensor;
  int64_t start;
  int length;
};

template <int lists>
__device__ inline Span span_of(const Table<lists>& table, int chunk) {
  int low = 0, high = table.count - 1; // the first tensor with chunks_up_to > chunk
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.chunks_up_to[middle] > chunk)
      high = middle;
    else
      low = middle + 1;
  }
  const int before = low > 0 ? table.chunks_up_to[low - 1] : 0;
  const bool last = chunk + 1 == table.chunks_up_to[low];
  return {low, int64_t(chunk - before) * kChunk, last ? int(table.last_chunk[low]) : int(kChunk)};
}

// One tensor's memory, as the kernels see it.
struct Operand {
  char* data;
  Dtype dtype;
  bool aligned; // 16-byte accesses are allowed at multiples of 8 elements
};

template <int lists>
__device__ inline Operand operand(const Table<lists>& table, int list, int tensor) {
  char* data = table.data[list][tensor];
  return {data, Dtype(table.codes[tensor] >> (2 * list) & 3), reinterpret_cast<uintptr_t>(data) % 16 == 0};
}

template <int lists>
__device__ inline int tag(const Table<lists>& table, int tensor) {
  return table.codes[tensor] >> 12;
}

inline int64_t chunks_of(int64_t length) { return (length + kChunk - 1) / kChunk; }

// Divides tensors among as few tables as possible and calls launch(table, blocks, first_chunk) for each that has work;
// `first_chunk` counts over all of them.
//   order: which list of `operands` is which one of the table.
//   length(i): elements of tensor i, or 0 to leave it out. tag(i): 0 .. 15.
// Returns the number of chunks.
template <int lists, class Length, class Tag, class Launch>
int64_t for_each_table(
    const DeviceOperands& operands, const std::array<int, lists>& order, Length length, Tag tag, Launch launch) {
  int64_t begin = 0;
  while (begin < operands.count() && length(begin) == 0) ++begin;
  if (begin == operands.count()) return 0; // none for this launch: usual, as most lists have one dtype
  const auto table = std::make_unique<Table<lists>>();
  int64_t before = 0, chunks = 0;
  table->count = 0;
  table->first = int32_t(begin);
  const auto flush = [&] {
    if (chunks > 0) launch(*table, chunks, before);
    before += chunks;
    chunks = 0;
    table->first += table->count;
    table->count = 0;
  };
  for (int64_t i = begin; i < operands.count(); ++i) {
    const int64_t elements = length(i), own = chunks_of(elements);
    if (table->count == Table<lists>::kCapacity || chunks + own > std::numeric_limits<int32_t>::max()) flush();
    const int at = table->count++;
    int codes = tag(i) << 12;
    for (int list = 0; list < lists; ++list) {
      table->data[list][at] = operands.data(order[list], i);
      codes |= int(operands.dtype(order[list], i)) << (2 * list);
    }
    chunks += own;
    table->chunks_up_to[at] = int32_t(chunks);
    table->last_chunk[at] = uint16_t(elements - (own > 0 ? own - 1 : 0) * kChunk);
    table->codes[at] = uint16_t(codes);
  }
  flush();
  return before;
}

// Over all tensors: how many slots a sum needs.
inline int64_t total_chunks(const DeviceOperands& operands) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < operands.count(); ++i) chunks += chunks_of(operands.numel(i));
  return chunks;
}

inline int no_tag(int64_t) { return 0; }

} // namespace sama
