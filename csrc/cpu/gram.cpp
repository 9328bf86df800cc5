// Gram matrix and distances of Gram matrices on the CPU.
//
//   G(F)[i,j] = sum_k F[i,k] F[j,k] / (C H W),   k over the H W pixels                (F: [C, H, W] per sample)
//   loss      = mean_n of sum D^2 (l2), sum |D| (l1) or sqrt(sum D^2) (fro),  D = G(F1) - G(F2)
//               l2 is arXiv 2412.03268, eq. 6
//   backward  : dF = S^T F + b, with a small C x C matrix S made from D in rfsr_ext/ops/gram.py. A bias b per
//               channel comes with layer norm, whose Gram is that of F less a shift with a rank-2 correction.
//
// Per feature element (s = bytes per element): the Gram reads s once and does C FLOP (only the lower triangle
// of panels is computed), the backward reads s, writes s and does 2 C FLOP. C is 64 ... 512 in VGG19, so on a
// CPU all of it is bound by arithmetic: relu1_1 of a 512 x 512 image is 1.1 GFLOP, 11 ms on a core of 100 GFLOP/s.
// D comes from one signed accumulation over both inputs; the two Gram matrices are never written.
//
// How: a block of pixels is packed into panels of 32 channels, pixel-major ([panel][k][32], as fp32 or fp64),
// whatever the dtype and layout of the input; an 8 x 32 tile of the result is then a sum of outer products that
// lives in 16 AVX-512 registers (or, 4 x 16 at a time, in 8 of AVX2). The backward uses the same tile with
// strips of S and panels of 32 pixels.
//
// Deterministic: an output tile is added up by one thread, over pixels in order. 128 products at a time are
// summed in fp32 (fp64 for fp64) and those sums are added in fp64, so length costs no accuracy and the
// difference of two nearly equal Grams keeps the digits the inputs have. Threads only decide who does a tile.
//
// Limits: C*C fp64 accumulators and a packed block of about 0.5 MB are held; the samples of a batch take turns;
// small C gives few tiles to share out between many threads.

#include <algorithm>
#include <vector>

#include "../gram.h"
#include "rows.h"

namespace rfsr {
namespace {

constexpr i64 kStrip = 8;        // tile height
constexpr i64 kPanel = 32;       // tile width: channels (forward) or pixels (backward) of a panel
constexpr i64 kStrips = kPanel / kStrip;
constexpr i64 kDepth = 128;      // products summed in the accumulation type before the sum goes to fp64
constexpr i64 kPacked = 131072;  // elements of a packed block: stays in a second-level cache
constexpr i64 kRun = 128;        // pixels read from one channel before the next has its turn

// ------------------------------------------------------------------------------------------- tile
// sum[i][j] = sum_p a[p * lda + i] * b[p * kPanel + j], and then
//   kAdd:   out[i * ld + j] += sign * sum[i][j]       in fp64
//   else:   out[i * ld + j]  = bias[i] + sum[i][j]
// in pieces of kRows x 2 vectors of kBytes. The sums are spelt as vectors because a compiler left to vectorise plain
// loops keeps them in memory, ten times slower; there are enough of them to hide the latency of the multiply-add.
template <int kRows, int kBytes, bool kAdd, class Acc, class Out>
RFSR_INLINE void tile(const Acc* a, i64 lda, const Acc* b, i64 depth, double sign, const Acc* bias, Out* out, i64 ld) {
  typedef Acc Vec __attribute__((vector_size(kBytes), aligned(alignof(Acc)), may_alias));
  constexpr i64 lanes = kBytes / sizeof(Acc);
  for (i64 i0 = 0; i0 < kStrip; i0 += kRows)
    for (i64 j0 = 0; j0 < kPanel; j0 += 2 * lanes) {
      Vec sum[kRows][2] = {};
      for (i64 p = 0; p < depth; ++p) {
        const Vec* row = reinterpret_cast<const Vec*>(b + p * kPanel + j0);
        const Vec first = row[0], second = row[1];
#pragma GCC unroll 8
        for (i64 i = 0; i < kRows; ++i) {
          const Acc factor = a[p * lda + i0 + i];
          sum[i][0] += factor * first;
          sum[i][1] += factor * second;
        }
      }
#pragma GCC unroll 8
      for (i64 i = 0; i < kRows; ++i) {
        Out* o = out + (i0 + i) * ld + j0;
        if constexpr (kAdd) {
          Acc part[2 * lanes];
          reinterpret_cast<Vec*>(part)[0] = sum[i][0];
          reinterpret_cast<Vec*>(part)[1] = sum[i][1];
          for (i64 j = 0; j < 2 * lanes; ++j) o[j] += sign * static_cast<double>(part[j]);
        } else {
          reinterpret_cast<Vec*>(o)[0] = sum[i][0] + bias[i0 + i];
          reinterpret_cast<Vec*>(o)[1] = sum[i][1] + bias[i0 + i];
        }
      }
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
#define RFSR_AVX512 __attribute__((target("avx512f")))
inline bool has_avx512() {
  static const bool yes = __builtin_cpu_supports("avx512f");
  return yes;
}
#else
#define RFSR_AVX512
inline bool has_avx512() { return false; }
#endif

#define RFSR_PRODUCTS(Acc)                                                                                  \
  RFSR_AVX512 void add_wide(const Acc* a, const Acc* b, i64 depth, double sign, double* out) {              \
    tile<8, 64, true, Acc>(a, kPanel, b, depth, sign, nullptr, out, kPanel);                                \
  }                                                                                                         \
  RFSR_CLONES void add_narrow(const Acc* a, const Acc* b, i64 depth, double sign, double* out) {            \
    tile<4, 32, true, Acc>(a, kPanel, b, depth, sign, nullptr, out, kPanel);                                \
  }                                                                                                         \
  RFSR_AVX512 void store_wide(const Acc* a, const Acc* b, i64 depth, const Acc* bias, Acc* out, i64 ld) {   \
    tile<8, 64, false, Acc>(a, kStrip, b, depth, 1, bias, out, ld);                                         \
  }                                                                                                         \
  RFSR_CLONES void store_narrow(const Acc* a, const Acc* b, i64 depth, const Acc* bias, Acc* out, i64 ld) { \
    tile<4, 32, false, Acc>(a, kStrip, b, depth, 1, bias, out, ld);                                         \
  }
RFSR_PRODUCTS(float)
RFSR_PRODUCTS(double)

// out += sign * (strip of a panel)^T panel, both packed.
template <class Acc>
void add_product(const Acc* a, const Acc* b, i64 depth, double sign, double* out) {
  has_avx512() ? add_wide(a, b, depth, sign, out) : add_narrow(a, b, depth, sign, out);
}

// out = bias + (strip)^T panel, both packed.
template <class Acc>
void store_product(const Acc* a, const Acc* b, i64 depth, const Acc* bias, Acc* out, i64 ld) {
  has_avx512() ? store_wide(a, b, depth, bias, out, ld) : store_narrow(a, b, depth, bias, out, ld);
}

// ---------------------------------------------------------------------------------------- packing

// Pixels [k0, k0 + count) of the channel at p as contiguous Acc values, in `scratch` unless they already are that.
template <class T, class Acc>
const Acc* read_pixels(const T* p, const Strided4& v, i64 k0, i64 count, Acc* scratch) {
  if (v.flat()) return load_row(p + k0 * v.sw, v.sw, count, scratch);
  for (i64 k = 0; k < count; ++k) scratch[k] = static_cast<Acc>(p[v.pixel(k0 + k)]);
  return scratch;
}

// Packs channels [kWidth panel, kWidth (panel + 1)) of pixels [k0, k0 + count), less `shift`, as [k][kWidth];
// absent channels are zero.
template <i64 kWidth, class T, class Acc>
void pack(const T* x, const Strided4& v, i64 panel, i64 k0, i64 count, Acc shift, Acc* out) {
  const i64 channels = smaller(kWidth, v.c - panel * kWidth);
  const T* base = x + panel * kWidth * v.sc;
  if (v.sc == 1 && v.flat() && channels == kWidth) {  // channels_last lies there almost as it is wanted
    Acc scratch[kWidth];
    for (i64 k = 0; k < count; ++k) {
      const Acc* pixel = load_row(base + (k0 + k) * v.sw, 1, kWidth, scratch);
      for (i64 c = 0; c < kWidth; ++c) out[k * kWidth + c] = pixel[c] - shift;
    }
    return;
  }
  typedef Acc Four __attribute__((vector_size(4 * sizeof(Acc)), aligned(alignof(Acc)), may_alias));
  Acc scratch[4][kRun];
  for (i64 k = 0; k < count; k += kRun) {
    const i64 run = smaller(kRun, count - k);
    for (i64 c = 0; c < kWidth; c += 4) {
      const Acc* rows[4];
      for (i64 i = 0; i < 4; ++i) {
        if (c + i < channels) {
          rows[i] = read_pixels(base + (c + i) * v.sc, v, k0 + k, run, scratch[i]);
        } else {
          std::fill(scratch[i], scratch[i] + run, shift);
          rows[i] = scratch[i];
        }
      }
      const Acc *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
      Acc* o = out + k * kWidth + c;
      for (i64 q = 0; q < run; ++q) *reinterpret_cast<Four*>(o + q * kWidth) = Four{r0[q], r1[q], r2[q], r3[q]} - shift;
    }
  }
}

// ---------------------------------------------------------------------------------------- forward

// Sums of one sample, in fp64: a 32 x 32 block for each pair of panels of the lower triangle, and the rows' sums.
struct Sums {
  explicit Sums(const Strided4& v)
      : panels(ceil_div(v.c, kPanel)), blocks(panels * (panels + 1) / 2 * kPanel * kPanel), rows(panels * kPanel) {}
  void clear() {
    std::fill(blocks.begin(), blocks.end(), 0.0);
    std::fill(rows.begin(), rows.end(), 0.0);
  }
  i64 panels;
  std::vector<double> blocks, rows;
};

// blocks += sign * (F - shift) (F - shift)^T over all pixels; rows += the sums of F - shift, if they are wanted.
template <class T>
void accumulate(const T* x, const Strided4& v, acc_t<T> shift, double sign, bool wants_rows, Sums& sums) {
  using Acc = acc_t<T>;
  const i64 panels = sums.panels, width = panels * kPanel, pixels = v.pixels();
  const i64 block = larger(kDepth, kPacked / width / kDepth * kDepth);
  Buffer<Acc> packed(width * smaller(block, pixels));
  for (i64 k0 = 0; k0 < pixels; k0 += block) {
    const i64 count = smaller(block, pixels - k0);
    torch::stable::parallel_for(0, panels, grain(count * kPanel), [&](i64 begin, i64 end) {
      for (i64 panel = begin; panel < end; ++panel) {
        Acc* p = packed.get() + panel * count * kPanel;
        pack<kPanel>(x, v, panel, k0, count, shift, p);
        for (i64 k = 0; wants_rows && k < count; k += kDepth) {
          Acc part[kPanel] = {};
          for (i64 q = k; q < smaller(k + kDepth, count); ++q)
            for (i64 c = 0; c < kPanel; ++c) part[c] += p[q * kPanel + c];
          for (i64 c = 0; c < kPanel; ++c) sums.rows[panel * kPanel + c] += static_cast<double>(part[c]);
        }
      }
    });
    // A task is a strip of a pair of panels. A thread takes neighbouring strips together, 128 pixels at a time: they
    // need the same panel, which so stays in the first-level cache.
    const i64 tasks = panels * (panels + 1) / 2 * kStrips;
    torch::stable::parallel_for(0, tasks, grain(count * kPanel * kStrip), [&](i64 begin, i64 end) {
      for (i64 task = begin, next; task < end; task = next) {
        next = smaller(end, (task / kStrips + 1) * kStrips);
        const TilePair pair = triangle(task / kStrips);
        const Acc *a = packed.get() + pair.i * count * kPanel, *b = packed.get() + pair.j * count * kPanel;
        double* out = sums.blocks.data() + task / kStrips * kPanel * kPanel;
        for (i64 k = 0; k < count; k += kDepth)
          for (i64 strip = task % kStrips; strip <= (next - 1) % kStrips; ++strip)
            add_product(a + k * kPanel + strip * kStrip, b + k * kPanel, smaller(kDepth, count - k), sign,
                        out + strip * kStrip * kPanel);
      }
    });
  }
}

// Writes out = blocks / (C H W), both triangles, and returns the criterion of it.
template <class Acc>
double finish(const Sums& sums, const Strided4& v, i64 criterion, Acc* out) {
  const double scale = 1.0 / static_cast<double>(v.c * v.pixels());
  const double* block = sums.blocks.data();
  double lanes[kPanel] = {};
  for (i64 i0 = 0; i0 < v.c; i0 += kPanel)
    for (i64 j0 = 0; j0 <= i0; j0 += kPanel, block += kPanel * kPanel) {
      const i64 height = smaller(kPanel, v.c - i0), width = smaller(kPanel, v.c - j0), times = j0 < i0 ? 2 : 1;
      for (i64 i = 0; i < height; ++i)
        for (i64 j = 0; j < width; ++j) {
          const double d = scale * block[i * kPanel + j];
          out[(i0 + i) * v.c + j0 + j] = static_cast<Acc>(d);
          lanes[j] += times * criterion_term(criterion, d);
        }
      for (i64 j = 0; j0 < i0 && j < width; ++j)
        for (i64 i = 0; i < height; ++i) out[(j0 + j) * v.c + i0 + i] = out[(i0 + i) * v.c + j0 + j];
    }
  double total = 0;
  for (double lane : lanes) total += lane;
  return criterion_value(criterion, total);
}

// -> (gram [N, C, C], means [N, C]) of features less shift [N]; without a shift the means are left out (empty).
std::tuple<Tensor, Tensor> gram_moments(const Tensor& features, std::optional<Tensor> shift) {
  const Strided4 v = view4(features, "features");
  check_per_sample(shift, features, "shift", {v.n});
  const ScalarType acc = acc_dtype(features.scalar_type());
  Tensor gram = torch::stable::new_empty(features, {v.n, v.c, v.c}, acc);
  Tensor means = shift ? torch::stable::new_empty(features, {v.n, v.c}, acc)
                       : torch::stable::new_empty(features, {0}, acc);
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    Sums sums(v);
    for (i64 n = 0; n < v.n; ++n) {
      sums.clear();
      const Acc off = shift ? data<Acc>(*shift)[n * shift->stride(0)] : Acc(0);
      accumulate(data<T>(features) + n * v.sn, v, off, 1.0, shift.has_value(), sums);
      finish(sums, v, kL2, mutable_data<Acc>(gram) + n * v.c * v.c);
      for (i64 c = 0; shift && c < v.c; ++c)
        mutable_data<Acc>(means)[n * v.c + c] = static_cast<Acc>(sums.rows[c] / static_cast<double>(v.pixels()));
    }
  });
  return {gram, means};
}

// -> (loss: scalar, difference: D [N, C, C])
std::tuple<Tensor, Tensor> gram_distance(const Tensor& features, const Tensor& target, int64_t criterion) {
  const Strided4 vx = view4(features, "features"), vy = view4(target, "target_features");
  check_alike(features, target, "target_features");
  check_criterion(criterion);
  const ScalarType acc = acc_dtype(features.scalar_type());
  Tensor loss = torch::stable::new_empty(features, {}, acc);
  Tensor difference = torch::stable::new_empty(features, {vx.n, vx.c, vx.c}, acc);
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    Sums sums(vx);
    double total = 0;
    for (i64 n = 0; n < vx.n; ++n) {
      sums.clear();
      accumulate(data<T>(features) + n * vx.sn, vx, Acc(0), 1.0, false, sums);
      accumulate(data<T>(target) + n * vy.sn, vy, Acc(0), -1.0, false, sums);
      total += finish(sums, vx, criterion, mutable_data<Acc>(difference) + n * vx.c * vx.c);
    }
    *mutable_data<Acc>(loss) = static_cast<Acc>(total / static_cast<double>(vx.n));
  });
  return {loss, difference};
}

// --------------------------------------------------------------------------------------- backward

// out[n, c, k] = bias[n, c] + sum_p s[n, p, c] F[n, p, k]
template <class T>
void backward_kernel(const Tensor& s, const T* x, const Strided4& v, const Tensor* bias, T* out) {
  using Acc = acc_t<T>;
  const i64 strips = ceil_div(v.c, kStrip), pixels = v.pixels(), panels = ceil_div(pixels, kPanel);
  const Strided4 small{1, v.c, 1, v.c, 0, s.stride(2), 0, s.stride(1)};  // S as "features": channel c, pixel p
  Buffer<Acc> packed(strips * kStrip * v.c);
  std::vector<Acc> biases(static_cast<size_t>(strips * kStrip));
  for (i64 n = 0; n < v.n; ++n) {
    for (i64 p = 0; p < v.c; p += 16)  // a few rows of S at a time, which stay in the first-level cache
      for (i64 strip = 0; strip < strips; ++strip)
        pack<kStrip>(data<Acc>(s) + n * s.stride(0), small, strip, p, smaller(16, v.c - p), Acc(0),
                     packed.get() + (strip * v.c + p) * kStrip);
    for (i64 c = 0; bias && c < v.c; ++c) biases[c] = data<Acc>(*bias)[n * bias->stride(0) + c * bias->stride(1)];
    torch::stable::parallel_for(0, panels, grain(v.c * v.c * kPanel), [&](i64 begin, i64 end) {
      constexpr i64 group = 4;  // panels that share one reading of S
      Buffer<Acc> rows(v.c * kPanel * group);  // [panel][p][32], zero beyond the last pixel
      Acc scratch[kPanel * group], part[kStrip * kPanel];
      for (i64 b = begin; b < end; b += group) {
        const i64 k0 = b * kPanel, count = smaller(smaller(group, end - b) * kPanel, pixels - k0);
        for (i64 p = 0; p < v.c; ++p) {
          const Acc* f = read_pixels(x + n * v.sn + p * v.sc, v, k0, count, scratch);
          for (i64 k = 0; k < count; k += kPanel) {
            Acc* row = rows.get() + k * v.c + p * kPanel;
            const i64 some = smaller(kPanel, count - k);
            std::copy(f + k, f + k + some, row);
            std::fill(row + some, row + kPanel, Acc(0));
          }
        }
        for (i64 c = 0; c < v.c; c += kStrip)
          for (i64 k = 0; k < count; k += kPanel) {
            const Acc *a = packed.get() + c * v.c, *panel = rows.get() + k * v.c;
            T* o = out + (n * v.c + c) * pixels + k0 + k;
            const i64 height = smaller(kStrip, v.c - c), some = smaller(kPanel, count - k);
            if constexpr (std::is_same_v<T, Acc>) {
              if (height == kStrip && some == kPanel) {
                store_product(a, panel, v.c, biases.data() + c, o, pixels);
                continue;
              }
            }
            store_product(a, panel, v.c, biases.data() + c, part, kPanel);
            for (i64 i = 0; i < height; ++i) convert_row(part + i * kPanel, some, o + i * pixels);
          }
      }
    });
  }
}

Tensor gram_backward(const Tensor& s, const Tensor& features, std::optional<Tensor> bias) {
  const Strided4 v = view4(features, "features");
  check_per_sample(s, features, "s", {v.n, v.c, v.c});
  check_per_sample(bias, features, "bias", {v.n, v.c});
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.h, v.w}, features.scalar_type());
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    backward_kernel<T>(s, data<T>(features), v, bias ? &*bias : nullptr, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfsr_ext, CPU, m) {
  m.impl("gram_moments", TORCH_BOX(&gram_moments));
  m.impl("gram_distance", TORCH_BOX(&gram_distance));
  m.impl("gram_backward", TORCH_BOX(&gram_backward));
}

}  // namespace rfsr
