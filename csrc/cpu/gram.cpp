// Gram matrix and Gram loss on the CPU.
//
//   G(F)[i,j] = sum_k F[i,k] F[j,k] / (C H W),   k over the H W pixels                (F: [C, H W] per sample)
//   loss      = mean_n sum_ij D[i,j]^2,  D = G(F1) - G(F2)                            (arXiv 2412.03268, eq. 6)
//   backward  : dF1 = (4 / (N C H W)) dloss D F1, and the negative with F2 for F2;
//               both are the product S^T F of a small C x C matrix and the features, done by gram_backward.
//
// Per feature element (s = bytes per element): the Gram reads s once and does C FLOP (only the lower triangle
// of tiles is computed), the backward reads s, writes s and does 2 C FLOP. C is 64 ... 512 in VGG19, so on a
// CPU all of it is bound by arithmetic: relu1_1 of a 512 x 512 image is 1.1 GFLOP, 22 ms on a core of 50 GFLOP/s.
// D comes from one signed accumulation over both inputs; the two Gram matrices are never written.
//
// How: a block of pixels is packed into panels of 16 channels, pixel-major ([panel][k][16], as fp32 or fp64),
// whatever the dtype and layout of the input; a 4 x 16 tile of the result is then a sum of outer products that
// lives in registers. The backward uses the same tile routine with the panels of S and rows of F.
//
// Deterministic: an output tile is added up by one thread, over pixels in order. 128 products at a time are
// summed in fp32 (fp64 for fp64) and those sums are added in fp64, so length costs no accuracy and the
// difference of two nearly equal Grams keeps the digits the inputs have. Threads only decide who does a tile.
//
// Limits: C*C fp64 accumulators and a packed block of about 0.5 MB are held; small C gives few tiles to share
// out between many threads.

#include <algorithm>
#include <vector>

#include "rows.h"

namespace rfsr {
namespace {

constexpr i64 kRows = 4;         // tile height: 4 x 16 fp32 sums are 8 AVX2 or 4 AVX-512 registers
constexpr i64 kPanel = 16;       // channels per panel = tile width
constexpr i64 kDepth = 128;      // products summed in the accumulation type before the sum goes to fp64
constexpr i64 kPacked = 131072;  // elements of a packed block: stays in a second-level cache

// out[i][j] = sum_p a[p*kPanel + i] * b[p*ldb + j]
//
// The sums are spelt as vectors of 32 bytes because a compiler left to vectorise plain loops keeps a 4 x 16 array in
// memory, ten times slower. Eight of them in fp32 hide the latency of the multiply-add.
template <class Acc>
RFSR_INLINE void tile(const Acc* a, const Acc* b, i64 ldb, i64 depth, Acc* out) {
  typedef Acc Vec __attribute__((vector_size(32), aligned(alignof(Acc)), may_alias));
  constexpr i64 lanes = 32 / sizeof(Acc), vectors = kPanel / lanes;
  Vec sum[kRows][vectors] = {};
  for (i64 p = 0; p < depth; ++p) {
    const Vec* row = reinterpret_cast<const Vec*>(b + p * ldb);
#pragma GCC unroll 8
    for (i64 i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (i64 j = 0; j < vectors; ++j) sum[i][j] += a[p * kPanel + i] * row[j];
  }
  for (i64 i = 0; i < kRows; ++i)
    for (i64 j = 0; j < vectors; ++j) reinterpret_cast<Vec*>(out + i * kPanel)[j] = sum[i][j];
}
RFSR_CLONES void product(const float* a, const float* b, i64 ldb, i64 depth, float* out) {
  tile(a, b, ldb, depth, out);
}
RFSR_CLONES void product(const double* a, const double* b, i64 ldb, i64 depth, double* out) {
  tile(a, b, ldb, depth, out);
}

// Packs channels [16 panel, 16 panel + 16) of pixels [k0, k0 + count) as [k][16]; absent channels are zero.
template <class T, class Acc>
void pack(const T* x, const Strided4& v, i64 panel, i64 k0, i64 count, Acc* out) {
  const i64 channels = smaller(kPanel, v.c - panel * kPanel);
  const bool flat = v.flat();
  const T* base = x + panel * kPanel * v.sc;
  for (i64 k = 0; k < count; k += 64) {  // 64 pixels of output are 4 kB: written 16 times while in the L1 cache
    const i64 block = smaller(64, count - k);
    i64 offset[64];
    for (i64 q = 0; q < block; ++q) offset[q] = flat ? (k0 + k + q) * v.sw : v.pixel(k0 + k + q);
    for (i64 c = 0; c < kPanel; ++c) {
      Acc* o = out + k * kPanel + c;
      const T* p = base + c * v.sc;
      if (c >= channels)
        for (i64 q = 0; q < block; ++q) o[q * kPanel] = Acc(0);
      else
        for (i64 q = 0; q < block; ++q) o[q * kPanel] = static_cast<Acc>(p[offset[q]]);
    }
  }
}

// sums[C', C'] += sign * F F^T over all pixels; C' = C rounded up to whole panels, lower triangle of panels.
template <class T>
void accumulate(const T* x, const Strided4& v, double sign, double* sums) {
  using Acc = acc_t<T>;
  const i64 panels = ceil_div(v.c, kPanel), width = panels * kPanel, pixels = v.pixels();
  const i64 block = larger(kDepth, kPacked / width / kDepth * kDepth);
  const i64 strips = kPanel / kRows, tasks = panels * (panels + 1) / 2 * strips;
  Buffer<Acc> packed(width * smaller(block, pixels));
  for (i64 k0 = 0; k0 < pixels; k0 += block) {
    const i64 count = smaller(block, pixels - k0);
    torch::stable::parallel_for(0, panels, grain(count * kPanel), [&](i64 begin, i64 end) {
      for (i64 panel = begin; panel < end; ++panel) pack(x, v, panel, k0, count, packed.get() + panel * count * kPanel);
    });
    torch::stable::parallel_for(0, tasks, grain(count * kPanel * kRows), [&](i64 begin, i64 end) {
      Acc part[kRows * kPanel];
      for (i64 task = begin; task < end; ++task) {
        const TilePair pair = triangle(task / strips);
        const i64 row = pair.i * kPanel + task % strips * kRows, column = pair.j * kPanel;
        const Acc* a = packed.get() + pair.i * count * kPanel + task % strips * kRows;
        const Acc* b = packed.get() + pair.j * count * kPanel;
        for (i64 p = 0; p < count; p += kDepth) {
          product(a + p * kPanel, b + p * kPanel, kPanel, smaller(kDepth, count - p), part);
          for (i64 i = 0; i < kRows; ++i)
            for (i64 j = 0; j < kPanel; ++j)
              sums[(row + i) * width + column + j] += sign * static_cast<double>(part[i * kPanel + j]);
        }
      }
    });
  }
}

// Writes out = sums / (C H W), both triangles, and returns the sum of its squares.
template <class Acc>
double finish(const double* sums, const Strided4& v, Acc* out) {
  const i64 width = ceil_div(v.c, kPanel) * kPanel;
  const double scale = 1.0 / static_cast<double>(v.c * v.pixels());
  double squares = 0;
  for (i64 i = 0; i < v.c; ++i)
    for (i64 j = 0; j < v.c; ++j) {
      const double d = scale * (j <= i ? sums[i * width + j] : sums[j * width + i]);
      out[i * v.c + j] = static_cast<Acc>(d);
      squares += d * d;
    }
  return squares;
}

// D (or G, when other is null) of every sample into out [N, C, C]; returns the sum of squares over the batch.
template <class T>
double gram_kernel(const T* x, const Strided4& vx, const T* other, const Strided4& vo, acc_t<T>* out) {
  const i64 width = ceil_div(vx.c, kPanel) * kPanel;
  std::vector<double> sums(static_cast<size_t>(width * width));
  double squares = 0;
  for (i64 n = 0; n < vx.n; ++n) {
    std::fill(sums.begin(), sums.end(), 0.0);
    accumulate(x + n * vx.sn, vx, 1.0, sums.data());
    if (other) accumulate(other + n * vo.sn, vo, -1.0, sums.data());
    squares += finish(sums.data(), vx, out + n * vx.c * vx.c);
  }
  return squares;
}

// out[n, c, k] = sum_p s[n, p, c] F[n, p, k]
template <class T>
void backward_kernel(const acc_t<T>* s, i64 sn, i64 sp, i64 sc, const T* x, const Strided4& v, T* out) {
  using Acc = acc_t<T>;
  const i64 panels = ceil_div(v.c, kPanel), pixels = v.pixels(), block = 128;
  const Strided4 small{1, v.c, v.c, 1, 0, sc, sp, 0};  // S as "features": channel c, pixel p
  Buffer<Acc> packed(panels * kPanel * v.c);
  for (i64 n = 0; n < v.n; ++n) {
    for (i64 panel = 0; panel < panels; ++panel)
      pack(s + n * sn, small, panel, 0, v.c, packed.get() + panel * v.c * kPanel);
    torch::stable::parallel_for(0, ceil_div(pixels, block), grain(v.c * v.c * block), [&](i64 begin, i64 end) {
      Buffer<Acc> rows(v.c * block);  // [p][block], zero beyond the last pixel
      Acc part[kRows * kPanel];
      for (i64 b = begin; b < end; ++b) {
        const i64 k0 = b * block, count = smaller(block, pixels - k0);
        for (i64 p = 0; p < v.c; ++p) {
          const T* f = x + n * v.sn + p * v.sc;
          Acc* row = rows.get() + p * block;
          if (v.flat())
            for (i64 k = 0; k < count; ++k) row[k] = static_cast<Acc>(f[(k0 + k) * v.sw]);
          else
            for (i64 k = 0; k < count; ++k) row[k] = static_cast<Acc>(f[v.pixel(k0 + k)]);
          std::fill(row + count, row + block, Acc(0));
        }
        for (i64 c = 0; c < v.c; c += kRows)
          for (i64 k = 0; k < count; k += kPanel) {
            product(packed.get() + c / kPanel * v.c * kPanel + c % kPanel, rows.get() + k, block, v.c, part);
            for (i64 i = 0; i < smaller(kRows, v.c - c); ++i)
              for (i64 j = 0; j < smaller(kPanel, count - k); ++j)
                out[((n * v.c) + c + i) * pixels + k0 + k + j] = static_cast<T>(part[i * kPanel + j]);
          }
      }
    });
  }
}

Tensor gram_matrix(const Tensor& features) {
  const Strided4 v = view4(features, "features");
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.c}, acc_dtype(features.scalar_type()));
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    gram_kernel<T>(data<T>(features), v, nullptr, v, mutable_data<acc_t<T>>(out));
  });
  return out;
}

// -> (loss: scalar, difference: D [N, C, C])
std::tuple<Tensor, Tensor> gram_l2(const Tensor& features, const Tensor& target) {
  const Strided4 vx = view4(features, "features"), vy = view4(target, "target_features");
  check_alike(features, target, "target_features");
  const ScalarType acc = acc_dtype(features.scalar_type());
  Tensor loss = torch::stable::new_empty(features, {}, acc);
  Tensor difference = torch::stable::new_empty(features, {vx.n, vx.c, vx.c}, acc);
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    const double squares =
        gram_kernel<T>(data<T>(features), vx, data<T>(target), vy, mutable_data<acc_t<T>>(difference));
    *mutable_data<acc_t<T>>(loss) = static_cast<acc_t<T>>(squares / static_cast<double>(vx.n));
  });
  return {loss, difference};
}

Tensor gram_backward(const Tensor& s, const Tensor& features) {
  const Strided4 v = view4(features, "features");
  STD_TORCH_CHECK(s.dim() == 3 && s.size(0) == v.n && s.size(1) == v.c && s.size(2) == v.c &&
                      s.scalar_type() == acc_dtype(features.scalar_type()),
                  "s must be [N, C, C] in the accumulation dtype of features");
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.h, v.w}, features.scalar_type());
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    backward_kernel<T>(data<acc_t<T>>(s), s.stride(0), s.stride(1), s.stride(2), data<T>(features), v,
                       mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfsr_ext, CPU, m) {
  m.impl("gram_matrix", TORCH_BOX(&gram_matrix));
  m.impl("gram_l2", TORCH_BOX(&gram_l2));
  m.impl("gram_backward", TORCH_BOX(&gram_backward));
}

}  // namespace rfsr
