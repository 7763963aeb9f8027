#include "tensors.h"

#include <algorithm>
#include <stdexcept>

#include <torch/csrc/stable/ops.h>

namespace sama {

using torch::headeronly::ScalarType;

namespace {

std::string element(const char* list, int64_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (const int64_t size : tensor.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

std::optional<Dtype> storage_dtype(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64();
  static const int32_t bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  if (code == f32) return Dtype::F32;
  if (code == f64) return Dtype::F64;
  if (code == bf16) return Dtype::BF16;
  if (code == f16) return Dtype::F16;
  return std::nullopt;
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

bool contiguous(Sizes sizes, Sizes strides) {
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool same_strides(Sizes sizes, Sizes a, Sizes b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

// Do the elements fill an interval of memory, each place once (a permuted contiguous tensor)?
bool dense(Sizes sizes, Sizes strides) {
  std::vector<Dim> dims;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.push_back({sizes[d], strides[d]});
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  int64_t expected = 1;
  for (const Dim& dim : dims) {
    if (dim.stride != expected) return false;
    expected *= dim.size;
  }
  return true;
}

// Row-major dimensions without those of size 1, neighbours merged where one stride can walk both.
std::vector<Dim> collapsed(Sizes sizes, Sizes strides) {
  std::vector<Dim> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) continue;
    if (!dims.empty() && dims.back().stride == sizes[d] * strides[d])
      dims.back() = {dims.back().size * sizes[d], strides[d]};
    else
      dims.push_back({sizes[d], strides[d]});
  }
  return dims;
}

} // namespace

void fail(const char* op, const std::string& message) {
  throw std::runtime_error(std::string("sama::") + op + ": " + message);
}

int Operands::add(const char* name, const TensorList& tensors, bool written) {
  if (!lists_.empty() && tensors.size() != lists_[0].tensors->size())
    fail(op_, std::string(name) + " has " + std::to_string(tensors.size()) + " tensors, but " + lists_[0].name +
              " has " + std::to_string(lists_[0].tensors->size()));
  List list{name, &tensors, written, {}};
  list.views.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    if (!tensor.is_cpu()) fail(op_, element(name, i) + " is not on the CPU");
    const auto dtype = storage_dtype(tensor);
    if (!dtype) fail(op_, element(name, i) + " is not float32, float64, bfloat16 or float16");
    const Sizes sizes = tensor.sizes();
    if (lists_.empty()) {
      sizes_.push_back(tensor.numel());
    } else {
      const Tensor& first = (*lists_[0].tensors)[i];
      const Sizes expected = first.sizes();
      if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()))
        fail(op_, element(name, i) + " has shape " + shape_of(tensor) + ", but " + element(lists_[0].name, i) +
                  " has shape " + shape_of(first));
    }
    if (written && sizes_[i] > 1) {
      const Sizes strides = tensor.strides();
      for (size_t d = 0; d < sizes.size(); ++d)
        if (sizes[d] > 1 && strides[d] == 0)
          fail(op_, element(name, i) + " is expanded: several elements share one place in memory, so it cannot be"
                    " changed in place; clone it");
    }
    list.views[i].dtype = *dtype;
    list.views[i].data = static_cast<char*>(tensor.data_ptr());
  }
  lists_.push_back(std::move(list));
  return int(lists_.size()) - 1;
}

int Operands::add_optional(const char* name, const TensorList& tensors) {
  return tensors.empty() ? -1 : add(name, tensors);
}

void Operands::require_same_dtype(int a, int b) const {
  for (size_t i = 0; i < sizes_.size(); ++i)
    if (lists_[a].views[i].dtype != lists_[b].views[i].dtype)
      fail(op_, element(lists_[b].name, i) + " and " + element(lists_[a].name, i) + " must have the same dtype");
}

void Operands::finish() {
  for (size_t i = 0; i < sizes_.size(); ++i)
    if (sizes_[i] > 1) lay_out(int64_t(i));
}

void Operands::lay_out(int64_t i) {
  const Sizes sizes = (*lists_[0].tensors)[i].sizes();
  const Sizes strides = (*lists_[0].tensors)[i].strides();
  bool all_contiguous = true, all_same = true;
  for (const List& list : lists_) {
    const Sizes other = (*list.tensors)[i].strides();
    all_contiguous = all_contiguous && contiguous(sizes, other);
    all_same = all_same && same_strides(sizes, strides, other);
  }
  if (all_contiguous || (all_same && dense(sizes, strides))) return; // flat, which is how views start
  for (List& list : lists_) {
    const Sizes own = (*list.tensors)[i].strides();
    if (!contiguous(sizes, own)) list.views[i].dims = collapsed(sizes, own);
  }
}

double read_scalar(const char* op, const std::string& name, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, name + " is not on the CPU");
  if (tensor.numel() != 1) fail(op, name + " must hold one number, but has shape " + shape_of(tensor));
  const void* data = tensor.data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return *static_cast<const float*>(data);
    case ScalarType::Double: return *static_cast<const double*>(data);
    case ScalarType::Long: return double(*static_cast<const int64_t*>(data));
    case ScalarType::Int: return double(*static_cast<const int32_t*>(data));
    case ScalarType::BFloat16: return BF16::widen(*static_cast<const uint16_t*>(data));
    case ScalarType::Half: return F16::widen(*static_cast<const uint16_t*>(data));
    default: fail(op, name + " must be a float, int32 or int64 tensor");
  }
}

double read_double(const char* op, const std::string& name, const Tensor& tensor, const char* source) {
  if (storage_dtype(tensor) != Dtype::F64) fail(op, name + " must be float64, as " + source + " returns it");
  return read_scalar(op, name, tensor);
}

Tensor make_double(double value) {
  Tensor tensor = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(tensor.data_ptr()) = value;
  return tensor;
}

} // namespace sama
