// central_difference: the meta gradient from the two perturbed passes. See sama_kernels/ops/central_difference.py.
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "chunks.h"
#include "tiles.h"

namespace sama {
namespace {

// `use_difference`: epsilon is not 0. `extra`: explicit gradients or nullptr.
template <class T>
SAMA_CLONES void difference_loop(
    int64_t n, T factor, bool use_difference, const T* plus, const T* minus, const T* extra, T* out) {
  const T zero = 0;
  if (!use_difference) {
    for (int64_t i = 0; i < n; ++i) out[i] = extra ? extra[i] : zero;
  } else if (extra) {
    SAMA_IVDEP
    for (int64_t i = 0; i < n; ++i) out[i] = (plus[i] - minus[i]) * factor + extra[i];
  } else {
    SAMA_IVDEP
    for (int64_t i = 0; i < n; ++i) out[i] = (plus[i] - minus[i]) * factor;
  }
}

template <class T>
void difference_segment(
    const Segment& at, double epsilon, const View& plus, const View& minus, const View* extra) {
  const T factor = T(-0.5 / epsilon);
  Tile<T> a, b, c, out;
  for_each_tile(at.start, at.length, [&](int64_t start, int64_t n) {
    difference_loop<T>(n, factor, epsilon != 0.0, a.load(plus, start, n), b.load(minus, start, n),
                       extra ? c.load(*extra, start, n) : nullptr, out.target(plus, start));
    out.store(plus, start, n);
  });
}

} // namespace

void central_difference(
    const TensorList& grads_plus, const TensorList& grads_minus, const TensorList& explicit_grads,
    const Tensor& epsilon, const Tensor& norm) {
  const char* op = "central_difference";
  Operands operands(op);
  const int plus = operands.add("grads_plus", grads_plus, /*written=*/true);
  const int minus = operands.add("grads_minus", grads_minus);
  const int extra = operands.add_optional("explicit", explicit_grads);
  operands.finish();
  const double step = read_double(op, "epsilon", epsilon, "step_size");
  const bool use_extra = extra >= 0 && std::isfinite(read_double(op, "norm", norm, "step_size"));
  Chunks(operands).for_each([&](int64_t, const Segment& at) {
    const View& a = operands.view(plus, at.tensor);
    const View& b = operands.view(minus, at.tensor);
    const View* c = use_extra ? &operands.view(extra, at.tensor) : nullptr;
    if (a.dtype == Dtype::F64)
      difference_segment<double>(at, step, a, b, c);
    else
      difference_segment<float>(at, step, a, b, c);
  });
}

} // namespace sama

STABLE_TORCH_LIBRARY_IMPL(sama, CPU, m) {
  m.impl("central_difference", TORCH_BOX(&sama::central_difference));
}
