// step_size: epsilon = alpha / ||v||, with a flag instead of a division by zero. See sama_kernels/ops/step_size.py.
#include <algorithm>
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "scalars.h"

namespace sama {
namespace {

constexpr int kParts = 2048; // per launch, 16 KiB of parameters; one per parameter group, so nearly always one launch

struct Parts {
  const double* address[kParts];
  int32_t count;
  int32_t first; // whether these are the first of the list, and the last
  int32_t last;
};

struct Results {
  double* norm; // until the last launch the sum so far
  double* epsilon;
  bool* degenerate;
};

// One thread: the sum is in the order of the list.
__global__ void __launch_bounds__(kThreads) step_size_kernel(
    const Parts __grid_constant__ parts, const Results __grid_constant__ results, double alpha, double tiny) {
  if (threadIdx.x != 0) return;
  double sum = parts.first ? 0.0 : *results.norm;
  for (int i = 0; i < parts.count; ++i) sum += *parts.address[i];
  if (!parts.last) {
    *results.norm = sum;
    return;
  }
  const double norm = std::sqrt(sum);
  const bool degenerate = !(std::isfinite(norm) && norm > tiny);
  *results.norm = norm;
  *results.epsilon = degenerate ? 0.0 : alpha / norm;
  *results.degenerate = degenerate;
}

} // namespace

std::tuple<Tensor, Tensor, Tensor> step_size(const TensorList& norm_sqs, double alpha, double tiny) {
  const char* op = "step_size";
  if (norm_sqs.empty()) fail(op, "norm_sqs is empty");
  const Tensor like = norm_sqs[0].owned();
  std::vector<const double*> addresses(norm_sqs.size());
  for (size_t i = 0; i < norm_sqs.size(); ++i)
    addresses[i] = device_double(op, Name("norm_sqs", int64_t(i)), norm_sqs[i], "adapt_norm", like);
  const Launcher launch(op, like);
  using torch::headeronly::ScalarType;
  Tensor norm = torch::stable::new_empty(like, {}, ScalarType::Double);
  Tensor epsilon = torch::stable::new_empty(like, {}, ScalarType::Double);
  Tensor degenerate = torch::stable::new_empty(like, {}, ScalarType::Bool);
  const Results results{static_cast<double*>(norm.data_ptr()), static_cast<double*>(epsilon.data_ptr()),
                        static_cast<bool*>(degenerate.data_ptr())};
  Parts parts;
  for (size_t start = 0; start < addresses.size(); start += kParts) {
    const size_t end = std::min(start + kParts, addresses.size());
    std::copy(addresses.begin() + start, addresses.begin() + end, parts.address);
    parts.count = int32_t(end - start);
    parts.first = start == 0;
    parts.last = end == addresses.size();
    launch(step_size_kernel, 1, parts, results, alpha, tiny);
  }
  return {norm, epsilon, degenerate};
}

} // namespace sama

SAMA_CUDA_LIBRARY(m) {
  m.impl("step_size", TORCH_BOX(&sama::step_size));
}
