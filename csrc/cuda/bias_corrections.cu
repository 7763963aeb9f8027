#include "bias_corrections.h"

#include <algorithm>
#include <cmath>

#include <torch/csrc/stable/ops.h>

namespace sama {
namespace {

SAMA_BOTH inline BiasCorrection correction(double t, double beta1, double beta2) {
  return {1 - std::pow(beta1, t), 1 - std::pow(beta2, t), t == 1};
}

struct Steps {
  static constexpr int kCapacity = 1024; // per launch, 16 KiB of parameters
  Scalar step[kCapacity];
  int32_t count;
};

// One pow per tensor. In the kernel that uses it, it would be one per block, and that kernel would need the registers.
__global__ void __launch_bounds__(kThreads) bias_corrections_kernel(
    const Steps __grid_constant__ steps, double beta1, double beta2, BiasCorrection* results) {
  const int i = int(blockIdx.x * kThreads + threadIdx.x);
  if (i < steps.count) results[i] = correction(read(steps.step[i]), beta1, beta2);
}

} // namespace

StepCorrections::StepCorrections(
    const Launcher& launch, TensorRef like, const std::vector<Scalar>& steps, double beta1, double beta2)
    : tags_(steps.size()) {
  if (sort_into_tags(steps, beta1, beta2)) return;
  std::fill(tags_.begin(), tags_.end(), uint8_t(0));
  const int64_t count = int64_t(steps.size());
  constexpr int64_t kDoubles = sizeof(BiasCorrection) / sizeof(double);
  buffer_ = torch::stable::new_empty(like.owned(), {kDoubles * count}, torch::headeronly::ScalarType::Double);
  auto* const results = static_cast<BiasCorrection*>(buffer_->data_ptr());
  argument_.by_tensor = results;
  Steps some;
  for (int64_t start = 0; start < count; start += Steps::kCapacity) {
    some.count = int32_t(std::min<int64_t>(count - start, Steps::kCapacity));
    std::copy_n(steps.begin() + start, some.count, some.step);
    launch(bias_corrections_kernel, (some.count + kThreads - 1) / kThreads, some, beta1, beta2, results + start);
  }
}

bool StepCorrections::sort_into_tags(const std::vector<Scalar>& steps, double beta1, double beta2) {
  std::vector<double> values;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].kind != ScalarKind::Value) return false;
    const double t = steps[i].value;
    // The last one first: nearly always there is no other.
    const auto found = std::find(values.rbegin(), values.rend(), t);
    if (found != values.rend()) {
      tags_[i] = uint8_t(values.rend() - found - 1);
      continue;
    }
    if (values.size() == kTags) return false;
    tags_[i] = uint8_t(values.size());
    argument_.by_tag[values.size()] = correction(t, beta1, beta2);
    values.push_back(t);
  }
  return true;
}

} // namespace sama
