#include "tensor_lists.h"

#include <algorithm>
#include <stdexcept>

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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64();
  static const int32_t bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  if (code == f32) return Dtype::F32;
  if (code == f64) return Dtype::F64;
  if (code == bf16) return Dtype::BF16;
  if (code == f16) return Dtype::F16;
  return std::nullopt;
}

int32_t device_type_of(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

bool same_strides(Sizes sizes, Sizes a, Sizes b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

// Do the elements fill an interval of memory, each place once (a permuted contiguous tensor)?
bool dense(Sizes sizes, Sizes strides) {
  std::vector<std::pair<int64_t, int64_t>> dims; // stride, size
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

} // namespace

void fail(const char* op, const std::string& message) {
  throw std::runtime_error(std::string("sama::") + op + ": " + message);
}

void TensorLists::check_count(const char* name, const TensorList& tensors) const {
  if (!lists_.empty() && tensors.size() != lists_[0].tensors->size())
    fail(op_, std::string(name) + " has " + std::to_string(tensors.size()) + " tensors, but " + lists_[0].name +
              " has " + std::to_string(lists_[0].tensors->size()));
}

int TensorLists::add(const char* name, const TensorList& tensors, bool written) {
  check_count(name, tensors);
  List list{name, &tensors, written, {}};
  list.dtypes.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    check_device(name, tensors, int64_t(i));
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
    list.dtypes[i] = *dtype;
  }
  lists_.push_back(std::move(list));
  return int(lists_.size()) - 1;
}

int TensorLists::add_optional(const char* name, const TensorList& tensors) {
  return tensors.empty() ? -1 : add(name, tensors);
}

int TensorLists::add_in_row_major_order(
    const char* name, const TensorList& tensors, ScalarType type, const char* type_name) {
  check_count(name, tensors);
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(name, tensors, int64_t(i));
    if (tensors[i].scalar_type() != type) fail(op_, element(name, i) + " is not " + type_name);
    if (!row_major(tensors[i])) fail(op_, element(name, i) + " is not contiguous");
  }
  lists_.push_back({name, &tensors, false, std::vector<Dtype>(tensors.size(), Dtype::F32), true});
  only_row_major_ = true;
  return int(lists_.size()) - 1;
}

void TensorLists::check_device(const char* name, const TensorList& tensors, int64_t index) const {
  const Tensor& tensor = tensors[index];
  if (device_type_ == aoti_torch_device_type_cpu()) {
    if (!tensor.is_cpu()) fail(op_, element(name, index) + " is not on the CPU");
    return;
  }
  const char* first_name = lists_.empty() ? name : lists_[0].name;
  const Tensor& first = lists_.empty() ? tensors[0] : (*lists_[0].tensors)[0];
  if (device_type_of(tensor) != device_type_) fail(op_, element(name, index) + " is not on a CUDA device");
  if (tensor.get_device_index() != first.get_device_index())
    fail(op_, element(name, index) + " is not on the device of " + element(first_name, 0));
}

void TensorLists::require_same_dtype(int a, int b) const {
  for (int64_t i = 0; i < count(); ++i)
    if (dtype(a, i) != dtype(b, i))
      fail(op_, element(lists_[b].name, i) + " and " + element(lists_[a].name, i) + " must have the same dtype");
}

bool TensorLists::flat(int64_t index) const {
  if (sizes_[index] <= 1) return true;
  const Sizes sizes = tensor(0, index).sizes(), strides = tensor(0, index).strides();
  bool all_row_major = true, all_same = true;
  for (int list = 0; list < lists(); ++list) {
    if (lists_[list].own_shape) continue;
    const Tensor& other = tensor(list, index);
    all_row_major = all_row_major && row_major(other);
    all_same = all_same && same_strides(sizes, strides, other.strides());
  }
  return all_row_major || (!only_row_major_ && all_same && dense(sizes, strides));
}

bool row_major(const Tensor& tensor) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

void require_scalar(const char* op, const std::string& name, const Tensor& tensor) {
  if (tensor.numel() != 1) fail(op, name + " must hold one number, but has shape " + shape_of(tensor));
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Long:
    case ScalarType::Int:
    case ScalarType::BFloat16:
    case ScalarType::Half: return;
    default: fail(op, name + " must be a float, int32 or int64 tensor");
  }
}

void require_double(const char* op, const std::string& name, const Tensor& tensor, const char* source) {
  if (storage_dtype(tensor) != Dtype::F64) fail(op, name + " must be float64, as " + source + " returns it");
  require_scalar(op, name, tensor);
}

double read_scalar(const char* op, const std::string& name, const Tensor& tensor) {
  if (!tensor.is_cpu()) fail(op, name + " is not on the CPU");
  require_scalar(op, name, tensor);
  const void* data = tensor.data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return *static_cast<const float*>(data);
    case ScalarType::Double: return *static_cast<const double*>(data);
    case ScalarType::Long: return double(*static_cast<const int64_t*>(data));
    case ScalarType::Int: return double(*static_cast<const int32_t*>(data));
    case ScalarType::BFloat16: return BF16::widen(*static_cast<const uint16_t*>(data));
    default: return F16::widen(*static_cast<const uint16_t*>(data));
  }
}

double read_double(const char* op, const std::string& name, const Tensor& tensor, const char* source) {
  require_double(op, name, tensor, source);
  return read_scalar(op, name, tensor);
}

} // namespace sama
