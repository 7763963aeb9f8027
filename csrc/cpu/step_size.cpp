// step_size: epsilon = alpha / ||v||, with a flag instead of a division by zero. See sama_kernels/ops/step_size.py.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tensors.h"

namespace sama {

std::tuple<Tensor, Tensor, Tensor> step_size(const TensorList& norm_sqs, double alpha, double tiny) {
  const char* op = "step_size";
  if (norm_sqs.empty()) fail(op, "norm_sqs is empty");
  double sum = 0.0;
  for (size_t i = 0; i < norm_sqs.size(); ++i)
    sum += read_double(op, Name("norm_sqs", int64_t(i)), norm_sqs[i], "adapt_norm");
  const double norm = std::sqrt(sum);
  const bool degenerate = !(std::isfinite(norm) && norm > tiny);
  Tensor flag = torch::stable::empty({}, torch::headeronly::ScalarType::Bool);
  *static_cast<bool*>(flag.data_ptr()) = degenerate;
  return {make_double(norm), make_double(degenerate ? 0.0 : alpha / norm), flag};
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("step_size", TORCH_BOX(&sama::step_size));
}
