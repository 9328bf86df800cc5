// The Gram's forward and backward of bf16 by AMX: 32 x 32 products that stay bf16, and S as two bf16 matrices.
#pragma once

#include "amx.h"
#include "gram_tiles.h"

#ifdef RFSR_AMX
namespace rfsr {
namespace {

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
    const i64 channels = min(kPanel, v.c - panel * kPanel), padded = ceil_div(count, kTiled) * kTiled;
    for (i64 c = 0; c < kPanel; c += 4) {
      const uint32_t* rows[4];
      for (i64 i = 0; i < 4; ++i) {
        if (c + 8 + i < channels) prefetch_pixels(bits + (c + 8 + i) * v.sc, v, k0 + k, count);
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

// high + low = S^T but for a 2^-17th of each entry, [channels][ld] with zeros beyond the last channel
void split_transposed(const Tensor& s, i64 n, i64 c, i64 channels, i64 ld, uint16_t* high, uint16_t* low) {
  const float* matrix = data<float>(s) + n * s.stride(0);
  torch::stable::parallel_for(0, channels / kTiled, grain(channels * kTiled), [&](i64 begin, i64 end) {
    float row[kTiled];
    torch::headeronly::BFloat16 upper[kTiled][kTiled], rest[kTiled][kTiled];
    for (i64 j0 = begin * kTiled; j0 < end * kTiled; j0 += kTiled)
      for (i64 i0 = 0; i0 < channels; i0 += kTiled) {  // block by block: both are read or written along short rows
        const i64 height = min(kTiled, c - i0), width = min(kTiled, c - j0);
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
  const i64 panels = ceil_div(pixels, kPanel), group = max(1, kShare / channels / kPanel);
  Buffer<uint16_t> high(channels * ld), low(channels * ld);
  std::vector<float> biases(static_cast<size_t>(channels));
  for (i64 n = 0; n < v.n; ++n) {
    split_transposed(s, n, v.c, channels, ld, high.get(), low.get());
    for (i64 c = 0; bias && c < v.c; ++c) biases[c] = data<float>(*bias)[n * bias->stride(0) + c * bias->stride(1)];
    torch::stable::parallel_for(0, panels, grain(v.c * v.c * 2), [&](i64 begin, i64 end) {
      const i64 most = min(group, end - begin) * kPanel;
      Buffer<uint32_t> packed(most * channels / 2);  // [panel][p / 2][32 pixels][2]
      std::vector<uint16_t> scratch(static_cast<size_t>(3 * most));
      alignas(64) float sum[kTiled][kTiled];
      Tiles tiles;
      for (i64 b = begin; b < end; b += group) {
        const i64 k0 = b * kPanel, count = min(min(group, end - b) * kPanel, pixels - k0);
        for (i64 p = 0; p < channels; p += 2) {
          const uint16_t* rows[2];
          for (i64 i = 0; i < 2; ++i) {
            rows[i] = scratch.data() + 2 * most;  // zeros
            if (p + i < v.c) {
              rows[i] = read_pixels(x + n * v.sn + (p + i) * v.sc, v, k0, count, scratch.data() + i * most);
              if (p + 8 + i < v.c) prefetch_pixels(x + n * v.sn + (p + 8 + i) * v.sc, v, k0, count);
            }
          }
          for (i64 k = 0; k < count; k += kPanel) {
            uint32_t* pairs = packed.get() + (k * channels + p * kPanel) / 2;
            const i64 some = min(kPanel, count - k);
            interleave(rows[0] + k, rows[1] + k, some, pairs);
            std::fill(pairs + some, pairs + kPanel, 0u);
          }
        }
        for (i64 c = 0; c < v.c; c += kTiled)
          for (i64 k = 0; k < count; k += kPanel) {
            const i64 height = min(kTiled, v.c - c), some = min(kPanel, count - k);
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

}  // namespace
}  // namespace rfsr
#endif
