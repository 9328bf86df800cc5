// Haar LL band and its L1 loss on the CPU.
//
//   LL[i,j]  = (x[2i,2j] + x[2i,2j+1] + x[2i+1,2j] + x[2i+1,2j+1]) / 2          (orthonormal Haar)
//   loss     = mean |LL(pred) - LL(target)| = mean |LL(pred - target)|          (arXiv 2412.03268, eq. 2)
//   backward : grad[r,c] = weight(r) * weight(c) * v[r/2, c/2],  v = gradient of the LL coefficient
//
// At an odd end the missing sample repeats the last one (symmetric extension), which is weight 2 there.
//
// Per input pixel, s = bytes per element:
//   haar_ll          reads s, writes s/4;      1 FLOP
//   loss             reads 2s, writes 1/16 B (signs, only if a gradient is wanted);   about 2.5 FLOP
//   loss backward    reads 1/16 B, writes s;   no arithmetic but the scaling
// All of it is bound by memory: on a desktop's 40 GB/s an 8x3x512x512 fp32 pair (50 MB) takes 1.3 ms
// at least.
//
// Deterministic: every output is written by one thread. The loss adds rows in groups whose size depends
// on the shape alone, within a group in a fixed order of lanes, and adds the groups in index order in
// fp64, so the bits do not depend on the number of threads.
//
// Limits: one level, symmetric extension; gradients come out contiguous whatever the input's layout.

#include <vector>

#include "rows.h"

namespace rfsr {
namespace {

constexpr i64 kTile = 512;  // LL coefficients at a time: its input rows (4 x 4 kB in fp32) fit the L1 cache
constexpr int kLanes = 16;  // independent partial sums: enough to hide the latency of an addition

// ------------------------------------------------------------------ rows of fp32 or fp64 numbers

// e[k] = a[k] + b[k] for k < count, extended to `even` values by repeating the last.
template <class Acc>
RFSR_INLINE void add_rows(const Acc* a, const Acc* b, i64 count, i64 even, Acc* e) {
  for (i64 k = 0; k < count; ++k) e[k] = a[k] + b[k];
  if (count < even) e[count] = e[count - 1];
}

// The same for the difference of two row pairs. Differences come first: close images cancel exactly.
template <class Acc>
RFSR_INLINE void add_differences(const Acc* a, const Acc* b, const Acc* p, const Acc* q, i64 count, i64 even, Acc* e) {
  for (i64 k = 0; k < count; ++k) e[k] = (a[k] - p[k]) + (b[k] - q[k]);
  if (count < even) e[count] = e[count - 1];
}

template <class Acc>
RFSR_INLINE void pair_up(const Acc* e, i64 count, Acc* out) {
  for (i64 j = 0; j < count; ++j) out[j] = e[2 * j] + e[2 * j + 1];
}

// lanes[l] += sum of |d[j]| over j = l mod kLanes.
template <class Acc>
RFSR_INLINE void add_magnitudes(const Acc* d, i64 count, Acc* lanes) {
  i64 j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += std::fabs(d[j + l]);
  for (int l = 0; j + l < count; ++l) lanes[l] += std::fabs(d[j + l]);
}

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

// target_clones cannot be put on templates, so each pass has a plain function per accumulation type.
#define RFSR_ROW_PASSES(Acc)                                                                                     \
  RFSR_CLONES void ll_pass(const Acc* a, const Acc* b, i64 count, i64 pairs, Acc* e, Acc* out) {                 \
    add_rows(a, b, count, 2 * pairs, e);                                                                         \
    pair_up(e, pairs, out);                                                                                      \
  }                                                                                                              \
  RFSR_CLONES void difference_pass(const Acc* a, const Acc* b, const Acc* p, const Acc* q, i64 count, i64 pairs, \
                                   Acc* e, Acc* d, Acc* lanes) {                                                 \
    add_differences(a, b, p, q, count, 2 * pairs, e);                                                            \
    pair_up(e, pairs, d);                                                                                        \
    add_magnitudes(d, pairs, lanes);                                                                             \
  }
RFSR_ROW_PASSES(float)
RFSR_ROW_PASSES(double)

// ----------------------------------------------------------------------------------- operators

// One LL row: which plane it lies in, and the two input rows it is made of.
struct Row {
  i64 n, c, first, second;
};
Row row_of(i64 row, i64 channels, i64 rows_per_plane, i64 height) {
  i64 i = row % rows_per_plane, plane = row / rows_per_plane;
  return {plane / channels, plane % channels, 2 * i, haar_second(i, height)};
}

template <class T>
void ll_kernel(const T* x, const Strided4& v, T* out) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(v.h), w = haar_size(v.w);
  torch::stable::parallel_for(0, v.n * v.c * h, grain(2 * v.w), [&](i64 begin, i64 end) {
    Acc a[2 * kTile], b[2 * kTile], e[2 * kTile], ll[kTile];
    for (i64 row = begin; row < end; ++row) {
      const Row r = row_of(row, v.c, h, v.h);
      for (i64 j = 0; j < w; j += kTile) {
        const i64 pairs = smaller(kTile, w - j), count = smaller(2 * pairs, v.w - 2 * j);
        ll_pass(load_row(x + v.at(r.n, r.c, r.first, 2 * j), v.sw, count, a),
                load_row(x + v.at(r.n, r.c, r.second, 2 * j), v.sw, count, b), count, pairs, e, ll);
        T* o = out + row * w + j;
        for (i64 k = 0; k < pairs; ++k) o[k] = static_cast<T>(ll[k] * Acc(0.5));
      }
    }
  });
}

// Returns the sum of |LL(x) - LL(y)|; writes sign codes when `signs` is not null.
template <class T>
double l1_kernel(const T* x, const Strided4& vx, const T* y, const Strided4& vy, uint8_t* signs) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(vx.h), w = haar_size(vx.w), rows = vx.n * vx.c * h, bytes = ceil_div(w, kCodesPerByte);
  // Rows per partial sum: by shape alone, so that threads only decide who computes it. Few enough terms
  // (some 2^14 over 16 lanes) for fp32 to keep six digits.
  const i64 group = larger(1, 16384 / larger(1, w)), groups = ceil_div(rows, group);
  std::vector<double> partial(static_cast<size_t>(groups));
  torch::stable::parallel_for(0, groups, grain(4 * group * vx.w), [&](i64 begin, i64 end) {
    Acc a[2 * kTile], b[2 * kTile], p[2 * kTile], q[2 * kTile], e[2 * kTile], d[kTile];
    for (i64 g = begin; g < end; ++g) {
      double sum = 0;
      for (i64 row = g * group; row < smaller(rows, (g + 1) * group); ++row) {
        const Row r = row_of(row, vx.c, h, vx.h);
        Acc lanes[kLanes] = {};
        for (i64 j = 0; j < w; j += kTile) {
          const i64 pairs = smaller(kTile, w - j), count = smaller(2 * pairs, vx.w - 2 * j);
          difference_pass(load_row(x + vx.at(r.n, r.c, r.first, 2 * j), vx.sw, count, a),
                          load_row(x + vx.at(r.n, r.c, r.second, 2 * j), vx.sw, count, b),
                          load_row(y + vy.at(r.n, r.c, r.first, 2 * j), vy.sw, count, p),
                          load_row(y + vy.at(r.n, r.c, r.second, 2 * j), vy.sw, count, q), count, pairs, e, d, lanes);
          if (signs) pack_signs(d, pairs, signs + row * bytes + j / kCodesPerByte);
        }
        for (Acc lane : lanes) sum += lane;
      }
      partial[static_cast<size_t>(g)] = sum;
    }
  });
  double total = 0;
  for (double value : partial) total += value;
  return total / 2;
}

// Writes the rows of a gradient from one row of coefficient gradients at a time: coefficients(row, j, pairs, v)
// fills v with them. A gather: each pixel belongs to one coefficient, so nothing is added up.
template <class T, class Coefficients>
void spread(T* grad, i64 planes, i64 height, i64 width, const Coefficients& coefficients) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(height), w = haar_size(width);
  torch::stable::parallel_for(0, planes * h, grain(2 * width), [&](i64 begin, i64 end) {
    Acc v[kTile];
    for (i64 row = begin; row < end; ++row) {
      const i64 first = 2 * (row % h), second = haar_second(row % h, height);
      T* plane = grad + row / h * height * width;
      for (i64 j = 0; j < w; j += kTile) {
        const i64 pairs = smaller(kTile, w - j), whole = smaller(pairs, width / 2 - j);
        coefficients(row, j, pairs, v);
        const Acc scale = static_cast<Acc>(haar_weight(first, height));
        T *upper = plane + first * width + 2 * j, *lower = plane + second * width + 2 * j;
        for (i64 k = 0; k < whole; ++k) upper[2 * k] = upper[2 * k + 1] = static_cast<T>(v[k] * scale);
        if (whole < pairs)
          upper[2 * whole] = static_cast<T>(v[whole] * scale * static_cast<Acc>(haar_weight(width - 1, width)));
        if (lower != upper) std::copy(upper, upper + smaller(2 * pairs, width - 2 * j), lower);
      }
    }
  });
}

Tensor haar_ll(const Tensor& x) {
  const Strided4 v = view4(x, "x");
  Tensor out = torch::stable::new_empty(x, {v.n, v.c, haar_size(v.h), haar_size(v.w)}, x.scalar_type());
  dispatch(x.scalar_type(), "x", [&](auto t) {
    using T = decltype(t);
    ll_kernel(data<T>(x), v, mutable_data<T>(out));
  });
  return out;
}

Tensor haar_ll_backward(const Tensor& grad, int64_t height, int64_t width) {
  const Strided4 v = view4(grad, "grad");
  STD_TORCH_CHECK(v.h == haar_size(height) && v.w == haar_size(width), "grad must be the gradient of an LL band of ",
                  height, " x ", width);
  Tensor out = torch::stable::new_empty(grad, {v.n, v.c, height, width}, grad.scalar_type());
  dispatch(grad.scalar_type(), "grad", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    const T* g = data<T>(grad);
    spread(mutable_data<T>(out), v.n * v.c, height, width, [&](i64 row, i64 j, i64 pairs, Acc* values) {
      const T* p = g + v.at(row / v.h / v.c, row / v.h % v.c, row % v.h, j);
      for (i64 k = 0; k < pairs; ++k) values[k] = static_cast<Acc>(p[k * v.sw]) * Acc(0.5);
    });
  });
  return out;
}

// -> (loss: scalar, signs: uint8 [N, C, h, ceil(w/4)], or empty unless keep_signs)
std::tuple<Tensor, Tensor> haar_ll_l1(const Tensor& pred, const Tensor& target, bool keep_signs) {
  const Strided4 vx = view4(pred, "pred"), vy = view4(target, "target");
  check_alike(pred, target, "target");
  const i64 h = haar_size(vx.h), w = haar_size(vx.w);
  Tensor loss = torch::stable::new_empty(pred, {}, acc_dtype(pred.scalar_type()));
  Tensor signs = keep_signs
                     ? torch::stable::new_empty(pred, {vx.n, vx.c, h, ceil_div(w, kCodesPerByte)}, ScalarType::Byte)
                     : torch::stable::new_empty(pred, {0}, ScalarType::Byte);
  dispatch(pred.scalar_type(), "pred", [&](auto t) {
    using T = decltype(t);
    const double sum =
        l1_kernel(data<T>(pred), vx, data<T>(target), vy, keep_signs ? mutable_data<uint8_t>(signs) : nullptr);
    *mutable_data<acc_t<T>>(loss) = static_cast<acc_t<T>>(sum / static_cast<double>(vx.n * vx.c * h * w));
  });
  return {loss, signs};
}

Tensor haar_ll_l1_backward(const Tensor& grad, const Tensor& signs, int64_t height, int64_t width, ScalarType dtype) {
  const i64 n = signs.size(0), c = signs.size(1), h = haar_size(height), w = haar_size(width);
  const i64 bytes = ceil_div(w, kCodesPerByte);
  STD_TORCH_CHECK(signs.is_contiguous() && signs.size(2) == h && signs.size(3) == bytes,
                  "signs must be what haar_ll_l1 returned for ", height, " x ", width);
  STD_TORCH_CHECK(grad.scalar_type() == acc_dtype(dtype), "grad must have the dtype of the loss");
  Tensor out = torch::stable::new_empty(signs, {n, c, height, width}, dtype);
  dispatch(dtype, "dtype", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    // An empty batch has no coefficient to share the gradient between, and no pixel to write either.
    const Acc g = *data<Acc>(grad) / static_cast<Acc>(2 * larger(1, n * c * h * w));
    const Acc values[4] = {signed_value(kZero, g), signed_value(kPlus, g), signed_value(kMinus, g),
                           signed_value(kNaN, g)};
    const uint8_t* codes = data<uint8_t>(signs);
    spread(mutable_data<T>(out), n * c, height, width, [&](i64 row, i64 j, i64 pairs, Acc* v) {
      for (i64 k = 0; k < pairs; ++k) v[k] = values[code_at(codes + row * bytes, j + k)];
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
