// Scalar arguments that are tensors: a value where the tensor is on the CPU, else an address that the kernel reads.
#pragma once

#include <string>

#include "runtime.h"

namespace sama {

enum class ScalarKind : uint8_t { Value, F32, F64, BF16, F16, I32, I64 };

struct Scalar {
  union {
    double value;
    const void* address;
  };
  ScalarKind kind;
};

SAMA_BOTH inline Scalar scalar(double value) {
  Scalar result;
  result.value = value;
  result.kind = ScalarKind::Value;
  return result;
}

__device__ inline double read(const Scalar& scalar) {
  switch (scalar.kind) {
    case ScalarKind::F32: return *static_cast<const float*>(scalar.address);
    case ScalarKind::F64: return *static_cast<const double*>(scalar.address);
    case ScalarKind::BF16: return BF16::widen(*static_cast<const uint16_t*>(scalar.address));
    case ScalarKind::F16: return F16::widen(*static_cast<const uint16_t*>(scalar.address));
    case ScalarKind::I32: return double(*static_cast<const int32_t*>(scalar.address));
    case ScalarKind::I64: return double(*static_cast<const int64_t*>(scalar.address));
    default: return scalar.value;
  }
}

// Checks and wraps a tensor that holds one number, on the CPU or on the device of `like`.
Scalar scalar(const char* op, const Name& name, TensorRef tensor, TensorRef like);
// The same, but float64 and on the device of `like`: the result of the op named `source`. Returns its address.
double* device_double(
    const char* op, const Name& name, TensorRef tensor, const char* source, TensorRef like);

} // namespace sama
