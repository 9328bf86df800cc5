// The Gram's forward and backward by tiles in registers, for every dtype.
#pragma once

#include "gram_tiles.h"

namespace rfsr {
namespace {

// Panels of 32 channels as [k][32], and tiles of 8 x 32.
template <class Acc>
class Columns {
 public:
  static constexpr i64 kStrips = kPanel / kStrip, kDepth = 128, kElements = 65536;

  Columns(i64 panels, i64 block) : block_(block), packed_(panels * kPanel * block) {}

  // Packs pixels [k0 + k, k0 + k + count) of a panel, less `shift`; absent channels are zero.
  template <class T>
  void pack(const T* x, const Strided4& v, i64 panel, i64 k0, i64 k, i64 count, Acc shift) {
    const i64 channels = min(kPanel, v.c - panel * kPanel);
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
        if (c + 8 + i < channels) prefetch_pixels(base + (c + 8 + i) * v.sc, v, k0 + k, count);
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
    has_avx512() ? add_wide(a, b, depth, sign, columns, out) : add_narrow(a, b, depth, sign, columns, out);
  }

  // rows += the sums of a panel's channels over pixels [0, count)
  void add_rows(i64 panel, i64 count, double* rows) const {
    const Acc* p = packed_.get() + panel * block_ * kPanel;
    for (i64 k = 0; k < count; k += kDepth) {
      Acc part[kPanel] = {};
      for (i64 q = k; q < min(k + kDepth, count); ++q)
        for (i64 c = 0; c < kPanel; ++c) part[c] += p[q * kPanel + c];
      for (i64 c = 0; c < kPanel; ++c) rows[c] += static_cast<double>(part[c]);
    }
  }

 private:
  i64 block_;
  Buffer<Acc> packed_;
};

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
      const i64 some = min(run, count - k);
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
  const i64 group = max(1, kShare / v.c / kPanel);  // panels that share one reading of S
  Buffer<Acc> packed(strips * kStrip * v.c);           // S as [strip][p][8]
  std::vector<Acc> biases(static_cast<size_t>(strips * kStrip));
  for (i64 n = 0; n < v.n; ++n) {
    const Acc* matrix = data<Acc>(s) + n * s.stride(0);
    torch::stable::parallel_for(0, strips, grain(v.c * kStrip), [&](i64 begin, i64 end) {
      for (i64 p0 = 0; p0 < v.c; p0 += 16)  // a few rows of S at a time, which stay in the first-level cache
        for (i64 strip = begin; strip < end; ++strip)
          for (i64 p = p0; p < min(p0 + 16, v.c); ++p) {
            const i64 c = strip * kStrip, some = min(kStrip, v.c - c);
            Acc* o = packed.get() + (c * v.c + p * kStrip);
            const Acc* row = load_row(matrix + p * s.stride(1) + c * s.stride(2), s.stride(2), some, o);
            if (row != o) std::copy(row, row + some, o);
            std::fill(o + some, o + kStrip, Acc(0));
          }
    });
    for (i64 c = 0; bias && c < v.c; ++c) biases[c] = data<Acc>(*bias)[n * bias->stride(0) + c * bias->stride(1)];
    torch::stable::parallel_for(0, panels, grain(v.c * v.c * kPanel), [&](i64 begin, i64 end) {
      const i64 ld = row_length(min(group, end - begin) * kPanel);
      Buffer<Acc> rows(v.c * ld);
      Acc part[kStrip * kPanel];
      const auto store = [](auto... arguments) {
        has_avx512() ? store_wide(arguments...) : store_narrow(arguments...);
      };
      for (i64 b = begin; b < end; b += group) {
        const i64 k0 = b * kPanel, count = min(min(group, end - b) * kPanel, pixels - k0);
        pack_rows(x + n * v.sn, v, k0, count, rows.get(), ld);
        for (i64 c = 0; c < v.c; c += kStrip)
          for (i64 k = 0; k < count; k += kPanel) {
            T* o = out + (n * v.c + c) * pixels + k0 + k;
            const i64 height = min(kStrip, v.c - c), some = min(kPanel, count - k);
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

}  // namespace
}  // namespace rfsr
