// What both devices need from the LibTorch stable ABI: views of tensors and dispatch over dtypes.
//
// Only torch/csrc/stable and torch/headeronly are included. TORCH_TARGET_VERSION (set by setup.py)
// hides whatever is newer than torch 2.11, so a library built against any newer torch still loads there.
// Shapes, dtypes and devices are checked in Python, where the error can be a ValueError or TypeError
// and torch.compile can see it; the checks here only stop a wrong direct call of torch.ops.rfsr_ext.*
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "index.h"

namespace rfsr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Type that sums are kept in: fp64 stays fp64, everything else is fp32.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_dtype(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Calls body(T{}) with the element type of a floating-point dtype.
template <class Body>
void dispatch(ScalarType dtype, const char* name, Body&& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16");
  }
}

inline Strided4 view4(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must have 4 dimensions [N, C, H, W], got ", x.dim());
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, name, " must have C, H and W of at least 1");
  return {x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

inline void check_alike(const Tensor& a, const Tensor& b, const char* name) {
  bool same = a.scalar_type() == b.scalar_type() && a.get_device_index() == b.get_device_index() && a.dim() == b.dim();
  for (i64 d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and device of the tensor it is compared with");
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace rfsr
