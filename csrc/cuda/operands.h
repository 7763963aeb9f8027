// The tensors of an op as flat arrays on the device.
#pragma once

#include <utility>
#include <vector>

#include "runtime.h"

namespace sama {

class DeviceOperands : public TensorLists {
 public:
  explicit DeviceOperands(const char* op) : TensorLists(op, device_type()) {}

  // To be called on the device of the tensors. Where the operands of a tensor lie in different orders or have holes,
  // the kernels work on row-major copies; `write_back` brings what they wrote to where it belongs.
  void finish();
  void write_back();

  char* data(int list, int64_t tensor) const { return data_[list][tensor]; }

 private:
  std::vector<std::vector<char*>> data_;
  std::vector<Tensor> copies_; // kept until the kernels that read them are launched
  std::vector<std::pair<Tensor, Tensor>> results_; // where to copy, from where
};

} // namespace sama
