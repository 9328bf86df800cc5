// Haar LL band and its L1 loss on CUDA; formulas as in csrc/cpu/haar.cpp.
//
//   LL[i,j]  = (x[2i,2j] + x[2i,2j+1] + x[2i+1,2j] + x[2i+1,2j+1]) / 2
//   loss     = mean |LL(pred) - LL(target)|                                     (arXiv 2412.03268, eq. 2)
//   backward : grad[r,c] = weight(r) * weight(c) * v[r/2, c/2]
//
// Per input pixel, s = bytes per element:
//   haar_ll          reads s, writes s/4;      1 FLOP
//   loss             reads 2s, writes 1/16 B (signs, only if a gradient is wanted);   about 2.5 FLOP
//   loss backward    reads 1/16 B, writes s
// Memory-bound throughout. At 4.3 TB/s (H200) an 8x3x1024x1024 fp32 pair (201 MB) takes 47 us forward and
// 24 us backward at least.
//
// Deterministic: no atomics. Every output has one writer; the loss is summed per thread in index order, per
// block in a fixed tree in fp64, and over blocks by one block in a fixed tree. The number of blocks follows
// from the shape alone, so the GPU's size does not matter.
//
// First version, for correctness: scalar loads, a thread per coefficient or pixel (per byte of signs in the loss),
// two launches for the loss. Not run on a GPU yet; the tests run these lines on the host (tests/ops/cuda_on_host).
// Limits: one level, symmetric extension; gradients come out contiguous.

#include "sums.cuh"

namespace rfsr {
namespace {

// The four samples of a coefficient; a missing one repeats its neighbour.
template <class Acc, class T>
__device__ Acc block_of_four(const T* x, const Strided4& v, i64 n, i64 c, i64 i, i64 j, Acc* samples) {
  const i64 down = haar_second(i, v.h), right = haar_second(j, v.w);
  samples[0] = static_cast<Acc>(x[v.at(n, c, 2 * i, 2 * j)]);
  samples[1] = static_cast<Acc>(x[v.at(n, c, down, 2 * j)]);
  samples[2] = static_cast<Acc>(x[v.at(n, c, 2 * i, right)]);
  samples[3] = static_cast<Acc>(x[v.at(n, c, down, right)]);
  return (samples[0] + samples[1]) + (samples[2] + samples[3]);
}

template <class T>
__global__ void haar_ll_kernel(const T* x,  // [N, C, H, W], any strides
                               Strided4 v,
                               T* out) {  // [N, C, h, w]
  using Acc = acc_t<T>;
  const i64 h = haar_size(v.h), w = haar_size(v.w);
  RFSR_GRID_LOOP(k, v.n * v.c * h * w) {
    const i64 j = k % w, i = k / w % h, plane = k / w / h;
    Acc samples[4];
    out[k] = static_cast<T>(block_of_four(x, v, plane / v.c, plane % v.c, i, j, samples) * Acc(0.5));
  }
}

template <class T>
__global__ void haar_ll_l1_kernel(const T* x, Strided4 vx,  // [N, C, H, W], any strides
                                  const T* y, Strided4 vy,  // the same sizes, other strides
                                  uint8_t* signs,           // [N, C, h, ceil(w/4)] or null
                                  double* partials) {       // [gridDim.x]
  using Acc = acc_t<T>;
  const i64 h = haar_size(vx.h), w = haar_size(vx.w), bytes = ceil_div(w, kCodesPerByte);
  double sum = 0;
  RFSR_GRID_LOOP(k, vx.n * vx.c * h * bytes) {
    const i64 first = k % bytes * kCodesPerByte, i = k / bytes % h, plane = k / bytes / h;
    uint8_t byte = 0;
    for (int q = 0; q < kCodesPerByte; ++q) {
      if (first + q >= w) break;
      Acc a[4], b[4];
      block_of_four(x, vx, plane / vx.c, plane % vx.c, i, first + q, a);
      block_of_four(y, vy, plane / vx.c, plane % vx.c, i, first + q, b);
      // Differences come first: close images cancel exactly.
      const Acc d = ((a[0] - b[0]) + (a[1] - b[1])) + ((a[2] - b[2]) + (a[3] - b[3]));
      sum += static_cast<double>(fabs(d));
      byte |= static_cast<uint8_t>(sign_code(d) << (2 * q));
    }
    if (signs) signs[k] = byte;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum / 2;
}

// Each pixel gathers the one coefficient it belongs to.
template <class T>
__global__ void haar_ll_backward_kernel(const T* grad, Strided4 v,  // [N, C, h, w], any strides
                                        T* out, i64 height, i64 width) {
  using Acc = acc_t<T>;
  RFSR_GRID_LOOP(k, v.n * v.c * height * width) {
    const i64 c = k % width, r = k / width % height, plane = k / width / height;
    const Acc weight = static_cast<Acc>(haar_weight(r, height) * haar_weight(c, width));
    out[k] = static_cast<T>(static_cast<Acc>(grad[v.at(plane / v.c, plane % v.c, r / 2, c / 2)]) * Acc(0.5) * weight);
  }
}

template <class T>
__global__ void haar_ll_l1_backward_kernel(const acc_t<T>* grad,  // scalar
                                           const uint8_t* signs,  // [planes, h, ceil(w/4)]
                                           T* out,                // [planes, height, width]
                                           i64 planes, i64 height, i64 width) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(height), w = haar_size(width), bytes = ceil_div(w, kCodesPerByte);
  const Acc g = *grad / static_cast<Acc>(2 * planes * h * w);
  RFSR_GRID_LOOP(k, planes * height * width) {
    const i64 c = k % width, r = k / width % height, plane = k / width / height;
    const Acc weight = static_cast<Acc>(haar_weight(r, height) * haar_weight(c, width));
    out[k] = static_cast<T>(signed_value(code_at(signs + (plane * h + r / 2) * bytes, c / 2), g) * weight);
  }
}

Tensor haar_ll(const Tensor& x) {
  const Strided4 v = view4(x, "x");
  Tensor out = torch::stable::new_empty(x, {v.n, v.c, haar_size(v.h), haar_size(v.w)}, x.scalar_type());
  if (out.numel() == 0) return out;
  const OnDevice stream(x);
  dispatch(x.scalar_type(), "x", [&](auto t) {
    using T = decltype(t);
    launch("haar_ll_kernel", haar_ll_kernel<T>, blocks_for(out.numel()), stream, data<T>(x), v, mutable_data<T>(out));
  });
  return out;
}

Tensor haar_ll_backward(const Tensor& grad, int64_t height, int64_t width) {
  const Strided4 v = view4(grad, "grad");
  STD_TORCH_CHECK(v.h == haar_size(height) && v.w == haar_size(width), "grad must be the gradient of an LL band of ",
                  height, " x ", width);
  Tensor out = torch::stable::new_empty(grad, {v.n, v.c, height, width}, grad.scalar_type());
  if (out.numel() == 0) return out;
  const OnDevice stream(grad);
  dispatch(grad.scalar_type(), "grad", [&](auto t) {
    using T = decltype(t);
    launch("haar_ll_backward_kernel", haar_ll_backward_kernel<T>, blocks_for(out.numel()), stream, data<T>(grad), v,
           mutable_data<T>(out), height, width);
  });
  return out;
}

std::tuple<Tensor, Tensor> haar_ll_l1(const Tensor& pred, const Tensor& target, bool keep_signs) {
  const Strided4 vx = view4(pred, "pred"), vy = view4(target, "target");
  check_alike(pred, target, "target");
  const i64 h = haar_size(vx.h), w = haar_size(vx.w), bytes = ceil_div(w, kCodesPerByte);
  const OnDevice stream(pred);
  const unsigned blocks = summing_blocks(vx.n * vx.c * h * bytes, 1);
  Tensor loss = torch::stable::new_empty(pred, {}, acc_dtype(pred.scalar_type()));
  Tensor partials = torch::stable::new_empty(pred, {blocks}, ScalarType::Double);
  Tensor signs = keep_signs ? torch::stable::new_empty(pred, {vx.n, vx.c, h, bytes}, ScalarType::Byte)
                            : torch::stable::new_empty(pred, {0}, ScalarType::Byte);
  dispatch(pred.scalar_type(), "pred", [&](auto t) {
    using T = decltype(t);
    launch("haar_ll_l1_kernel", haar_ll_l1_kernel<T>, blocks, stream, data<T>(pred), vx, data<T>(target), vy,
           keep_signs ? mutable_data<uint8_t>(signs) : nullptr, mutable_data<double>(partials));
    finish_sum(partials, static_cast<double>(vx.n * vx.c * h * w), mutable_data<acc_t<T>>(loss), stream);
  });
  return {loss, signs};
}

Tensor haar_ll_l1_backward(const Tensor& grad, const Tensor& signs, int64_t height, int64_t width, ScalarType dtype) {
  const i64 n = signs.size(0), c = signs.size(1);
  STD_TORCH_CHECK(signs.is_contiguous() && signs.size(2) == haar_size(height) &&
                      signs.size(3) == ceil_div(haar_size(width), kCodesPerByte),
                  "signs must be what haar_ll_l1 returned for ", height, " x ", width);
  STD_TORCH_CHECK(on_gpu(grad) && grad.scalar_type() == acc_dtype(dtype), "grad must have the dtype of the loss");
  Tensor out = torch::stable::new_empty(signs, {n, c, height, width}, dtype);
  if (out.numel() == 0) return out;
  const OnDevice stream(signs);
  dispatch(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    launch("haar_ll_l1_backward_kernel", haar_ll_l1_backward_kernel<T>, blocks_for(out.numel()), stream,
           data<acc_t<T>>(grad), data<uint8_t>(signs), mutable_data<T>(out), n * c, height, width);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfsr_ext, CUDA, m) {
  m.impl("haar_ll", TORCH_BOX(&haar_ll));
  m.impl("haar_ll_backward", TORCH_BOX(&haar_ll_backward));
  m.impl("haar_ll_l1", TORCH_BOX(&haar_ll_l1));
  m.impl("haar_ll_l1_backward", TORCH_BOX(&haar_ll_l1_backward));
}

}  // namespace rfsr
