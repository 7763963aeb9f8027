// Adam's 1 - beta^t of every tensor.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "../common/tensor_lists.h"

namespace sama {

struct BiasCorrection {
  double c1; // 1 - beta1^t
  double c2; // 1 - beta2^t
  double t;
};

inline std::vector<BiasCorrection> bias_corrections(
    const char* op, const TensorList& steps, double beta1, double beta2) {
  std::vector<BiasCorrection> corrections;
  corrections.reserve(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    const double t = read_scalar(op, Name("steps", int64_t(i)), steps[i]);
    if (i > 0 && t == corrections.back().t) // nearly always: two pow per tensor saved
      corrections.push_back(corrections.back());
    else
      corrections.push_back({1 - std::pow(beta1, t), 1 - std::pow(beta2, t), t});
  }
  return corrections;
}

} // namespace sama
