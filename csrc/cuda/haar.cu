// Haar LL band and its L1 loss on CUDA; formulas as in csrc/cpu/haar.cpp.
//
//   LL[i,j]  = (x[2i,2j] + x[2i,2j+1] + x[2i+1,2j] + x[2i+1,2j+1]) / 2
//   loss     = mean |LL(pred) - LL(target)|                                     (arXiv 2412.03268, eq. 2)
//   backward : grad[r,c] = sum of weight * v[i,j] over the coefficients (i,j) that pixel (r,c) is part of
//
// Per input pixel, s = bytes per element:
//   haar_ll          reads s, writes s/4;      1 FLOP
//   loss             reads 2s, writes 1/16 B (signs, only if a gradient is wanted);   about 2.5 FLOP
//                    with an input range also 1/8 B for each input whose gradient is wanted: was it clamped?
//   loss backward    reads 1/16 B (range: 3/16 B), writes s
// Memory-bound throughout. At the 4.3 TB/s that a copy reaches on an H200 (4.8 on its data sheet) an 8x3x1024x1024
// fp32 pair (201 MB) takes 47 us forward and 24 us backward at least.
//
// Deterministic: no atomics. Every output has one writer; the loss is summed per thread in index order, per
// block in a fixed tree in fp64, and over blocks by one block in a fixed tree. The number of blocks follows
// from the shape alone, so the GPU's size does not matter.
//
// In the loss a thread takes the eight pixels of two rows that one byte of signs stands for; where rows are
// contiguous and aligned it loads 16 bytes at a time, and the gradients are stored so. haar_ll is scalar: a
// thread per coefficient. The loss takes two launches. Not run on a GPU yet; the tests run these lines on the
// host (tests/ops/cuda_on_host).
// Limits: one level (rfsr_ext/ops/haar.py repeats it); gradients come out contiguous.

#include "../haar.h"
#include "packs.cuh"
#include "sums.cuh"

namespace rfsr {
namespace {

// ------------------------------------------------------------------------------------- forward

// Weighted sum of pixel(r, c) over a pair of rows and a pair of columns.
template <class Acc, class Pixel>
__device__ Acc sum_pairs(const Pixel& pixel, const HaarTerms& rows, const HaarTerms& columns) {
  Acc sum = 0;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
#pragma unroll
    for (int t = 0; t < 3; ++t) {
      if (rows.has(s) && columns.has(t))
        sum += static_cast<Acc>(rows.weight[s] * columns.weight[t]) * pixel(rows.index[s], columns.index[t]);
    }
  }
  return sum;
}

template <class T>
struct Plane {
  using Acc = acc_t<T>;
  const T* x;  // [H, W] of one sample and channel
  i64 sh, sw;
  __device__ Acc operator()(i64 r, i64 c) const { return static_cast<Acc>(x[r * sh + c * sw]); }
};

template <class T>
__device__ Plane<T> plane_of(const T* x, const Strided4& v, i64 n, i64 c) {
  return {x + v.at(n, c, 0, 0), v.sh, v.sw};
}

template <class T, class Out>
__global__ void haar_ll_kernel(const T* x, Strided4 v,  // [N, C, H, W], any strides
                               HaarEdge edge,
                               Out* out) {  // [N, C, h, w]
  using Acc = acc_t<T>;
  const i64 h = haar_size(v.h), w = haar_size(v.w);
  RFSR_GRID_LOOP(k, v.n * v.c * h * w) {
    const i64 j = k % w, i = k / w % h, plane = k / w / h;
    const Acc sum = sum_pairs<Acc>(plane_of(x, v, plane / v.c, plane % v.c), haar_pair(i, v.h, edge),
                                   haar_pair(j, v.w, edge));
    out[k] = static_cast<Out>(sum * Acc(0.5));
  }
}

// An image of the loss, clamped, and where the bits of the pixels that are not clamped go.
template <class T>
struct Input {
  using Acc = acc_t<T>;
  const T* x;     // [N, C, H, W], any strides
  Strided4 v;
  bool packs;     // rows_of_packs
  Range<Acc> range;
  uint8_t* kept;  // null: no bits
  int mask;       // which block of bits

  // Eight pixels from column 8m on; zeros beyond the end. Writes their byte of bits.
  __device__ void load(const Kept& layout, i64 n, i64 c, i64 r, i64 m, Acc* out) const {
    const i64 count = r < v.h ? min(8, v.w - 8 * m) : 0;
    const T* row = x + v.at(n, c, r, 8 * m);
    Pack<T, 8> pack;
    if (packs && count == 8) {
      pack = *reinterpret_cast<const Pack<T, 8>*>(row);
    } else {
#pragma unroll
      for (int q = 0; q < 8; ++q) pack.v[q] = q < count ? row[q * v.sw] : T(0);
    }
    int byte = 0;
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const Acc value = static_cast<Acc>(pack.v[q]);
      byte |= (q < count && range.inside(value)) << q;
      out[q] = range.active ? range.clamped(value) : value;
    }
    if (kept && count > 0) kept[layout.mask_row(mask, n, c, r) + m] = static_cast<uint8_t>(byte);
  }
};

// pred - target at a pixel, both clamped.
template <class T>
struct Difference {
  using Acc = acc_t<T>;
  Plane<T> a, b;
  Range<Acc> range;
  __device__ Acc operator()(i64 r, i64 c) const {
    return range.active ? range.clamped(a(r, c)) - range.clamped(b(r, c)) : a(r, c) - b(r, c);
  }
};

template <class T>
__global__ void haar_ll_l1_kernel(Input<T> x, Input<T> y, HaarEdge edge, Kept layout,
                                  uint8_t* kept,       // signs and bits of N samples, or null
                                  unsigned blocks,     // per sample
                                  double* partials) {  // [N, blocks]
  using Acc = acc_t<T>;
  const Strided4& v = x.v;
  const i64 h = haar_size(v.h), w = haar_size(v.w), bytes = layout.sign_bytes(), n = blockIdx.x / blocks;
  double sum = 0;
  for (i64 k = i64(blockIdx.x % blocks) * kThreads + threadIdx.x; k < v.c * h * bytes; k += i64(blocks) * kThreads) {
    const i64 m = k % bytes, i = k / bytes % h, c = k / bytes / h;
    Acc a[8], b[8], p[8], q[8], d[4];
    x.load(layout, n, c, 2 * i, m, a);
    x.load(layout, n, c, 2 * i + 1, m, b);
    y.load(layout, n, c, 2 * i, m, p);
    y.load(layout, n, c, 2 * i + 1, m, q);
    // Differences come first: close images cancel exactly.
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int l = 2 * t, r = 2 * t + 1;
      d[t] = ((a[l] - p[l]) + (b[l] - q[l])) + ((a[r] - p[r]) + (b[r] - q[r]));
    }
    if (2 * i + 1 == v.h || 8 * m + 8 > v.w) {  // an odd end, or beyond it
      const Difference<T> difference{plane_of(x.x, x.v, n, c), plane_of(y.x, y.v, n, c), x.range};
      const HaarTerms rows = haar_pair(i, v.h, edge);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const i64 j = 4 * m + t;
        d[t] = j < w ? sum_pairs<Acc>(difference, rows, haar_pair(j, v.w, edge)) : Acc(0);
      }
    }
    uint8_t byte = 0;
    Acc magnitude = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      magnitude += fabs(d[t]);
      byte |= static_cast<uint8_t>(sign_code(d[t]) << (2 * t));
    }
    sum += static_cast<double>(magnitude);
    if (kept) kept[layout.sign_row(n, c, i) + m] = byte;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// ------------------------------------------------------------------------------------ backward

// Gradients of coefficients: given as a tensor ...
template <class G>
struct BandGradient {
  using Acc = acc_t<G>;
  const G* grad;  // [N, C, h, w], any strides
  Strided4 v;
  __device__ Acc operator()(i64 n, i64 c, i64 i, i64 j) const {
    return static_cast<Acc>(grad[v.at(n, c, i, j)]) * Acc(0.5);
  }
};

// ... or as the signs of the loss.
template <class Acc>
struct SignGradient {
  const Acc* grad;  // scalar (stride 0) or [N]
  i64 stride;
  Acc factor;
  const uint8_t* kept;
  Kept layout;
  __device__ Acc operator()(i64 n, i64 c, i64 i, i64 j) const {
    return signed_value(code_at(kept + layout.sign_row(n, c, i), j), grad[n * stride] * factor);
  }
};

// A thread writes 16 bytes of the two rows of a row pair; each pixel gathers the coefficients it is part of.
template <class T, class Coefficient>
__global__ void spread_kernel(Coefficient coefficient, HaarEdge edge, i64 samples, Kept layout,
                              const uint8_t* kept, int mask,  // bits of the pixels that were not clamped, or null
                              T* out) {                       // [N, C, H, W]
  using Acc = acc_t<T>;
  constexpr int kPixels = 16 / sizeof(T);
  const i64 channels = layout.channels, height = layout.height, width = layout.width;
  const i64 h = haar_size(height), packs = ceil_div(width, kPixels);
  RFSR_GRID_LOOP(k, samples * channels * h * packs) {
    const i64 row_pair = k / packs, plane = row_pair / h, n = plane / channels;
    const i64 start = (k - row_pair * packs) * kPixels, i = row_pair - plane * h, c = plane - n * channels;
    const auto v = [&](i64 row, i64 column) { return coefficient(n, c, row, column); };
    // Away from odd ends, and from what they reach, four pixels belong to one coefficient and to no other.
    const bool inner = (height % 2 == 0 || (i > 0 && 2 * i + 3 < height)) &&
                       (width % 2 == 0 || (start > 0 && start + kPixels + 1 < width));
    Pack<T, kPixels> pack;
    if (inner) {
#pragma unroll
      for (int q = 0; q < kPixels; q += 2)
        if (start + q < width) pack.v[q] = pack.v[q + 1] = static_cast<T>(v(i, start / 2 + q / 2));
    }
    for (i64 r = 2 * i; r < min(2 * i + 2, height); ++r) {
      Pack<T, kPixels> result = pack;
      const uint8_t* bits = kept ? kept + layout.mask_row(mask, n, c, r) : nullptr;
#pragma unroll
      for (int q = 0; q < kPixels; ++q) {
        if (start + q >= width) continue;
        if (!inner)
          result.v[q] = static_cast<T>(
              sum_pairs<Acc>(v, haar_users(r, height, edge), haar_users(start + q, width, edge)));
        if (bits && !bit_at(bits, start + q)) result.v[q] = T(0);
      }
      T* row = out + (plane * height + r) * width + start;
      if (width % kPixels == 0) {
        *reinterpret_cast<Pack<T, kPixels>*>(row) = result;
      } else {
#pragma unroll
        for (int q = 0; q < kPixels; ++q)
          if (start + q < width) row[q] = result.v[q];
      }
    }
  }
}

template <class T, class Coefficient>
void spread(const char* name, const Coefficient& coefficient, HaarEdge edge, const Kept& layout, const uint8_t* kept,
            int mask, const Tensor& out, cudaStream_t stream) {
  const i64 samples = out.size(0), packs = ceil_div(layout.width, 16 / i64(sizeof(T)));
  launch(name, spread_kernel<T, Coefficient>, blocks_for(samples * layout.channels * haar_size(layout.height) * packs),
         stream, coefficient, edge, samples, layout, kept, mask, mutable_data<T>(out));
}

// ----------------------------------------------------------------------------------- operators
// Schemas and their meaning: rfsr_ext/ops/haar.py.

Tensor haar_ll(const Tensor& x, int64_t mode, ScalarType dtype) {
  const Strided4 v = view4(x, "x");
  const HaarEdge edge = edge_of(mode);
  check_band(dtype, x.scalar_type());
  Tensor out = torch::stable::new_empty(x, {v.n, v.c, haar_size(v.h), haar_size(v.w)}, dtype);
  if (out.numel() == 0) return out;
  const OnDevice stream(x);
  dispatch(x.scalar_type(), "x", [&](auto t) {
    using T = decltype(t);
    const auto run = [&](auto* band) {
      launch("haar_ll_kernel", haar_ll_kernel<T, std::decay_t<decltype(*band)>>, blocks_for(out.numel()), stream,
             data<T>(x), v, edge, band);
    };
    if (dtype == x.scalar_type())
      run(mutable_data<T>(out));
    else
      run(mutable_data<acc_t<T>>(out));
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
  if (out.numel() == 0) return out;
  const OnDevice stream(grad);
  const Kept layout{v.c, height, width, 0};
  dispatch(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    const auto run = [&](const auto* g) {
      const BandGradient<std::decay_t<decltype(*g)>> coefficient{g, v};
      spread<T>("haar_ll_backward_kernel", coefficient, edge, layout, nullptr, 0, out, stream);
    };
    if (dtype == grad.scalar_type())
      run(data<T>(grad));
    else
      run(data<acc_t<T>>(grad));
  });
  return out;
}

std::tuple<Tensor, Tensor> haar_ll_l1(const Tensor& pred, const Tensor& target, int64_t mode, double low, double high,
                                      int64_t reduction, bool pred_grad, bool target_grad) {
  const Strided4 vx = view4(pred, "pred"), vy = view4(target, "target");
  check_alike(pred, target, "target");
  const HaarEdge edge = edge_of(mode);
  const bool ranged = low != high, keep = pred_grad || target_grad, each = reduction == kNone;
  const Kept layout{vx.c, vx.h, vx.w, ranged ? pred_grad + target_grad : 0};
  const i64 coefficients = vx.c * haar_size(vx.h) * haar_size(vx.w);
  const OnDevice stream(pred);
  // All samples together have about as many blocks as a summing kernel may.
  const i64 share = max(1, kMaxPartials / max(1, vx.n));
  const unsigned blocks = static_cast<unsigned>(min(share, summing_blocks(layout.signs(), 1)));
  Tensor loss = each ? torch::stable::new_empty(pred, {vx.n}, acc_dtype(pred.scalar_type()))
                     : torch::stable::new_empty(pred, {}, acc_dtype(pred.scalar_type()));
  Tensor kept = torch::stable::new_empty(pred, {vx.n, keep ? layout.sample() : 0}, ScalarType::Byte);
  Tensor partials = torch::stable::new_empty(pred, {vx.n * blocks}, ScalarType::Double);
  dispatch(pred.scalar_type(), "pred", [&](auto t) {
    using T = decltype(t);
    const auto range = range_of<acc_t<T>>(low, high);
    uint8_t* bits = keep ? mutable_data<uint8_t>(kept) : nullptr;
    const T *a = data<T>(pred), *b = data<T>(target);
    const Input<T> x{a, vx, rows_of_packs(a, vx), range, ranged && pred_grad ? bits : nullptr, 0};
    const Input<T> y{b, vy, rows_of_packs(b, vy), range, ranged && target_grad ? bits : nullptr, pred_grad};
    if (vx.n > 0)
      launch("haar_ll_l1_kernel", haar_ll_l1_kernel<T>, static_cast<unsigned>(vx.n * blocks), stream, x, y, edge,
             layout, bits, blocks, mutable_data<double>(partials));
    finish_sum(partials, 2 * static_cast<double>(divisor(reduction, vx.n, coefficients)) / range_factor(low, high),
               mutable_data<acc_t<T>>(loss), stream, each ? vx.n : 1);
  });
  return {loss, kept};
}

Tensor haar_ll_l1_backward(const Tensor& grad, const Tensor& kept, int64_t mode, double low, double high,
                           int64_t reduction, int64_t channels, int64_t height, int64_t width, ScalarType dtype,
                           int64_t mask) {
  const HaarEdge edge = edge_of(mode);
  const Kept layout = layout_of(kept, channels, height, width, mask);
  const i64 samples = kept.size(0);
  check_loss_grad(grad, kept, reduction, dtype);
  Tensor out = torch::stable::new_empty(kept, {samples, channels, height, width}, dtype);
  if (out.numel() == 0) return out;
  const OnDevice stream(kept);
  const i64 coefficients = channels * haar_size(height) * haar_size(width);
  const double over = 2 * static_cast<double>(divisor(reduction, samples, coefficients));
  dispatch(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    const uint8_t* bits = data<uint8_t>(kept);
    const SignGradient<Acc> coefficient{data<Acc>(grad), reduction == kNone ? grad.stride(0) : 0,
                                        static_cast<Acc>(range_factor(low, high) / over), bits, layout};
    spread<T>("haar_ll_l1_backward_kernel", coefficient, edge, layout, mask < 0 ? nullptr : bits,
              static_cast<int>(mask), out, stream);
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
