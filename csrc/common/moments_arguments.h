// The arguments of adapt_norm_moments, wherever its kernels run: checked, and as the kernels take them.
#pragma once

#include "moments.h"
#include "tensor_lists.h"

namespace sama {

struct MomentsArguments {
  Form form;
  bool firsts;
  Decay decay;
  const double* coefficients; // one row for each tensor, where v is
};

// Adds the lists that the op reads, in the order of MomentsVariant's positions. The messages are those of
// sama_kernels/backends/arguments.py.
MomentsArguments add_moments_lists(
    const char* op, TensorLists& operands, const TensorList& v, const TensorList& grads, const TensorList& firsts,
    const TensorList& seconds, const TensorList& params, const TensorList& buffers, const Tensor& coefficients,
    double weight_decay, int64_t form);

// The spacing of the numbers next to 1 in the dtype of a tensor's state: the coarser one, if there are two.
double state_ulp(const TensorLists& operands, const MomentsArguments& arguments, int64_t tensor);

} // namespace sama
