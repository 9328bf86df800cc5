// Haar LL band and its L1 loss on the CPU.
//
//   LL[i,j]  = (x[2i,2j] + x[2i,2j+1] + x[2i+1,2j] + x[2i+1,2j+1]) / 2          (orthonormal Haar)
//   loss     = mean |LL(pred) - LL(target)| = mean |LL(pred - target)|          (arXiv 2412.03268, eq. 2)
//   backward : grad[r,c] = sum of weight * v[i,j] over the coefficients (i,j) that pixel (r,c) is part of,
//              v = gradient of the coefficient: one coefficient, but up to three a side at an odd end
//
// What stands in for the missing sample at an odd end is the mode's rule in csrc/index.h. With an input range
// [low, high] pixels are clamped on the way in, and the loss is that of (x - low) / (high - low).
//
// Per input pixel, s = bytes per element:
//   haar_ll          reads s, writes s/4;      1 FLOP
//   loss             reads 2s, writes 1/16 B (signs, only if a gradient is wanted);   about 2.5 FLOP
//                    with a range also 1/8 B for each input whose gradient is wanted: was it clamped?
//   loss backward    reads 1/16 B (range: 3/16 B), writes s;   no arithmetic but the scaling
// All of it is bound by memory: on a desktop's 40 GB/s an 8x3x512x512 fp32 pair (50 MB) takes 1.3 ms
// at least. Keeping a bit per pixel costs 1/32 (fp32) of reading the input again in backward, and the input
// need not be kept alive.
//
// How: a row of pairs is computed tile by tile, in passes that a compiler turns into vector code (haar_rows.h). LL is
// in haar_transform.h, the loss in haar_l1.h, both gradients in haar_backward.h. The loss of pixels side by side is
// written for AVX-512 as well, one pass that holds everything between two images and their signs in
// registers: the other way it is the passes, not the memory, that half types wait for.
//
// Deterministic: every output is written by one thread. The loss adds rows of a sample in groups whose size
// depends on the shape alone, within a group in a fixed order of lanes, and adds groups and samples in index
// order in fp64, so the bits do not depend on the number of threads.
//
// Limits: one level (rfsr_ext/ops/haar.py repeats it); gradients come out contiguous whatever the input's layout.

#include "haar_backward.h"
#include "haar_l1.h"
#include "haar_transform.h"

namespace rfsr {
namespace {

// ----------------------------------------------------------------------------------- operators
// Schemas and their meaning: rfsr_ext/ops/haar.py.

Tensor haar_ll(const Tensor& x, int64_t mode, ScalarType dtype) {
  const Strided4 v = view4(x, "x");
  const HaarEdge edge = edge_of(mode);
  check_band(dtype, x.scalar_type());
  Tensor out = torch::stable::new_empty(x, {v.n, v.c, haar_size(v.h), haar_size(v.w)}, dtype);
  dispatch(x.scalar_type(), "x", [&](auto t) {
    using T = decltype(t);
    if (dtype == x.scalar_type())
      ll_kernel(data<T>(x), v, edge, mutable_data<T>(out));
    else
      ll_kernel(data<T>(x), v, edge, mutable_data<acc_t<T>>(out));
  });
  return out;
}

Tensor haar_ll_backward(const Tensor& grad, int64_t mode, int64_t height, int64_t width, ScalarType dtype) {
  const Strided4 v = view4(grad, "grad");
  const HaarEdge edge = edge_of(mode);
  check_band(grad.scalar_type(), dtype);
  STD_TORCH_CHECK(v.h == haar_size(height) && v.w == haar_size(width), "grad must be the gradient of an LL band of ",
                  height, " x ", width);
  Tensor out = torch::stable::new_empty(grad, {v.n, v.c, height, width}, dtype);
  dispatch(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    if (dtype == grad.scalar_type())
      spread(mutable_data<T>(out), v.n, v.c, height, width, edge, Band<T, T>{data<T>(grad), v});
    else
      spread(mutable_data<T>(out), v.n, v.c, height, width, edge, Band<T, Acc>{data<Acc>(grad), v});
  });
  return out;
}

std::tuple<Tensor, Tensor> haar_ll_l1(const Tensor& pred, const Tensor& target, int64_t mode, double low, double high,
                                      int64_t reduction, bool pred_grad, bool target_grad) {
  const Strided4 vx = view4(pred, "pred"), vy = view4(target, "target");
  check_alike(pred, target, "target");
  const HaarEdge edge = edge_of(mode);
  const bool ranged = low != high, keep = pred_grad || target_grad;
  const Kept layout{vx.c, vx.h, vx.w, ranged ? pred_grad + target_grad : 0};
  Tensor loss = reduction == kNone ? torch::stable::new_empty(pred, {vx.n}, acc_dtype(pred.scalar_type()))
                                   : torch::stable::new_empty(pred, {}, acc_dtype(pred.scalar_type()));
  Tensor kept = torch::stable::new_empty(pred, {vx.n, keep ? layout.sample() : 0}, ScalarType::Byte);
  dispatch(pred.scalar_type(), "pred", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    const auto range = range_of<Acc>(low, high);
    uint8_t* bits = keep ? mutable_data<uint8_t>(kept) : nullptr;
    const Input<T> x{data<T>(pred), vx, range, pred_grad ? bits : nullptr, layout, 0};
    const Input<T> y{data<T>(target), vy, range, target_grad ? bits : nullptr, layout, pred_grad};
    std::vector<double> sums(static_cast<size_t>(vx.n));
    l1_kernel(x, y, edge, bits, layout, sums);
    const i64 coefficients = vx.c * haar_size(vx.h) * haar_size(vx.w);
    const double factor = range_factor(low, high) / 2;
    const double over = static_cast<double>(divisor(reduction, vx.n, coefficients));
    Acc* out = mutable_data<Acc>(loss);
    if (reduction == kNone) {
      for (double sum : sums) *out++ = static_cast<Acc>(sum * factor / over);
    } else {
      double total = 0;
      for (double sum : sums) total += sum;
      *out = static_cast<Acc>(total * factor / over);
    }
  });
  return {loss, kept};
}

Tensor haar_ll_l1_backward(const Tensor& grad, const Tensor& kept, int64_t mode, double low, double high,
                           int64_t reduction, int64_t channels, int64_t height, int64_t width, ScalarType dtype,
                           int64_t mask) {
  const HaarEdge edge = edge_of(mode);
  const Kept layout = layout_of(kept, channels, height, width, mask);
  check_loss_grad(grad, kept, reduction, dtype);
  Tensor out = torch::stable::new_empty(kept, {kept.size(0), channels, height, width}, dtype);
  dispatch(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    // An empty batch has no coefficient to share the gradient between, and no pixel to write either.
    const i64 coefficients = channels * haar_size(height) * haar_size(width);
    const double over = 2 * static_cast<double>(divisor(reduction, max(1, kept.size(0)), coefficients));
    const Acc factor = static_cast<Acc>(range_factor(low, high) / over);
    Signs<T> source{data<uint8_t>(kept), layout, static_cast<int>(mask), data<Acc>(grad),
                    reduction == kNone ? grad.stride(0) : 0, factor};
    spread(mutable_data<T>(out), kept.size(0), channels, height, width, edge, source);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfsr_ext, CPU, m) {
  m.impl("haar_ll", TORCH_BOX(&haar_ll));
  m.impl("haar_ll_backward", TORCH_BOX(&haar_ll_backward));
  m.impl("haar_ll_l1", TORCH_BOX(&haar_ll_l1));
  m.impl("haar_ll_l1_backward", TORCH_BOX(&haar_ll_l1_backward));
}

}  // namespace rfsr
