#include "tensor_lists.h"

#include <algorithm>
#include <stdexcept>

namespace sama {

using torch::headeronly::ScalarType;

namespace {

std::string shape_of(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t d = 0; d < dim; ++d) text += (d > 0 ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

// libtorch's numbers of the dtypes, asked for once: a call each.
struct DtypeCodes {
  int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64();
  int32_t bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  int32_t i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64();
};

const DtypeCodes& codes() {
  static const DtypeCodes codes;
  return codes;
}

std::optional<Dtype> storage_dtype(TensorRef tensor) {
  const DtypeCodes& known = codes();
  const int32_t code = tensor.dtype();
  if (code == known.f32) return Dtype::F32;
  if (code == known.bf16) return Dtype::BF16;
  if (code == known.f64) return Dtype::F64;
  if (code == known.f16) return Dtype::F16;
  return std::nullopt;
}

bool is_row_major(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  int64_t expected = 1;
  for (int64_t d = dim; d-- > 0;) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool same_strides(int64_t dim, const int64_t* sizes, const int64_t* a, const int64_t* b) {
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  return true;
}

// Do the elements fill an interval of memory, each place once (a permuted contiguous tensor)?
bool dense(int64_t dim, const int64_t* sizes, const int64_t* strides) {
  std::vector<std::pair<int64_t, int64_t>> dims; // stride, size
  for (int64_t d = 0; d < dim; ++d)
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

std::string Name::text() const {
  return index_ < 0 ? std::string(list_) : std::string(list_) + "[" + std::to_string(index_) + "]";
}

void TensorLists::check_count(const char* name, const TensorList& tensors) const {
  if (!lists_.empty() && tensors.size() != lists_[0].tensors->size())
    fail(op_, std::string(name) + " has " + std::to_string(tensors.size()) + " tensors, but " + lists_[0].name +
              " has " + std::to_string(lists_[0].tensors->size()));
}

TensorLists::Layout TensorLists::layout_of(TensorRef tensor, Dtype dtype) {
  const int64_t *const sizes = tensor.sizes(), *const strides = tensor.strides(), dim = tensor.dim();
  return {sizes, strides, int32_t(dim), dtype, is_row_major(dim, sizes, strides)};
}

void TensorLists::check_shape(const char* name, const Layout& layout, int64_t index) const {
  const Layout& first = lists_[0].layouts[index];
  bool same = layout.dim == first.dim;
  for (int32_t d = 0; same && d < layout.dim; ++d) same = layout.sizes[d] == first.sizes[d];
  if (!same)
    fail(op_, Name(name, index) + " has shape " + shape_of(layout.sizes, layout.dim) + ", but " +
                  Name(lists_[0].name, index).text() + " has shape " + shape_of(first.sizes, first.dim));
}

int TensorLists::add(const char* name, const TensorList& tensors, bool written) {
  check_count(name, tensors);
  const bool first = lists_.empty();
  List list{name, &tensors, written, false, {}};
  list.layouts.resize(tensors.size());
  if (first) sizes_.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorRef tensor = tensors[i];
    check_device(name, tensors, int64_t(i));
    const auto dtype = storage_dtype(tensor);
    if (!dtype) fail(op_, Name(name, i) + " is not float32, float64, bfloat16 or float16");
    Layout& layout = list.layouts[i];
    layout = layout_of(tensor, *dtype);
    if (first)
      sizes_[i] = tensor.numel();
    else
      check_shape(name, layout, int64_t(i));
    if (!layout.row_major && written && sizes_[i] > 1) // row-major without gaps has no stride 0
      for (int32_t d = 0; d < layout.dim; ++d)
        if (layout.sizes[d] > 1 && layout.strides[d] == 0)
          fail(op_, Name(name, i) + " is expanded: several elements share one place in memory, so it cannot be"
                    " changed in place; clone it");
    all_row_major_ = all_row_major_ && layout.row_major;
  }
  lists_.push_back(std::move(list));
  return int(lists_.size()) - 1;
}

int TensorLists::add_optional(const char* name, const TensorList& tensors) {
  return tensors.empty() ? -1 : add(name, tensors);
}

int TensorLists::add_in_row_major_order(
    const char* name, const TensorList& tensors, int32_t dtype, const char* dtype_name) {
  check_count(name, tensors);
  List list{name, &tensors, false, true, {}};
  list.layouts.resize(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(name, tensors, int64_t(i));
    if (tensors[i].dtype() != dtype) fail(op_, Name(name, i) + " is not " + dtype_name);
    list.layouts[i] = layout_of(tensors[i], Dtype::F32);
    if (!list.layouts[i].row_major) fail(op_, Name(name, i) + " is not contiguous");
  }
  lists_.push_back(std::move(list));
  only_row_major_ = true;
  return int(lists_.size()) - 1;
}

void TensorLists::check_device(const char* name, const TensorList& tensors, int64_t index) {
  const TensorRef tensor = tensors[index];
  if (tensor.device_type() != device_type_)
    fail(op_, Name(name, index) + (on_cpu_ ? " is not on the CPU" : " is not on a CUDA device"));
  if (on_cpu_) return;
  const int32_t device_index = tensor.device_index();
  if (!device_index_) device_index_ = device_index;
  if (device_index != *device_index_)
    fail(op_, Name(name, index) + " is not on the device of " + Name(lists_.empty() ? name : lists_[0].name, 0).text());
}

void TensorLists::require_same_dtype(int a, int b) const {
  for (int64_t i = 0; i < count(); ++i)
    if (dtype(a, i) != dtype(b, i))
      fail(op_, Name(lists_[b].name, i) + " and " + Name(lists_[a].name, i).text() + " must have the same dtype");
}

bool TensorLists::share_dense_layout(int64_t index) const {
  const Layout& first = lists_[0].layouts[index];
  bool all_row_major = true, all_same = true;
  for (const List& list : lists_) {
    if (list.own_shape) continue;
    const Layout& other = list.layouts[index];
    all_row_major = all_row_major && other.row_major;
    all_same = all_same && same_strides(first.dim, first.sizes, first.strides, other.strides);
  }
  return all_row_major || (!only_row_major_ && all_same && dense(first.dim, first.sizes, first.strides));
}

bool row_major(TensorRef tensor) { return is_row_major(tensor.dim(), tensor.sizes(), tensor.strides()); }

ScalarType require_scalar(const char* op, const Name& name, TensorRef tensor) {
  if (tensor.numel() != 1)
    fail(op, name + " must hold one number, but has shape " + shape_of(tensor.sizes(), tensor.dim()));
  const DtypeCodes& known = codes();
  const int32_t code = tensor.dtype();
  if (code == known.f32) return ScalarType::Float;
  if (code == known.f64) return ScalarType::Double;
  if (code == known.i64) return ScalarType::Long;
  if (code == known.i32) return ScalarType::Int;
  if (code == known.bf16) return ScalarType::BFloat16;
  if (code == known.f16) return ScalarType::Half;
  fail(op, name + " must be a float, int32 or int64 tensor");
}

void require_double(const char* op, const Name& name, TensorRef tensor, const char* source) {
  if (tensor.dtype() != codes().f64) fail(op, name + " must be float64, as " + source + " returns it");
  require_scalar(op, name, tensor);
}

double read_scalar(const char* op, const Name& name, TensorRef tensor) {
  if (!tensor.is_cpu()) fail(op, name + " is not on the CPU");
  const ScalarType type = require_scalar(op, name, tensor);
  const void* data = tensor.data_ptr();
  switch (type) {
    case ScalarType::Float: return *static_cast<const float*>(data);
    case ScalarType::Double: return *static_cast<const double*>(data);
    case ScalarType::Long: return double(*static_cast<const int64_t*>(data));
    case ScalarType::Int: return double(*static_cast<const int32_t*>(data));
    case ScalarType::BFloat16: return BF16::widen(*static_cast<const uint16_t*>(data));
    default: return F16::widen(*static_cast<const uint16_t*>(data));
  }
}

double read_double(const char* op, const Name& name, TensorRef tensor, const char* source) {
  require_double(op, name, tensor, source);
  return read_scalar(op, name, tensor);
}

} // namespace sama
