#include "operands.h"

#include <array>

#include <torch/csrc/stable/ops.h>

namespace sama {
namespace {

// An alias that autograd does not follow: a parameter may be changed in place, and copying it records nothing.
Tensor detached(TensorRef tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor.owned())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

} // namespace

void DeviceOperands::finish() {
  data_.assign(lists(), std::vector<char*>(count()));
  for (int64_t i = 0; i < count(); ++i) {
    const bool as_arrays = flat(i);
    for (int list = 0; list < lists(); ++list) {
      const TensorRef operand = tensor(list, i);
      if (as_arrays || row_major(list, i)) {
        data_[list][i] = static_cast<char*>(operand.data_ptr());
        continue;
      }
      Tensor original = detached(operand);
      Tensor copy = torch::stable::contiguous(original);
      data_[list][i] = static_cast<char*>(copy.data_ptr());
      if (written(list)) results_.emplace_back(std::move(original), copy);
      copies_.push_back(std::move(copy));
    }
  }
}

void DeviceOperands::write_back() {
  for (auto& [target, source] : results_) torch::stable::copy_(target, source);
}

} // namespace sama
