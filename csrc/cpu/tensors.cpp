#include "tensors.h"

#include <torch/csrc/stable/ops.h>

namespace sama {
namespace {

// Row-major dimensions without those of size 1, neighbours merged where one stride can walk both.
std::vector<Dim> collapsed(TensorRef tensor) {
  const int64_t *const sizes = tensor.sizes(), *const strides = tensor.strides();
  std::vector<Dim> dims;
  for (int64_t d = 0, count = tensor.dim(); d < count; ++d) {
    if (sizes[d] == 1) continue;
    if (!dims.empty() && dims.back().stride == sizes[d] * strides[d])
      dims.back() = {dims.back().size * sizes[d], strides[d]};
    else
      dims.push_back({sizes[d], strides[d]});
  }
  return dims;
}

} // namespace

void Operands::finish() {
  views_.resize(lists());
  for (auto& views : views_) views.resize(count());
  for (int64_t i = 0; i < count(); ++i) {
    const bool as_arrays = flat(i);
    for (int list = 0; list < lists(); ++list) {
      const TensorRef operand = tensor(list, i);
      View& view = views_[list][i];
      view.data = static_cast<char*>(operand.data_ptr());
      view.dtype = dtype(list, i);
      if (!as_arrays && !row_major(list, i)) view.dims = collapsed(operand);
    }
  }
}

Tensor make_double(double value) {
  Tensor tensor = torch::stable::empty({}, torch::headeronly::ScalarType::Double);
  *static_cast<double*>(tensor.data_ptr()) = value;
  return tensor;
}

} // namespace sama
