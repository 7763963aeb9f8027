// The work of a whole tensor list, cut into pieces of equal cost for torch's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace sama {

// Elements [start, start + length) of one tensor.
struct Segment {
  int64_t tensor;
  int64_t start;
  int64_t length;
};

// A chunk is a run of segments: part of a large tensor, or many small ones. The cut depends on the sizes alone and
// never on the number of threads, so sums per chunk are the same however many there are.
class Chunks {
 public:
  explicit Chunks(const Operands& operands) {
    int64_t room = 0;
    for (int64_t i = 0; i < operands.count(); ++i) {
      for (int64_t start = 0, numel = operands.numel(i); start < numel;) {
        if (room <= 0) {
          first_.push_back(int64_t(segments_.size()));
          room = kCost;
        }
        const int64_t length = std::min(numel - start, std::max(room, kLeast));
        segments_.push_back({i, start, length});
        start += length;
        room -= length + kSegmentCost;
      }
    }
    first_.push_back(int64_t(segments_.size()));
  }

  int64_t count() const { return int64_t(first_.size()) - 1; }

  // Calls f(chunk, segment) for every segment; the segments of a chunk in order, on one thread. `f` must not throw:
  // an exception that crosses the thread pool loses its message.
  template <class F>
  void for_each(const F& f) const {
    const auto run = [&](int64_t chunk) {
      for (int64_t s = first_[chunk]; s < first_[chunk + 1]; ++s) f(chunk, segments_[s]);
    };
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count() / kChunksPerThread);
    if (threads <= 1) {
      for (int64_t chunk = 0; chunk < count(); ++chunk) run(chunk);
      return;
    }
    std::atomic<int64_t> next{0}; // chunks on demand: a core that is slowed down by others takes fewer
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < count();) run(chunk);
    });
  }

 private:
  static constexpr int64_t kCost = 16384; // elements; 64 KiB per fp32 operand, so that all operands stay in L2
  static constexpr int64_t kSegmentCost = 64; // starting on another tensor, in elements' time
  static constexpr int64_t kLeast = 1024; // no slivers at the end of a chunk
  // Half a million elements for each thread, or it stays asleep: waking a pool thread and waiting for it takes longer
  // than what it could do meanwhile, and far longer where the cores are shared with other programs. 2,000 tensors of 150
  // elements in `perturb`, on two busy cores: 1.0 ms on one thread, 8 to 12 ms on two.
  static constexpr int64_t kChunksPerThread = 32;

  std::vector<Segment> segments_;
  std::vector<int64_t> first_;
};

} // namespace sama
