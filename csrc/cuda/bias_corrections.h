// Adam's 1 - beta^t of every tensor, from step counters on the CPU (torch's default) or on the device (capturable).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "scalars.h"
#include "table.h"

namespace sama {

struct BiasCorrection {
  double c1; // 1 - beta1^t
  double c2; // 1 - beta2^t
  bool first; // t = 1
};

// A kernel argument. Nearly always all tensors have made the same number of steps, so the few different values travel
// with the launch; a tensor's tag says which one is its own.
struct BiasCorrections {
  BiasCorrection by_tag[kTags];
  const BiasCorrection* by_tensor; // on the device, instead, if not null

  __device__ BiasCorrection of(int tag, int tensor) const { return by_tensor ? by_tensor[tensor] : by_tag[tag]; }
};

class StepCorrections {
 public:
  // Launches a kernel of its own if a counter is on the device, or if there are more than 16 different ones.
  StepCorrections(
      const Launcher& launch, TensorRef like, const std::vector<Scalar>& steps, double beta1, double beta2);

  const BiasCorrections& argument() const { return argument_; }
  const std::vector<uint8_t>& tags() const { return tags_; } // of each tensor

 private:
  bool sort_into_tags(const std::vector<Scalar>& steps, double beta1, double beta2);

  BiasCorrections argument_{};
  std::vector<uint8_t> tags_;
  std::optional<Tensor> buffer_; // kept until the kernels that read it are launched
};

} // namespace sama
