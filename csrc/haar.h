// Checks that the Haar operators make on every device.
#pragma once

#include "tensors.h"

namespace rfsr {

inline HaarEdge edge_of(int64_t mode) {
  STD_TORCH_CHECK(0 <= mode && mode < kHaarModes, "mode must be the number of a mode, 0 to ", kHaarModes - 1, ", got ",
                  mode);
  return haar_edge(mode);
}

// An LL band has its image's dtype, or the one sums are kept in.
inline void check_band(ScalarType band, ScalarType image) {
  STD_TORCH_CHECK(band == image || band == acc_dtype(image),
                  "an LL band must have the dtype of its image or the one its sums are kept in");
}

// `kept` of haar_ll_l1 for images [N, channels, height, width], of which block `mask` of bits is asked for (-1: none).
inline Kept layout_of(const Tensor& kept, int64_t channels, int64_t height, int64_t width, int64_t mask) {
  Kept layout{channels, height, width, 0};
  STD_TORCH_CHECK(channels > 0 && height > 0 && width > 0, "channels, height and width must be at least 1");
  while (layout.masks < 2 && kept.dim() == 2 && layout.sample() < kept.size(1)) ++layout.masks;
  STD_TORCH_CHECK(kept.dim() == 2 && kept.scalar_type() == ScalarType::Byte && kept.is_contiguous() &&
                      kept.size(1) == layout.sample() && -1 <= mask && mask < layout.masks,
                  "kept must be what haar_ll_l1 returned for ", channels, " x ", height, " x ", width);
  return layout;
}

// The gradient of the loss: a scalar, or one number per sample.
inline void check_loss_grad(const Tensor& grad, const Tensor& kept, int64_t reduction, ScalarType image) {
  const bool shaped = reduction == kNone ? grad.dim() == 1 && grad.size(0) == kept.size(0) : grad.dim() == 0;
  STD_TORCH_CHECK(shaped && grad.scalar_type() == acc_dtype(image) &&
                      grad.get_device_index() == kept.get_device_index(),
                  "grad must have the shape and dtype of the loss, and the device of kept");
}

}  // namespace rfsr
