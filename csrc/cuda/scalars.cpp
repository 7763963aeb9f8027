#include "scalars.h"

namespace sama {
namespace {

using torch::headeronly::ScalarType;

ScalarKind kind_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return ScalarKind::F32;
    case ScalarType::Double: return ScalarKind::F64;
    case ScalarType::BFloat16: return ScalarKind::BF16;
    case ScalarType::Half: return ScalarKind::F16;
    case ScalarType::Int: return ScalarKind::I32;
    default: return ScalarKind::I64; // `require_scalar` has let nothing else through
  }
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

} // namespace

Scalar scalar(const char* op, const std::string& name, const Tensor& tensor, const Tensor& like) {
  require_scalar(op, name, tensor);
  if (on_host(tensor)) return scalar(read_scalar(op, name, tensor));
  if (!same_device(tensor, like)) fail(op, name + " is neither on the CPU nor on the device of the other tensors");
  Scalar result;
  result.address = tensor.data_ptr();
  result.kind = kind_of(tensor.scalar_type());
  return result;
}

double* device_double(
    const char* op, const std::string& name, const Tensor& tensor, const char* source, const Tensor& like) {
  require_double(op, name, tensor, source);
  if (!same_device(tensor, like)) fail(op, name + " is not on the device of the other tensors");
  return static_cast<double*>(tensor.data_ptr());
}

} // namespace sama
