// Gradients of the pixels from those of the LL band, which are given (Band) or follow from the loss's signs (Signs).
#pragma once

#include "haar_rows.h"

namespace rfsr {
namespace {

// The rows of a gradient from those of the coefficients': source.read(n, c, i, j, count, v) fills v with `count` of
// row i from column j on, source.fill_pairs(n, c, i, pairs, out) writes each of the first `pairs` of row i to two
// neighbouring pixels, and source.clear_clamped_row(n, c, r, row) clears what was clamped in each row.
template <class T, class Source>
void spread(T* grad, i64 samples, i64 channels, i64 height, i64 width, HaarEdge edge, const Source& shared) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(height);
  advise_huge_pages(grad, samples * channels * height * width * static_cast<i64>(sizeof(T)));
  torch::stable::parallel_for(0, samples * channels * h, grain(2 * width), [&](i64 begin, i64 end) {
    Source source = shared;  // each thread has its own
    Acc v[kTile], more[kTile];
    for (i64 item = begin; item < end; ++item) {
      const i64 plane = item / h, n = plane / channels, c = plane % channels, top = 2 * (item % h);
      T* upper = grad + (plane * height + top) * width;
      // The gradient of a row's pair sums, from column j on.
      const auto gather = [&](const HaarTerms& rows, i64 j, i64 count) {
        source.read(n, c, rows.index[0], j, count, v);
        if (rows.weight[0] != 1) scale_row(static_cast<Acc>(rows.weight[0]), count, v);
        for (int t = 1; t < 3; ++t) {
          if (!rows.has(t)) continue;
          source.read(n, c, rows.index[t], j, count, more);
          add_weighted(static_cast<Acc>(rows.weight[t]), more, count, v);
        }
      };
      const auto plain = [](const HaarTerms& rows) { return rows.weight[0] == 1 && !rows.has(1) && !rows.has(2); };
      const auto fill = [&](const HaarTerms& rows, T* out) {
        if (plain(rows)) {
          source.fill_pairs(n, c, rows.index[0], width / 2, out);
        } else {
          for (i64 j = 0; j < width / 2; j += kTile) {
            const i64 pairs = min(kTile, width / 2 - j);
            gather(rows, j, pairs);
            for (i64 k = 0; k < pairs; ++k) out[2 * (j + k)] = out[2 * (j + k) + 1] = static_cast<T>(v[k]);
          }
        }
        if (width % 2 == 0) return;
        for (const i64 k : {i64(0), max(width - 2, 0), width - 1}) {  // what an odd end reaches
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
      const HaarTerms rows = haar_users(top, height, edge);
      fill(rows, upper);
      if (top + 1 < height) {
        const HaarTerms next = haar_users(top + 1, height, edge);
        if (plain(rows) && plain(next))
          std::copy(upper, upper + width, upper + width);
        else
          fill(next, upper + width);
        source.clear_clamped_row(n, c, top + 1, upper + width);
      }
      source.clear_clamped_row(n, c, top, upper);
    }
  });
}

// The gradient of an LL band.
template <class T, class G>
struct Band {
  using Acc = acc_t<T>;
  const G* grad;
  Strided4 v;

  void read(i64 n, i64 c, i64 i, i64 j, i64 count, Acc* values) const {
    const Acc* row = load_row(grad + v.at(n, c, i, j), v.sw, count, values);
    for (i64 k = 0; k < count; ++k) values[k] = row[k] * Acc(0.5);
  }
  void fill_pairs(i64 n, i64 c, i64 i, i64 pairs, T* out) const {
    Acc values[kTile];
    for (i64 j = 0; j < pairs; j += kTile) {
      const i64 count = min(kTile, pairs - j);
      read(n, c, i, j, count, values);
      for (i64 k = 0; k < count; ++k) out[2 * (j + k)] = out[2 * (j + k) + 1] = static_cast<T>(values[k]);
    }
  }
  void clear_clamped_row(i64, i64, i64, T*) const {}
};

// The gradient of the L1 loss, by the signs it kept.
template <class T>
struct Signs {
  using Acc = acc_t<T>;
  const uint8_t* bits;
  Kept layout;
  int mask;  // which block of inside bits, -1: none
  const Acc* grad;
  i64 stride;
  Acc factor;
  i64 sample = -1;  // whose values these are
  Acc values[4];
  T pixels[256][2 * kCodesPerByte];  // of every byte of codes the pixels that it stands for

  void look_up(i64 n) {
    if (sample == n) return;
    sample = n;
    const Acc one = grad[n * stride] * factor;
    for (int code = 0; code < 4; ++code) values[code] = signed_value(static_cast<uint8_t>(code), one);
    for (int byte = 0; byte < 256; ++byte)
      for (int k = 0; k < 2 * kCodesPerByte; ++k) pixels[byte][k] = static_cast<T>(values[byte >> (k / 2 * 2) & 3]);
  }
  void read(i64 n, i64 c, i64 i, i64 j, i64 count, Acc* v) {
    look_up(n);
    const uint8_t* codes = bits + layout.sign_row(n, c, i);
    for (i64 k = 0; k < count; ++k) v[k] = values[code_at(codes, j + k)];
  }
  void fill_pairs(i64 n, i64 c, i64 i, i64 pairs, T* out) {
    look_up(n);
    const uint8_t* codes = bits + layout.sign_row(n, c, i);
    const i64 whole = pairs / kCodesPerByte;
    for (i64 b = 0; b < whole; ++b, out += 2 * kCodesPerByte) std::copy_n(pixels[codes[b]], 2 * kCodesPerByte, out);
    if (pairs % kCodesPerByte != 0) std::copy_n(pixels[codes[whole]], 2 * (pairs % kCodesPerByte), out);
  }
  void clear_clamped_row(i64 n, i64 c, i64 r, T* row) const {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    if (mask < 0) return;
    clear_clamped(bits + layout.mask_row(mask, n, c, r), layout.width, reinterpret_cast<Bits*>(row));
  }
};

}  // namespace
}  // namespace rfsr
