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

bool same_device(TensorRef a, TensorRef b) {
  return a.device_type() == b.device_type() && a.device_index() == b.device_index();
}

} // namespace

Scalar scalar(const char* op, const Name& name, TensorRef tensor, TensorRef like) {
  if (on_host(tensor)) return scalar(read_scalar(op, name, tensor));
  const ScalarType type = require_scalar(op, name, tensor);
  if (!same_device(tensor, like)) fail(op, name + " is neither on the CPU nor on the device of the other tensors");
  Scalar result;
  result.address = tensor.data_ptr();
  result.kind = kind_of(type);
  return result;
}

double* device_double(
    const char* op, const Name& name, TensorRef tensor, const char* source, TensorRef like) {
  require_double(op, name, tensor, source);
  if (!same_device(tensor, like)) fail(op, name + " is not on the device of the other tensors");
  return static_cast<double*>(tensor.data_ptr());
}

} // namespace sama
