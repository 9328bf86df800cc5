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
// How: a panel is 32 channels (forward) or 32 pixels (backward) of a block that fits in a second-level cache, packed
// pixel by pixel, as fp32 or fp64 whatever the dtype and layout of the input; an 8 x 32 tile of the result is then a
// sum of outer products that lives in 16 AVX-512 registers (or, 4 x 16 at a time, in 8 of AVX2). Where the processor
// has a tile unit, bf16 stays bf16: 32 x 32 products by AMX, and in the backward S as the sum of two bf16 matrices, of
// which one holds what rounding took from the other. fp16 has no such unit and is computed as fp32.
//
// Threads share the forward by slices of the pixels and by tiles. Each packs what its tiles need: a panel that another
// core has packed costs more to fetch than to pack.
//
// Deterministic: slices depend on the shape alone, and a tile of a slice is added up by one thread, over pixels in
// order. At most 128 products (AMX: 512) are summed in fp32 (fp64 for fp64) and those sums are added in fp64, so length
// costs no accuracy and the difference of two nearly equal Grams keeps the digits the inputs have.
//
// Limits: fp64 sums of C*C/2 entries, or up to 1 MB, are held, and each thread packs up to 1 MB; the samples of a batch
// take turns. AMX takes numbers below 1e-38 for 0.

#include <algorithm>
#include <cstring>
#include <vector>

#include "../gram.h"
#include "amx.h"
#include "rows.h"

namespace rfsr {
namespace {

constexpr i64 kStrip = 8;        // tile height
constexpr i64 kPanel = 32;       // tile width
constexpr i64 kPiece = 128;      // pixels packed at a time
constexpr i64 kSlice = 2048;     // pixels of a slice, at least ...
constexpr i64 kSums = 131072;    // ... and what the fp64 sums of all slices together may hold
constexpr i64 kShare = 65536;    // elements of a packed block in the backward

// ------------------------------------------------------------------------------------------ tiles
// The sums are spelt as vectors because a compiler left to vectorise plain loops keeps them in memory, ten times
// slower; there are enough of them to hide the latency of the multiply-add.

template <class Acc, int kBytes>
struct Vector {
  typedef Acc type __attribute__((vector_size(kBytes), aligned(alignof(Acc)), may_alias));
};

// out[i * kPanel + j] += sign * sum_k a[k * kPanel + i] b[k * kPanel + j], for i of a strip in pieces of kRows and for
// j in kVectors vectors of kBytes from j0 on.
template <int kRows, int kVectors, int kBytes, class Acc>
RFSR_INLINE void add_tile(const Acc* a, const Acc* b, i64 depth, double sign, double* out, i64 j0) {
  using Vec = typename Vector<Acc, kBytes>::type;
  constexpr i64 lanes = kBytes / sizeof(Acc);
  for (i64 i0 = 0; i0 < kStrip; i0 += kRows) {
    Vec sum[kRows][kVectors] = {};
    for (i64 k = 0; k < depth; ++k) {
      Vec row[kVectors];
#pragma GCC unroll 8
      for (i64 j = 0; j < kVectors; ++j) row[j] = *reinterpret_cast<const Vec*>(b + k * kPanel + j0 + j * lanes);
#pragma GCC unroll 8
      for (i64 i = 0; i < kRows; ++i) {
        const Acc factor = a[k * kPanel + i0 + i];
#pragma GCC unroll 8
        for (i64 j = 0; j < kVectors; ++j) sum[i][j] += factor * row[j];
      }
    }
#pragma GCC unroll 8
    for (i64 i = 0; i < kRows; ++i) {
      Acc part[kVectors * lanes];
#pragma GCC unroll 8
      for (i64 j = 0; j < kVectors; ++j) reinterpret_cast<Vec*>(part)[j] = sum[i][j];
      double* o = out + (i0 + i) * kPanel + j0;
      for (i64 j = 0; j < kVectors * lanes; ++j) o[j] += sign * static_cast<double>(part[j]);
    }
  }
}

// out[i * ld_out + j] = bias[i] + sum_p a[p * kStrip + i] * b[p * ld + j], in pieces of kRows x 2 vectors of kBytes.
template <int kRows, int kBytes, class Acc>
RFSR_INLINE void store_tile(const Acc* a, const Acc* b, i64 ld, i64 depth, const Acc* bias, Acc* out, i64 ld_out) {
  using Vec = typename Vector<Acc, kBytes>::type;
  constexpr i64 lanes = kBytes / sizeof(Acc);
  for (i64 i0 = 0; i0 < kStrip; i0 += kRows)
    for (i64 j0 = 0; j0 < kPanel; j0 += 2 * lanes) {
      Vec sum[kRows][2] = {};
      for (i64 p = 0; p < depth; ++p) {
        const Vec* row = reinterpret_cast<const Vec*>(b + p * ld + j0);
        const Vec first = row[0], second = row[1];
#pragma GCC unroll 8
        for (i64 i = 0; i < kRows; ++i) {
          const Acc factor = a[p * kStrip + i0 + i];
          sum[i][0] += factor * first;
          sum[i][1] += factor * second;
        }
      }
#pragma GCC unroll 8
      for (i64 i = 0; i < kRows; ++i) {
        Vec* o = reinterpret_cast<Vec*>(out + (i0 + i) * ld_out + j0);
        o[0] = sum[i][0] + bias[i0 + i];
        o[1] = sum[i][1] + bias[i0 + i];
      }
    }
}

template <class Acc>
RFSR_AVX512 void add_wide(const Acc* a, const Acc* b, i64 depth, double sign, i64 columns, double* out) {
  constexpr i64 lanes = 64 / sizeof(Acc);
  i64 j = 0;
  for (; j + lanes < columns; j += 2 * lanes) add_tile<8, 2, 64>(a, b, depth, sign, out, j);
  if (j < columns) add_tile<8, 1, 64>(a, b, depth, sign, out, j);
}
template <class Acc>
RFSR_AVX512 void store_wide(const Acc* a, const Acc* b, i64 ld, i64 depth, const Acc* bias, Acc* out, i64 ld_out) {
  store_tile<8, 64>(a, b, ld, depth, bias, out, ld_out);
}

#define RFSR_NARROW(Acc)                                                                                        \
  RFSR_CLONES void narrow_add(const Acc* a, const Acc* b, i64 depth, double sign, i64 columns, double* out) {   \
    for (i64 j = 0; j < columns; j += 64 / sizeof(Acc)) add_tile<4, 2, 32>(a, b, depth, sign, out, j);          \
  }                                                                                                             \
  RFSR_CLONES void narrow_store(const Acc* a, const Acc* b, i64 ld, i64 depth, const Acc* bias, Acc* out,       \
                                i64 ld_out) {                                                                   \
    store_tile<4, 32>(a, b, ld, depth, bias, out, ld_out);                                                      \
  }
RFSR_NARROW(float)
RFSR_NARROW(double)

// ---------------------------------------------------------------------------------------- forward

// out[k * kPanel + i] = rows[i][k] - shift for i < 4, by 4 x 4 blocks.
template <class Acc>
RFSR_INLINE void transpose_four(const Acc* const* rows, i64 count, Acc shift, Acc* out) {
  using Four = typename Vector<Acc, 4 * sizeof(Acc)>::type;
  using Integer = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  using Index [[maybe_unused]] = typename Vector<Integer, 4 * sizeof(Acc)>::type;
  i64 k = 0;
  for (; k + 4 <= count; k += 4) {
    Four row[4], pairs[4];
    for (i64 i = 0; i < 4; ++i) row[i] = *reinterpret_cast<const Four*>(rows[i] + k) - shift;
    for (i64 i = 0; i < 2; ++i) {  // of pixels k, k + 1 and of k + 2, k + 3
      pairs[i] = RFSR_SHUFFLE(row[2 * i], row[2 * i + 1], 0, 4, 1, 5);
      pairs[i + 2] = RFSR_SHUFFLE(row[2 * i], row[2 * i + 1], 2, 6, 3, 7);
    }
    for (i64 i = 0; i < 2; ++i) {
      Acc* o = out + (k + 2 * i) * kPanel;
      *reinterpret_cast<Four*>(o) = RFSR_SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 0, 1, 4, 5);
      *reinterpret_cast<Four*>(o + kPanel) = RFSR_SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 2, 3, 6, 7);
    }
  }
  for (; k < count; ++k)
    for (i64 i = 0; i < 4; ++i) out[k * kPanel + i] = rows[i][k] - shift;
}

// Pixels [k0, k0 + count) of the channel at p as contiguous Acc values, in `scratch` unless they already are that.
template <class T, class Acc>
const Acc* read_pixels(const T* p, const Strided4& v, i64 k0, i64 count, Acc* scratch) {
  if (v.flat()) return load_row(p + k0 * v.sw, v.sw, count, scratch);
  for (i64 k = 0; k < count; ++k) scratch[k] = static_cast<Acc>(p[v.pixel(k0 + k)]);
  return scratch;
}

// Asks early for a piece of the channel at p: it is too short for the processor to see a pattern.
template <class T>
RFSR_INLINE void expect_pixels(const T* p, const Strided4& v, i64 k0, i64 count) {
  for (i64 k = 0; v.sw == 1 && k < count; k += 64 / sizeof(T)) RFSR_PREFETCH(p + k0 + k);
}

// Panels of 32 channels as [k][32], and tiles of 8 x 32.
template <class Acc>
class Columns {
 public:
  static constexpr i64 kStrips = kPanel / kStrip, kDepth = 128, kElements = 65536;

  Columns(i64 panels, i64 block) : block_(block), packed_(panels * kPanel * block) {}

  // Packs pixels [k0 + k, k0 + k + count) of a panel, less `shift`; absent channels are zero.
  template <class T>
  void pack(const T* x, const Strided4& v, i64 panel, i64 k0, i64 k, i64 count, Acc shift) {
    const i64 channels = smaller(kPanel, v.c - panel * kPanel);
    const T* base = x + panel * kPanel * v.sc;
    Acc* out = packed_.get() + (panel * block_ + k) * kPanel;
    if (v.sc == 1 && v.flat() && channels == kPanel) {  // channels_last lies there almost as it is wanted
      Acc scratch[kPanel];
      for (i64 q = 0; q < count; ++q) {
        const Acc* pixel = load_row(base + (k0 + k + q) * v.sw, 1, kPanel, scratch);
        for (i64 c = 0; c < kPanel; ++c) out[q * kPanel + c] = pixel[c] - shift;
      }
      return;
    }
    Acc scratch[4][kPiece];
    for (i64 c = 0; c < kPanel; c += 4) {
      const Acc* rows[4];
      for (i64 i = 0; i < 4; ++i) {
        if (c + 8 + i < channels) expect_pixels(base + (c + 8 + i) * v.sc, v, k0 + k, count);
        rows[i] = scratch[i];
        if (c + i < channels)
          rows[i] = read_pixels(base + (c + i) * v.sc, v, k0 + k, count, scratch[i]);
        else
          std::fill(scratch[i], scratch[i] + count, shift);
      }
      transpose_four(rows, count, shift, out + c);
    }
  }

  // out += sign * (strip of panel i) (panel j)^T over pixels [k, k + depth); above the diagonal of the whole, nothing.
  void add_product(TilePair pair, i64 strip, i64 k, i64 depth, double sign, double* out) const {
    const Acc *a = packed_.get() + (pair.i * block_ + k) * kPanel, *b = packed_.get() + (pair.j * block_ + k) * kPanel;
    const i64 columns = pair.j < pair.i ? kPanel : (strip + 1) * kStrip;
    a += strip * kStrip, out += strip * kStrip * kPanel;
    has_avx512() ? add_wide(a, b, depth, sign, columns, out) : narrow_add(a, b, depth, sign, columns, out);
  }

  // rows += the sums of a panel's channels over pixels [0, count)
  void add_rows(i64 panel, i64 count, double* rows) const {
    const Acc* p = packed_.get() + panel * block_ * kPanel;
    for (i64 k = 0; k < count; k += kDepth) {
      Acc part[kPanel] = {};
      for (i64 q = k; q < smaller(k + kDepth, count); ++q)
        for (i64 c = 0; c < kPanel; ++c) part[c] += p[q * kPanel + c];
      for (i64 c = 0; c < kPanel; ++c) rows[c] += static_cast<double>(part[c]);
    }
  }

 private:
  i64 block_;
  Buffer<Acc> packed_;
};

#ifdef RFSR_AMX
// Panels of 32 channels in bf16, as rows and with pixels in pairs, [k / 2][32][2]: the two sides of a product by AMX.
class Pairs {
 public:
  static constexpr i64 kStrips = 1, kDepth = 512, kElements = 262144;
  static_assert(kPanel == kTiled && kPiece % kTiled == 0, "a pair of panels is one product");

  Pairs(i64 panels, i64 block)
      : block_(ceil_div(block, kTiled) * kTiled),
        ld_(block_ + kTiled),  // rows a power of two apart would fall on the same cache lines
        rows_(panels * kPanel * ld_),
        pairs_(panels * kPanel * block_ / 2) {}

  void pack(const torch::headeronly::BFloat16* x, const Strided4& v, i64 panel, i64 k0, i64 k, i64 count, float) {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x) + panel * kPanel * v.sc;
    const i64 channels = smaller(kPanel, v.c - panel * kPanel), padded = ceil_div(count, kTiled) * kTiled;
    for (i64 c = 0; c < kPanel; c += 4) {
      const uint32_t* rows[4];
      for (i64 i = 0; i < 4; ++i) {
        if (c + 8 + i < channels) expect_pixels(bits + (c + 8 + i) * v.sc, v, k0 + k, count);
        uint16_t* row = rows_.get() + (panel * kPanel + c + i) * ld_ + k;
        const i64 found = c + i < channels ? count : 0;
        if (found) {
          const uint16_t* p = read_pixels(bits + (c + i) * v.sc, v, k0 + k, count, row);
          if (p != row) std::copy(p, p + count, row);
        }
        std::fill(row + found, row + padded, uint16_t(0));
        rows[i] = reinterpret_cast<const uint32_t*>(row);
      }
      transpose_four(rows, padded / 2, 0u, pairs_.get() + (panel * block_ + k) / 2 * kPanel + c);
    }
  }

  RFSR_AMX void add_product(TilePair pair, i64, i64 k, i64 depth, double sign, double* out) {
    alignas(64) float sum[kTiled][kTiled];
    tiles_.clear();
    tiles_.add(rows_.get() + pair.i * kPanel * ld_ + k, ld_, pairs_.get() + (pair.j * block_ + k) / 2 * kPanel, depth);
    tiles_.store(sum);
    for (i64 i = 0; i < kTiled; ++i)
      for (i64 j = 0; j < kTiled; ++j) out[i * kPanel + j] += sign * static_cast<double>(sum[i][j]);
  }

  void add_rows(i64, i64, double*) const {}  // never wanted: that is with a shift, which is taken out in fp32

 private:
  i64 block_, ld_;
  Buffer<uint16_t> rows_;
  Buffer<uint32_t> pairs_;
  Tiles tiles_;
};
#endif

// Sums of one sample, in fp64: of its rows, and a 32 x 32 block for each pair of panels of the lower triangle; each for
// some slices of the pixels.
struct Sums {
  explicit Sums(const Strided4& v)
      : panels(ceil_div(v.c, kPanel)),
        pairs(panels * (panels + 1) / 2),
        slices(larger(1, smaller(ceil_div(v.pixels(), kSlice), kSums / (pairs * kPanel * kPanel)))),
        slice(ceil_div(ceil_div(v.pixels(), slices), kPiece) * kPiece),
        blocks(slices * pairs * kPanel * kPanel),
        rows(slices * panels * kPanel) {}
  void clear() {
    std::fill(block(0, 0), block(slices, 0), 0.0);
    std::fill(rows.begin(), rows.end(), 0.0);
  }
  double* block(i64 index, i64 pair) const { return blocks.get() + (index * pairs + pair) * kPanel * kPanel; }

  i64 panels, pairs, slices, slice;  // slice: its pixels
  Buffer<double> blocks;             // of the first slice, then of the second ...; nothing until it is cleared
  std::vector<double> rows;
};

// sums += sign * (F - shift) (F - shift)^T over all pixels, and the sums of F - shift if they are wanted.
template <class Packed, class T>
void accumulate(const T* x, const Strided4& v, acc_t<T> shift, double sign, bool wants_rows, Sums& sums) {
  // A task is a strip of a pair of panels, in one slice.
  const i64 tasks = sums.pairs * Packed::kStrips, pixels = v.pixels();
  const i64 fitting = larger(Packed::kElements / (sums.panels * kPanel) / Packed::kDepth, 1) * Packed::kDepth;
  const i64 block = smaller(sums.slice, fitting), work = sums.slice * kPanel * kPanel / Packed::kStrips;
  torch::stable::parallel_for(0, sums.slices * tasks, grain(work), [&](i64 begin, i64 end) {
    Packed packed(sums.panels, block);
    for (i64 slice = begin / tasks; slice * tasks < end; ++slice) {
      const i64 first = larger(begin - slice * tasks, 0), last = smaller(end - slice * tasks, tasks);
      const i64 needed = triangle((last - 1) / Packed::kStrips).i + 1, stop = smaller((slice + 1) * sums.slice, pixels);
      for (i64 k0 = slice * sums.slice; k0 < stop; k0 += block) {
        const i64 count = smaller(block, stop - k0);
        for (i64 panel = 0; panel < needed; ++panel)
          for (i64 k = 0; k < count; k += kPiece) packed.pack(x, v, panel, k0, k, smaller(kPiece, count - k), shift);
        // Who has the last tile has packed all panels.
        for (i64 panel = 0; wants_rows && last == tasks && panel < needed; ++panel)
          packed.add_rows(panel, count, sums.rows.data() + (slice * sums.panels + panel) * kPanel);
        // Neighbouring tasks need the same panels at the same pixels, which so stay in the fastest cache.
        for (i64 k = 0; k < count; k += Packed::kDepth)
          for (i64 task = first; task < last; ++task) {
            const i64 pair = task / Packed::kStrips, strip = task % Packed::kStrips;
            const i64 depth = smaller(Packed::kDepth, count - k);
            packed.add_product(triangle(pair), strip, k, depth, sign, sums.block(slice, pair));
          }
      }
    }
  });
}

template <class T>
void accumulate(const T* x, const Strided4& v, std::optional<acc_t<T>> shift, double sign, Sums& sums) {
#ifdef RFSR_AMX
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    if (!shift && has_amx()) return accumulate<Pairs>(x, v, 0, sign, false, sums);
  }
#endif
  accumulate<Columns<acc_t<T>>>(x, v, shift.value_or(0), sign, shift.has_value(), sums);
}

// Adds up the slices, writes out = sums / (C H W), both triangles, and returns the criterion of it.
template <class Acc>
double finish(Sums& sums, const Strided4& v, i64 criterion, Acc* out) {
  const double scale = 1.0 / static_cast<double>(v.c * v.pixels());
  std::vector<double> totals(static_cast<size_t>(sums.pairs));
  torch::stable::parallel_for(0, sums.pairs, grain(kPanel * kPanel), [&](i64 begin, i64 end) {
    for (i64 pair = begin; pair < end; ++pair) {
      double *block = sums.block(0, pair), lanes[kPanel] = {};
      for (i64 slice = 1; slice < sums.slices; ++slice)
        for (i64 i = 0; i < kPanel * kPanel; ++i) block[i] += sums.block(slice, pair)[i];
      const i64 i0 = triangle(pair).i * kPanel, j0 = triangle(pair).j * kPanel;
      const i64 height = smaller(kPanel, v.c - i0), width = smaller(kPanel, v.c - j0);
      for (i64 i = 0; j0 == i0 && i < height; ++i)  // on the diagonal only the lower triangle is there
        for (i64 j = i + 1; j < width; ++j) block[i * kPanel + j] = block[j * kPanel + i];
      for (i64 i = 0; i < height; ++i)
        for (i64 j = 0; j < width; ++j) {
          const double d = scale * block[i * kPanel + j];
          out[(i0 + i) * v.c + j0 + j] = static_cast<Acc>(d);
          lanes[j] += (j0 < i0 ? 2 : 1) * criterion_term(criterion, d);
        }
      for (i64 j = 0; j0 < i0 && j < width; ++j)
        for (i64 i = 0; i < height; ++i) out[(j0 + j) * v.c + i0 + i] = out[(i0 + i) * v.c + j0 + j];
      for (double lane : lanes) totals[pair] += lane;
    }
  });
  double total = 0;
  for (double part : totals) total += part;
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
      std::optional<Acc> off;
      if (shift) off = data<Acc>(*shift)[n * shift->stride(0)];
      accumulate<T>(data<T>(features) + n * v.sn, v, off, 1.0, sums);
      finish(sums, v, kL2, mutable_data<Acc>(gram) + n * v.c * v.c);
      for (i64 c = 0; shift && c < v.c; ++c) {
        double sum = 0;
        for (i64 slice = 0; slice < sums.slices; ++slice) sum += sums.rows[slice * sums.panels * kPanel + c];
        mutable_data<Acc>(means)[n * v.c + c] = static_cast<Acc>(sum / static_cast<double>(v.pixels()));
      }
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
      accumulate<T>(data<T>(features) + n * vx.sn, vx, {}, 1.0, sums);
      accumulate<T>(data<T>(target) + n * vy.sn, vy, {}, -1.0, sums);
      total += finish(sums, vx, criterion, mutable_data<Acc>(difference) + n * vx.c * vx.c);
    }
    *mutable_data<Acc>(loss) = static_cast<Acc>(total / static_cast<double>(vx.n));
  });
  return {loss, difference};
}

// --------------------------------------------------------------------------------------- backward

// Distance of packed rows that hold `count` pixels: rows a power of two apart would fall on the same cache lines.
inline i64 row_length(i64 count) { return (ceil_div(count, kPanel) + 1) * kPanel; }

// Packs pixels [k0, k0 + count) of all channels as rows of ld values, zero up to whole panels.
template <class T, class Acc>
void pack_rows(const T* x, const Strided4& v, i64 k0, i64 count, Acc* out, i64 ld) {
  // Where pixels are not neighbours, all channels of a few are read before the next: they may share cache lines.
  const i64 run = v.flat() && v.sw == 1 ? count : kPanel;
  for (i64 k = 0; k < count; k += run)
    for (i64 c = 0; c < v.c; ++c) {
      Acc* row = out + c * ld + k;
      const i64 some = smaller(run, count - k);
      const Acc* p = read_pixels(x + c * v.sc, v, k0 + k, some, row);
      if (p != row) std::copy(p, p + some, row);
    }
  const i64 padded = ceil_div(count, kPanel) * kPanel;
  for (i64 c = 0; c < v.c; ++c) std::fill(out + c * ld + count, out + c * ld + padded, Acc(0));
}

// out[n, c, k] = bias[n, c] + sum_p s[n, p, c] F[n, p, k]
template <class T>
void backward_kernel(const Tensor& s, const T* x, const Strided4& v, const Tensor* bias, T* out) {
  using Acc = acc_t<T>;
  const i64 strips = ceil_div(v.c, kStrip), pixels = v.pixels(), panels = ceil_div(pixels, kPanel);
  const i64 group = larger(1, kShare / v.c / kPanel);  // panels that share one reading of S
  Buffer<Acc> packed(strips * kStrip * v.c);           // S as [strip][p][8]
  std::vector<Acc> biases(static_cast<size_t>(strips * kStrip));
  for (i64 n = 0; n < v.n; ++n) {
    const Acc* matrix = data<Acc>(s) + n * s.stride(0);
    torch::stable::parallel_for(0, strips, grain(v.c * kStrip), [&](i64 begin, i64 end) {
      for (i64 p0 = 0; p0 < v.c; p0 += 16)  // a few rows of S at a time, which stay in the first-level cache
        for (i64 strip = begin; strip < end; ++strip)
          for (i64 p = p0; p < smaller(p0 + 16, v.c); ++p) {
            const i64 c = strip * kStrip, some = smaller(kStrip, v.c - c);
            Acc* o = packed.get() + (c * v.c + p * kStrip);
            const Acc* row = load_row(matrix + p * s.stride(1) + c * s.stride(2), s.stride(2), some, o);
            if (row != o) std::copy(row, row + some, o);
            std::fill(o + some, o + kStrip, Acc(0));
          }
    });
    for (i64 c = 0; bias && c < v.c; ++c) biases[c] = data<Acc>(*bias)[n * bias->stride(0) + c * bias->stride(1)];
    torch::stable::parallel_for(0, panels, grain(v.c * v.c * kPanel), [&](i64 begin, i64 end) {
      const i64 ld = row_length(smaller(group, end - begin) * kPanel);
      Buffer<Acc> rows(v.c * ld);
      Acc part[kStrip * kPanel];
      const auto store = [](auto... arguments) {
        has_avx512() ? store_wide(arguments...) : narrow_store(arguments...);
      };
      for (i64 b = begin; b < end; b += group) {
        const i64 k0 = b * kPanel, count = smaller(smaller(group, end - b) * kPanel, pixels - k0);
        pack_rows(x + n * v.sn, v, k0, count, rows.get(), ld);
        for (i64 c = 0; c < v.c; c += kStrip)
          for (i64 k = 0; k < count; k += kPanel) {
            T* o = out + (n * v.c + c) * pixels + k0 + k;
            const i64 height = smaller(kStrip, v.c - c), some = smaller(kPanel, count - k);
            const Acc *strip = packed.get() + c * v.c, *panel = rows.get() + k;
            if constexpr (std::is_same_v<T, Acc>) {
              if (height == kStrip && some == kPanel) {
                store(strip, panel, ld, v.c, biases.data() + c, o, pixels);
                continue;
              }
            }
            store(strip, panel, ld, v.c, biases.data() + c, part, kPanel);
            for (i64 i = 0; i < height; ++i) convert_row(part + i * kPanel, some, o + i * pixels);
          }
      }
    });
  }
}

#ifdef RFSR_AMX
// high + low = S^T but for a 2^-17th of each entry, [channels][ld] with zeros beyond the last channel
void split_transposed(const Tensor& s, i64 n, i64 c, i64 channels, i64 ld, uint16_t* high, uint16_t* low) {
  const float* matrix = data<float>(s) + n * s.stride(0);
  torch::stable::parallel_for(0, channels / kTiled, grain(channels * kTiled), [&](i64 begin, i64 end) {
    float row[kTiled];
    torch::headeronly::BFloat16 upper[kTiled][kTiled], rest[kTiled][kTiled];
    for (i64 j0 = begin * kTiled; j0 < end * kTiled; j0 += kTiled)
      for (i64 i0 = 0; i0 < channels; i0 += kTiled) {  // block by block: both are read or written along short rows
        const i64 height = smaller(kTiled, c - i0), width = smaller(kTiled, c - j0);
        for (i64 i = 0; i < height; ++i) {
          const float* p = load_row(matrix + (i0 + i) * s.stride(1) + j0 * s.stride(2), s.stride(2), width, row);
          split_row(p, width, upper[i], rest[i]);
        }
        for (i64 j = 0; j < kTiled; ++j)
          for (i64 i = 0; i < kTiled; ++i) {
            const bool there = i < height && j < width;
            high[(j0 + j) * ld + i0 + i] = there ? upper[i][j].x : 0;
            low[(j0 + j) * ld + i0 + i] = there ? rest[i][j].x : 0;
          }
      }
  });
}

RFSR_AMX void interleave(const uint16_t* even, const uint16_t* odd, i64 count, uint32_t* out) {
  for (i64 k = 0; k < count; ++k) out[k] = even[k] | static_cast<uint32_t>(odd[k]) << 16;
}

RFSR_AMX void backward_tiles(const Tensor& s, const uint16_t* x, const Strided4& v, const Tensor* bias, uint16_t* out) {
  const i64 channels = ceil_div(v.c, kTiled) * kTiled, ld = channels + kTiled, pixels = v.pixels();
  const i64 panels = ceil_div(pixels, kPanel), group = larger(1, kShare / channels / kPanel);
  Buffer<uint16_t> high(channels * ld), low(channels * ld);
  std::vector<float> biases(static_cast<size_t>(channels));
  for (i64 n = 0; n < v.n; ++n) {
    split_transposed(s, n, v.c, channels, ld, high.get(), low.get());
    for (i64 c = 0; bias && c < v.c; ++c) biases[c] = data<float>(*bias)[n * bias->stride(0) + c * bias->stride(1)];
    torch::stable::parallel_for(0, panels, grain(v.c * v.c * 2), [&](i64 begin, i64 end) {
      const i64 most = smaller(group, end - begin) * kPanel;
      Buffer<uint32_t> packed(most * channels / 2);  // [panel][p / 2][32 pixels][2]
      std::vector<uint16_t> scratch(static_cast<size_t>(3 * most));
      alignas(64) float sum[kTiled][kTiled];
      Tiles tiles;
      for (i64 b = begin; b < end; b += group) {
        const i64 k0 = b * kPanel, count = smaller(smaller(group, end - b) * kPanel, pixels - k0);
        for (i64 p = 0; p < channels; p += 2) {
          const uint16_t* rows[2];
          for (i64 i = 0; i < 2; ++i) {
            rows[i] = scratch.data() + 2 * most;  // zeros
            if (p + i < v.c) {
              rows[i] = read_pixels(x + n * v.sn + (p + i) * v.sc, v, k0, count, scratch.data() + i * most);
              if (p + 8 + i < v.c) expect_pixels(x + n * v.sn + (p + 8 + i) * v.sc, v, k0, count);
            }
          }
          for (i64 k = 0; k < count; k += kPanel) {
            uint32_t* pairs = packed.get() + (k * channels + p * kPanel) / 2;
            const i64 some = smaller(kPanel, count - k);
            interleave(rows[0] + k, rows[1] + k, some, pairs);
            std::fill(pairs + some, pairs + kPanel, 0u);
          }
        }
        for (i64 c = 0; c < v.c; c += kTiled)
          for (i64 k = 0; k < count; k += kPanel) {
            const i64 height = smaller(kTiled, v.c - c), some = smaller(kPanel, count - k);
            const uint32_t* panel = packed.get() + k * channels / 2;
            tiles.clear();
            tiles.add(high.get() + c * ld, ld, panel, channels);
            tiles.add(low.get() + c * ld, ld, panel, channels);
            tiles.store(sum);
            uint16_t* o = out + (n * v.c + c) * pixels + k0 + k;
            for (i64 i = 0; i < height; ++i, o += pixels) {
              uint16_t row[kPanel];
              store_row(sum[i], biases[c + i], some == kPanel ? o : row);
              if (some < kPanel) std::copy(row, row + some, o);
            }
          }
      }
    });
  }
}
#endif

Tensor gram_backward(const Tensor& s, const Tensor& features, std::optional<Tensor> bias) {
  const Strided4 v = view4(features, "features");
  check_per_sample(s, features, "s", {v.n, v.c, v.c});
  check_per_sample(bias, features, "bias", {v.n, v.c});
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.h, v.w}, features.scalar_type());
  expect_writes(out.mutable_data_ptr(), out.numel() * out.element_size());
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
#ifdef RFSR_AMX
    if (std::is_same_v<T, torch::headeronly::BFloat16> && has_amx())
      return backward_tiles(s, data<uint16_t>(features), v, bias ? &*bias : nullptr, mutable_data<uint16_t>(out));
#endif
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
