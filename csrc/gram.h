// What the Gram operators share on every device: their criteria, and the checks of a direct call.
#pragma once

#include <initializer_list>
#include <optional>

#include "tensors.h"

namespace rfsr {

// In the order of CRITERIA in rfsr_ext/ops/reference.py: sum D^2, sum |D|, sqrt(sum D^2) of each sample.
enum Criterion : i64 { kL2, kL1, kFro };

RFSR_HD double criterion_term(i64 criterion, double d) { return criterion == kL1 ? fabs(d) : d * d; }
RFSR_HD double criterion_value(i64 criterion, double sum) { return criterion == kFro ? sqrt(sum) : sum; }

inline void check_criterion(int64_t criterion) {
  STD_TORCH_CHECK(kL2 <= criterion && criterion <= kFro, "criterion must be 0 (l2), 1 (l1) or 2 (fro), got ",
                  criterion);
}

// A small tensor that belongs to `features`: on its device, in its accumulation dtype, with these sizes.
inline void check_per_sample(const std::optional<Tensor>& x, const Tensor& features, const char* name,
                             std::initializer_list<int64_t> sizes) {
  if (!x) return;
  bool fits = x->scalar_type() == acc_dtype(features.scalar_type()) &&
              x->get_device_index() == features.get_device_index() &&
              x->dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && x->size(d++) == size;
  STD_TORCH_CHECK(fits, name, " must have the shape, device and accumulation dtype that fit features");
}

}  // namespace rfsr
