// Sums of outer products in registers, and what brings pixels into the order they need.
//
//   1  narrow: pieces of 3 rows and four 32-byte vectors, in clones for AVX2 and for SSE2
//   2  wide:   8 rows and two 64-byte vectors by AVX-512
//   3  csrc/cpu/gram_amx.h: 32 x 32 products of bf16 by the tile unit
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../gram.h"
#include "rows.h"

namespace rfsr {
namespace {

constexpr i64 kStrip = 8;        // tile height
constexpr i64 kPanel = 32;       // tile width
constexpr i64 kPiece = 128;      // pixels packed at a time
constexpr i64 kShare = 65536;    // elements of a packed block in the backward

// The sums are written as vectors because a compiler left to vectorise plain loops keeps them in memory, ten times
// slower; there are enough of them to hide the latency of the multiply-add.

template <class Acc, int kBytes>
struct Vector {
  typedef Acc type __attribute__((vector_size(kBytes), aligned(alignof(Acc)), may_alias));
};

// sum[i][j] = sum_k a[k * lda + i] b[k * ldb + j], for i of kRows and j of kVectors vectors.
template <int kRows, int kVectors, class Vec, class Acc>
RFSR_INLINE void multiply(const Acc* a, i64 lda, const Acc* b, i64 ldb, i64 depth, Vec (&sum)[kRows][kVectors]) {
  constexpr i64 lanes = sizeof(Vec) / sizeof(Acc);
  for (i64 k = 0; k < depth; ++k) {
    Acc factor[kRows];  // each read once, and each vector once: what is left of the registers is sums
#pragma GCC unroll 8
    for (i64 i = 0; i < kRows; ++i) factor[i] = a[k * lda + i];
#pragma GCC unroll 8
    for (i64 j = 0; j < kVectors; ++j) {
      const Vec row = *reinterpret_cast<const Vec*>(b + k * ldb + j * lanes);
#pragma GCC unroll 8
      for (i64 i = 0; i < kRows; ++i) sum[i][j] += factor[i] * row;
    }
  }
}

// out[i * kPanel + j] += sign * sum_k a[k * kPanel + i] b[k * kPanel + j], for i < height in pieces of kRows and for
// j of kVectors vectors of kBytes.
template <int kRows, int kVectors, int kBytes, class Acc>
RFSR_INLINE void add_tile(const Acc* a, const Acc* b, i64 height, i64 depth, double sign, double* out) {
  using Vec = typename Vector<Acc, kBytes>::type;
  constexpr i64 width = kVectors * kBytes / sizeof(Acc);
  i64 i0 = 0;
  for (; i0 + kRows <= height; i0 += kRows) {
    Vec sum[kRows][kVectors] = {};
    multiply(a + i0, kPanel, b, kPanel, depth, sum);
#pragma GCC unroll 8
    for (i64 i = 0; i < kRows; ++i) {
      Acc part[width];
#pragma GCC unroll 8
      for (i64 j = 0; j < kVectors; ++j) reinterpret_cast<Vec*>(part)[j] = sum[i][j];
      double* o = out + (i0 + i) * kPanel;
      for (i64 j = 0; j < width; ++j) o[j] += sign * static_cast<double>(part[j]);
    }
  }
  if constexpr (kRows > 1)
    if (i0 < height) add_tile<kRows - 1, kVectors, kBytes>(a + i0, b, height - i0, depth, sign, out + i0 * kPanel);
}

// out[i * ld_out + j] = bias[i] + sum_p a[p * kStrip + i] * b[p * ld + j], for i < height in pieces of kRows and for j of
// kVectors vectors of kBytes.
template <int kRows, int kVectors, int kBytes, class Acc>
RFSR_INLINE void store_tile(const Acc* a, const Acc* b, i64 ld, i64 height, i64 depth, const Acc* bias, Acc* out,
                            i64 ld_out) {
  using Vec = typename Vector<Acc, kBytes>::type;
  i64 i0 = 0;
  for (; i0 + kRows <= height; i0 += kRows) {
    Vec sum[kRows][kVectors] = {};
    multiply(a + i0, kStrip, b, ld, depth, sum);
#pragma GCC unroll 8
    for (i64 i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (i64 j = 0; j < kVectors; ++j) reinterpret_cast<Vec*>(out + (i0 + i) * ld_out)[j] = sum[i][j] + bias[i0 + i];
  }
  if constexpr (kRows > 1)
    if (i0 < height)
      store_tile<kRows - 1, kVectors, kBytes>(a + i0, b, ld, height - i0, depth, bias + i0, out + i0 * ld_out, ld_out);
}

template <class Acc>
RFSR_AVX512 void add_wide(const Acc* a, const Acc* b, i64 depth, double sign, i64 columns, double* out) {
  constexpr i64 lanes = 64 / sizeof(Acc);
  i64 j = 0;
  for (; j + lanes < columns; j += 2 * lanes) add_tile<8, 2, 64>(a, b + j, kStrip, depth, sign, out + j);
  if (j < columns) add_tile<8, 1, 64>(a, b + j, kStrip, depth, sign, out + j);
}
template <class Acc>
RFSR_AVX512 void store_wide(const Acc* a, const Acc* b, i64 ld, i64 depth, const Acc* bias, Acc* out, i64 ld_out) {
  constexpr i64 lanes = 64 / sizeof(Acc);
  for (i64 j = 0; j < kPanel; j += 2 * lanes)
    store_tile<8, 2, 64>(a, b + j, ld, kStrip, depth, bias, out + j, ld_out);
}

// Without AVX-512, in clones for AVX2 and for SSE2. AVX2 has 16 registers: 12 sums, as many as may wait for each other at
// two multiply-adds a cycle with some to spare, 3 factors and a vector.
template <class Acc>
RFSR_CLONES void add_narrow(const Acc* a, const Acc* b, i64 depth, double sign, i64 columns, double* out) {
  constexpr i64 lanes = 32 / sizeof(Acc);
  i64 j = 0;
  for (; j + 4 * lanes <= columns; j += 4 * lanes) add_tile<3, 4, 32>(a, b + j, kStrip, depth, sign, out + j);
  const i64 left = (columns - j) / lanes;
  if (left == 3) add_tile<4, 3, 32>(a, b + j, kStrip, depth, sign, out + j);
  if (left == 2) add_tile<4, 2, 32>(a, b + j, kStrip, depth, sign, out + j);
  if (left == 1) add_tile<8, 1, 32>(a, b + j, kStrip, depth, sign, out + j);
}
template <class Acc>
RFSR_CLONES void store_narrow(const Acc* a, const Acc* b, i64 ld, i64 depth, const Acc* bias, Acc* out, i64 ld_out) {
  constexpr i64 lanes = 32 / sizeof(Acc);
  for (i64 j = 0; j < kPanel; j += 4 * lanes)
    store_tile<3, 4, 32>(a, b + j, ld, kStrip, depth, bias, out + j, ld_out);
}

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

// Prefetches a piece of the channel at p, which is too short for the processor to see a pattern.
template <class T>
RFSR_INLINE void prefetch_pixels(const T* p, const Strided4& v, i64 k0, i64 count) {
  for (i64 k = 0; v.sw == 1 && k < count; k += 64 / sizeof(T)) RFSR_PREFETCH(p + k0 + k);
}

}  // namespace
}  // namespace rfsr
