#include "moments_arguments.h"

#include <algorithm>

namespace sama {
namespace {

const double* checked_coefficients(const char* op, const Tensor& coefficients, TensorRef like, int64_t count) {
  if (coefficients.scalar_type() != torch::headeronly::ScalarType::Double) fail(op, "coefficients must be float64");
  const auto sizes = coefficients.sizes();
  const bool shaped = sizes.size() == 2 && sizes[0] == count && sizes[1] == kCoefficients;
  if (!shaped || !row_major(coefficients)) {
    std::string shape;
    for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    fail(op, "coefficients must be a contiguous tensor of shape [" + std::to_string(count) + ", " +
                 std::to_string(kCoefficients) + "], not [" + shape + "]");
  }
  if (coefficients.is_cpu() != like.is_cpu() || coefficients.get_device_index() != like.device_index())
    fail(op, "coefficients is not on the device of v[0]");
  return static_cast<const double*>(coefficients.data_ptr());
}

} // namespace

MomentsArguments add_moments_lists(
    const char* op, TensorLists& operands, const TensorList& v, const TensorList& grads, const TensorList& firsts,
    const TensorList& seconds, const TensorList& params, const TensorList& buffers, const Tensor& coefficients,
    double weight_decay, int64_t form) {
  if (v.empty()) fail(op, "v is empty");
  if (form < int64_t(Form::Linear) || form > int64_t(Form::Delta))
    fail(op, "form must be 0 (linear), 1 (ratio), 2 (centered), 3 (maximum) or 4 (delta), not " +
                 std::to_string(form));
  MomentsArguments a{Form(form), false, Decay::None, nullptr};
  operands.add("v", v, /*written=*/true);
  if (a.form != Form::Linear) {
    operands.add("grads", grads);
    a.firsts = !firsts.empty() || a.form != Form::Ratio;
    if (a.firsts) operands.add("firsts", firsts);
    operands.add("seconds", seconds);
    if (weight_decay != 0.0) {
      if (params.empty()) fail(op, "params is empty, but weight_decay needs theta");
      operands.add("params", params);
      a.decay = Decay::Implicit;
      if (!buffers.empty()) {
        if (a.firsts && a.form != Form::Centered)
          fail(op, "buffers do not go with firsts, except in form 2 (centered)");
        operands.add("buffers", buffers);
        a.decay = Decay::Buffer;
      }
    }
  }
  a.coefficients = checked_coefficients(op, coefficients, v[0], int64_t(v.size()));
  return a;
}

double state_ulp(const TensorLists& operands, const MomentsArguments& arguments, int64_t tensor) {
  if (arguments.form == Form::Linear) return 0.0;
  const int last = arguments.firsts ? 3 : 2; // seconds; in front of it firsts or grads
  const double ulp = epsilon_of(operands.dtype(last, tensor));
  return arguments.firsts ? std::max(ulp, epsilon_of(operands.dtype(last - 1, tensor))) : ulp;
}

} // namespace sama
