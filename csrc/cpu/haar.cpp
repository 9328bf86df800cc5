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
// Deterministic: every output is written by one thread. The loss adds rows of a sample in groups whose size
// depends on the shape alone, within a group in a fixed order of lanes, and adds groups and samples in index
// order in fp64, so the bits do not depend on the number of threads.
//
// Limits: one level (rfsr_ext/ops/haar.py repeats it); gradients come out contiguous whatever the input's layout.

#include <vector>

#include "../haar.h"
#include "rows.h"

namespace rfsr {
namespace {

constexpr i64 kTile = 512;  // LL coefficients at a time: its input rows (4 x 4 kB in fp32) fit the L1 cache
constexpr int kLanes = 16;  // independent partial sums: enough to hide the latency of an addition

// ------------------------------------------------------------------ rows of fp32 or fp64 numbers
// target_clones cannot be put on templates, so each pass has a plain function per accumulation type.

#define RFSR_ROW_PASSES(Acc)                                                                                         \
  RFSR_CLONES void add_rows(const Acc* a, const Acc* b, i64 count, Acc* e) {                                         \
    for (i64 k = 0; k < count; ++k) e[k] = a[k] + b[k];                                                              \
  }                                                                                                                  \
  /* Differences come first: close images cancel exactly. */                                                         \
  RFSR_CLONES void add_differences(const Acc* a, const Acc* b, const Acc* p, const Acc* q, i64 count, Acc* e) {      \
    for (i64 k = 0; k < count; ++k) e[k] = (a[k] - p[k]) + (b[k] - q[k]);                                            \
  }                                                                                                                  \
  RFSR_CLONES void scale_row(Acc weight, i64 count, Acc* e) {                                                        \
    for (i64 k = 0; k < count; ++k) e[k] *= weight;                                                                  \
  }                                                                                                                  \
  RFSR_CLONES void add_weighted(Acc weight, const Acc* a, i64 count, Acc* e) {                                       \
    for (i64 k = 0; k < count; ++k) e[k] += weight * a[k];                                                           \
  }                                                                                                                  \
  RFSR_CLONES void pair_up(const Acc* e, Acc weight, i64 pairs, Acc* out) {                                          \
    for (i64 j = 0; j < pairs; ++j) out[j] = (e[2 * j] + e[2 * j + 1]) * weight;                                     \
  }                                                                                                                  \
  /* d = pairs of e; lanes[l] += sum of |d[j]| over j = l mod kLanes. */                                             \
  RFSR_CLONES void pair_up_and_add(const Acc* e, i64 pairs, Acc* d, Acc* lanes) {                                    \
    for (i64 j = 0; j < pairs; ++j) d[j] = e[2 * j] + e[2 * j + 1];                                                  \
    i64 j = 0;                                                                                                       \
    for (; j + kLanes <= pairs; j += kLanes)                                                                         \
      for (int l = 0; l < kLanes; ++l) lanes[l] += std::fabs(d[j + l]);                                              \
    for (int l = 0; j + l < pairs; ++l) lanes[l] += std::fabs(d[j + l]);                                             \
  }                                                                                                                  \
  RFSR_CLONES void clamp_row(const Acc* x, Range<Acc> range, i64 count, Acc* out) {                                  \
    for (i64 k = 0; k < count; ++k) out[k] = range.clamped(x[k]);                                                    \
  }
RFSR_ROW_PASSES(float)
RFSR_ROW_PASSES(double)

template <class Acc>
RFSR_INLINE void pack_signs(const Acc* d, i64 count, uint8_t* out) {
  i64 j = 0;
  for (; j + kCodesPerByte <= count; j += kCodesPerByte)
    out[j / kCodesPerByte] = static_cast<uint8_t>(sign_code(d[j]) | sign_code(d[j + 1]) << 2 |
                                                  sign_code(d[j + 2]) << 4 | sign_code(d[j + 3]) << 6);
  if (j < count) {
    uint8_t byte = 0;
    for (i64 k = j; k < count; ++k) byte = static_cast<uint8_t>(byte | sign_code(d[k]) << (2 * (k - j)));
    out[j / kCodesPerByte] = byte;
  }
}

template <class Acc>
RFSR_INLINE void pack_inside(const Acc* x, const Range<Acc>& range, i64 count, uint8_t* out) {
  for (i64 k = 0; k < count; k += 8) {
    int byte = 0;
    for (i64 q = 0; q < smaller(8, count - k); ++q) byte |= range.inside(x[k + q]) << q;
    out[k / 8] = static_cast<uint8_t>(byte);
  }
}

// ------------------------------------------------------------------------------------- forward

// Sums of row pairs, tile by tile from the left; ends the row as the mode says where the width is odd.
template <class Acc>
struct RowEnd {
  i64 width;
  HaarEdge edge;
  Acc first = 0, before = 0;  // of the whole row: its first sum, and the last of the tile before

  void finish(i64 column, i64 count, Acc* e) {
    if (column == 0) first = before = e[0];
    if (count % 2 == 1) {
      const HaarTerms terms = haar_pair(haar_size(width) - 1, width, edge);
      const Acc samples[3] = {e[count - 1], count > 1 ? e[count - 2] : before, first};
      Acc sum = 0;
      for (int t = 0; t < 3; ++t)
        if (terms.has(t)) sum += static_cast<Acc>(terms.weight[t]) * samples[t];
      e[count - 1] = sum;
      e[count] = 0;
    }
    before = e[count - 1];
  }
};

RFSR_INLINE bool is_whole_pair(const HaarTerms& rows) { return rows.weight[1] == 1 && rows.weight[0] == 1; }

template <class T, class Out>
void ll_kernel(const T* x, const Strided4& v, HaarEdge edge, Out* out) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(v.h), w = haar_size(v.w);
  torch::stable::parallel_for(0, v.n * v.c * h, grain(2 * v.w), [&](i64 begin, i64 end) {
    Acc a[2 * kTile], b[2 * kTile], e[2 * kTile], ll[kTile];
    for (i64 row = begin; row < end; ++row) {
      const i64 plane = row / h, n = plane / v.c, c = plane % v.c;
      const HaarTerms rows = haar_pair(row % h, v.h, edge);
      RowEnd<Acc> row_end{v.w, edge};
      for (i64 j = 0; j < w; j += kTile) {
        const i64 pairs = smaller(kTile, w - j), count = smaller(2 * pairs, v.w - 2 * j);
        const auto load = [&](int t, Acc* scratch) {
          return load_row(x + v.at(n, c, rows.index[t], 2 * j), v.sw, count, scratch);
        };
        if (is_whole_pair(rows)) {
          add_rows(load(0, a), load(1, b), count, e);
        } else {
          std::fill(e, e + count, Acc(0));
          for (int t = 0; t < 3; ++t)
            if (rows.has(t)) add_weighted(static_cast<Acc>(rows.weight[t]), load(t, a), count, e);
        }
        row_end.finish(2 * j, count, e);
        if constexpr (std::is_same_v<Out, Acc>) {
          pair_up(e, Acc(0.5), pairs, out + row * w + j);
        } else {
          pair_up(e, Acc(0.5), pairs, ll);
          convert_row(ll, pairs, out + row * w + j);
        }
      }
    }
  });
}

// An image, its clamping, and where the bits of the pixels that are not clamped go.
template <class T>
struct Input {
  using Acc = acc_t<T>;
  const T* x;
  Strided4 v;
  Range<Acc> range;
  uint8_t* kept;  // null: no bits
  Kept layout;
  int mask;  // which block of bits

  // `count` pixels of a row; `fresh` unless the row has been here before.
  RFSR_INLINE const Acc* load(i64 n, i64 c, i64 r, i64 column, i64 count, bool fresh, Acc* scratch) const {
    const Acc* row = load_row(x + v.at(n, c, r, column), v.sw, count, scratch);
    if (!range.active) return row;
    if (kept && fresh) pack_inside(row, range, count, kept + layout.mask_row(mask, n, c, r) + column / 8);
    clamp_row(row, range, count, scratch);
    return scratch;
  }
};

// sums[n] = sum of |LL(pred) - LL(target)| of sample n; writes sign codes when `kept` is not null.
template <class T>
void l1_kernel(const Input<T>& pred, const Input<T>& target, HaarEdge edge, uint8_t* kept, const Kept& layout,
               std::vector<double>& sums) {
  using Acc = acc_t<T>;
  const Strided4& v = pred.v;
  const i64 h = haar_size(v.h), w = haar_size(v.w), rows = v.c * h;
  // Rows per partial sum: by shape alone, so that threads only decide who computes it. Few enough terms
  // (some 2^14 over 16 lanes) for fp32 to keep six digits.
  const i64 group = larger(1, 16384 / w), groups = ceil_div(rows, group);
  std::vector<double> partial(static_cast<size_t>(v.n * groups));
  torch::stable::parallel_for(0, v.n * groups, grain(4 * group * v.w), [&](i64 begin, i64 end) {
    Acc a[2 * kTile], b[2 * kTile], p[2 * kTile], q[2 * kTile], e[2 * kTile], d[kTile];
    for (i64 g = begin; g < end; ++g) {
      const i64 n = g / groups, start = g % groups * group;
      double sum = 0;
      for (i64 row = start; row < smaller(rows, start + group); ++row) {
        const i64 c = row / h, i = row % h;
        const HaarTerms terms = haar_pair(i, v.h, edge);
        RowEnd<Acc> row_end{v.w, edge};
        Acc lanes[kLanes] = {};
        for (i64 j = 0; j < w; j += kTile) {
          const i64 pairs = smaller(kTile, w - j), count = smaller(2 * pairs, v.w - 2 * j);
          const auto load = [&](const Input<T>& input, int t, bool fresh, Acc* scratch) {
            return input.load(n, c, terms.index[t], 2 * j, count, fresh, scratch);
          };
          if (is_whole_pair(terms)) {
            add_differences(load(pred, 0, true, a), load(pred, 1, true, b), load(target, 0, true, p),
                            load(target, 1, true, q), count, e);
          } else {
            std::fill(e, e + count, Acc(0));
            for (int t = 0; t < 3; ++t) {
              if (!terms.has(t)) continue;
              std::fill(b, b + count, Acc(0));
              add_differences(load(pred, t, t == 0, a), b, load(target, t, t == 0, p), b, count, q);
              add_weighted(static_cast<Acc>(terms.weight[t]), q, count, e);
            }
          }
          row_end.finish(2 * j, count, e);
          pair_up_and_add(e, pairs, d, lanes);
          if (kept) pack_signs(d, pairs, kept + layout.sign_row(n, c, i) + j / kCodesPerByte);
        }
        for (Acc lane : lanes) sum += lane;
      }
      partial[static_cast<size_t>(g)] = sum;
    }
  });
  for (i64 g = 0; g < v.n * groups; ++g) sums[static_cast<size_t>(g / groups)] += partial[static_cast<size_t>(g)];
}

// ------------------------------------------------------------------------------------ backward

// The rows of a gradient from those of the coefficients': coefficients(n, c, i, j, count, v) fills v with
// `count` of row i from column j on. finish(n, c, r, row) has the last word on each row.
template <class T, class Coefficients, class Finish>
void spread(T* grad, i64 samples, i64 channels, i64 height, i64 width, HaarEdge edge, const Coefficients& coefficients,
            const Finish& finish) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(height), w = haar_size(width);
  torch::stable::parallel_for(0, samples * channels * h, grain(2 * width), [&](i64 begin, i64 end) {
    Acc v[kTile], more[kTile];
    T narrow[kTile];
    for (i64 item = begin; item < end; ++item) {
      const i64 plane = item / h, n = plane / channels, c = plane % channels, top = 2 * (item % h);
      T* upper = grad + (plane * height + top) * width;
      // The gradient of a row's pair sums, from column j on.
      const auto gather = [&](const HaarTerms& rows, i64 j, i64 count) {
        coefficients(n, c, rows.index[0], j, count, v);
        if (rows.weight[0] != 1) scale_row(static_cast<Acc>(rows.weight[0]), count, v);
        for (int t = 1; t < 3; ++t) {
          if (!rows.has(t)) continue;
          coefficients(n, c, rows.index[t], j, count, more);
          add_weighted(static_cast<Acc>(rows.weight[t]), more, count, v);
        }
      };
      const auto fill = [&](const HaarTerms& rows, T* out) {
        for (i64 j = 0; j < w; j += kTile) {
          const i64 pairs = smaller(kTile, w - j), whole = smaller(pairs, width / 2 - j);
          gather(rows, j, pairs);
          const T* values = load_row(v, 1, pairs, narrow);
          for (i64 k = 0; k < whole; ++k) out[2 * (j + k)] = out[2 * (j + k) + 1] = values[k];
        }
        if (width % 2 == 0) return;
        for (const i64 k : {i64(0), larger(width - 2, 0), width - 1}) {  // what an odd end reaches
          const HaarTerms columns = haar_users(k, width, edge);
          Acc sum = 0;
          for (int t = 0; t < 3; ++t) {
            if (!columns.has(t)) continue;
            gather(rows, columns.index[t], 1);
            sum += static_cast<Acc>(columns.weight[t]) * v[0];
          }
          out[k] = static_cast<T>(sum);
        }
      };
      const auto plain = [](const HaarTerms& rows) { return rows.weight[0] == 1 && !rows.has(1) && !rows.has(2); };
      const HaarTerms rows = haar_users(top, height, edge);
      fill(rows, upper);
      if (top + 1 < height) {
        const HaarTerms next = haar_users(top + 1, height, edge);
        if (plain(rows) && plain(next))
          std::copy(upper, upper + width, upper + width);
        else
          fill(next, upper + width);
        finish(n, c, top + 1, upper + width);
      }
      finish(n, c, top, upper);
    }
  });
}

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
    const auto run = [&](const auto* g) {
      spread(
          mutable_data<T>(out), v.n, v.c, height, width, edge,
          [&](i64 n, i64 c, i64 i, i64 j, i64 count, Acc* values) {
            const Acc* row = load_row(g + v.at(n, c, i, j), v.sw, count, values);
            for (i64 k = 0; k < count; ++k) values[k] = row[k] * Acc(0.5);
          },
          [](i64, i64, i64, T*) {});
    };
    if (dtype == grad.scalar_type())
      run(data<T>(grad));
    else
      run(data<Acc>(grad));
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
  check_loss_grad(grad, reduction, kept.size(0), dtype);
  Tensor out = torch::stable::new_empty(kept, {kept.size(0), channels, height, width}, dtype);
  dispatch(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    // An empty batch has no coefficient to share the gradient between, and no pixel to write either.
    const i64 coefficients = channels * haar_size(height) * haar_size(width);
    const double over = 2 * static_cast<double>(divisor(reduction, larger(1, kept.size(0)), coefficients));
    const Acc factor = static_cast<Acc>(range_factor(low, high) / over);
    const Acc* g = data<Acc>(grad);
    const i64 stride = reduction == kNone ? grad.stride(0) : 0;
    const uint8_t* bits = data<uint8_t>(kept);
    spread(
        mutable_data<T>(out), kept.size(0), channels, height, width, edge,
        [&](i64 n, i64 c, i64 i, i64 j, i64 count, Acc* v) {
          const Acc one = g[n * stride] * factor;
          const Acc values[4] = {signed_value(kZero, one), signed_value(kPlus, one), signed_value(kMinus, one),
                                 signed_value(kNaN, one)};
          const uint8_t* codes = bits + layout.sign_row(n, c, i);
          for (i64 k = 0; k < count; ++k) v[k] = values[code_at(codes, j + k)];
        },
        [&](i64 n, i64 c, i64 r, T* row) {
          if (mask < 0) return;
          const uint8_t* inside = bits + layout.mask_row(static_cast<int>(mask), n, c, r);
          for (i64 k = 0; k < width; k += 8) {
            if (inside[k / 8] == 0xff) continue;
            for (i64 q = k; q < smaller(k + 8, width); ++q)
              if (!bit_at(inside, q)) row[q] = T(0);
          }
        });
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
