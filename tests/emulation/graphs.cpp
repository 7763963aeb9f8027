#undef TORCH_TARGET_VERSION // with it torch's headers hide allocators
#include "graphs.h"

#include <cstdint>
#include <utility>
#include <vector>

#include <c10/core/Allocator.h>

namespace emulation {
namespace {

struct Graph {
  std::vector<std::function<void()>> launches;
  std::vector<c10::DataPtr> memory; // see KeepingAllocator
};

Graph* captured = nullptr; // the graph that is being captured

// What torch allocates during a capture belongs to the graph, whose launches go on using it when the tensors are gone.
class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    captured->memory.push_back(torchs->allocate(size));
    void* const address = captured->memory.back().get();
    return {address, address, &keep, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &keep; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }

  c10::Allocator* torchs = nullptr;

 private:
  static void keep(void*) {}
};

KeepingAllocator allocator;
constexpr uint8_t kPriority = 100; // above that of torch's own allocator

} // namespace

bool capturing() { return captured != nullptr; }
void add_to_graph(std::function<void()> launch) { captured->launches.push_back(std::move(launch)); }

} // namespace emulation

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulation_begin_capture() {
  emulation::captured = new emulation::Graph;
  emulation::allocator.torchs = c10::GetAllocator(c10::DeviceType::CPU);
  c10::SetAllocator(c10::DeviceType::CPU, &emulation::allocator, emulation::kPriority);
}

EXPORTED void* emulation_end_capture() { // lives until the process ends
  c10::SetAllocator(c10::DeviceType::CPU, emulation::allocator.torchs, emulation::kPriority);
  return std::exchange(emulation::captured, nullptr);
}

EXPORTED void emulation_replay(void* graph) {
  for (const auto& launch : static_cast<emulation::Graph*>(graph)->launches) launch();
}
