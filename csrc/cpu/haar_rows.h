// What the Haar kernels do with a row: one pass for each line of arithmetic, in fp32 or fp64.
//
// Each pass is a template and a function of its own, because the compiler makes one clone of it for each instruction
// set (RFSR_CLONES in rows.h) and clones whole functions only: inlined into a kernel it would be compiled for SSE2.
#pragma once

#include "../haar.h"
#include "rows.h"

namespace rfsr {
namespace {

constexpr i64 kTile = 512;    // LL coefficients at a time: its input rows (4 x 4 kB in fp32) fit the L1 cache
constexpr i64 kPrefetchBytes = 8192;  // how far ahead of a pixel that is read its row is fetched
constexpr int kLanes = 16;    // independent partial sums: enough to hide the latency of an addition

template <class Acc>
RFSR_CLONES void add_rows(const Acc* a, const Acc* b, i64 count, Acc* e) {
  for (i64 k = 0; k < count; ++k) e[k] = a[k] + b[k];
}

// Differences come first: close images cancel exactly.
template <class Acc>
RFSR_CLONES void add_differences(const Acc* a, const Acc* b, const Acc* p, const Acc* q, i64 count, Acc* e) {
  for (i64 k = 0; k < count; ++k) e[k] = (a[k] - p[k]) + (b[k] - q[k]);
}

template <class Acc>
RFSR_CLONES void scale_row(Acc weight, i64 count, Acc* e) {
  for (i64 k = 0; k < count; ++k) e[k] *= weight;
}

template <class Acc>
RFSR_CLONES void add_weighted(Acc weight, const Acc* a, i64 count, Acc* e) {
  for (i64 k = 0; k < count; ++k) e[k] += weight * a[k];
}

template <class Acc>
RFSR_CLONES void pair_up(const Acc* e, Acc weight, i64 pairs, Acc* out) {
  for (i64 j = 0; j < pairs; ++j) out[j] = (e[2 * j] + e[2 * j + 1]) * weight;
}

// d = pairs of e; lanes[l] += sum of |d[j]| over j = l mod kLanes.
template <class Acc>
RFSR_CLONES void pair_up_and_add(const Acc* e, i64 pairs, Acc* d, Acc* lanes) {
  for (i64 j = 0; j < pairs; ++j) d[j] = e[2 * j] + e[2 * j + 1];
  Acc sum[kLanes] = {};
  i64 j = 0;
  for (; j + kLanes <= pairs; j += kLanes)
    for (int l = 0; l < kLanes; ++l) sum[l] += std::fabs(d[j + l]);
  for (int l = 0; j + l < pairs; ++l) sum[l] += std::fabs(d[j + l]);
  for (int l = 0; l < kLanes; ++l) lanes[l] += sum[l];
}

template <class Acc>
RFSR_CLONES void clamp_row(const Acc* x, Range<Acc> range, i64 count, Acc* out) {
  for (i64 k = 0; k < count; ++k) out[k] = range.clamped(x[k]);
}

// One byte per number first, which vectorises; then four codes, or eight flags, are put together.
template <class Acc>
RFSR_CLONES void pack_signs(const Acc* d, i64 count, uint8_t* out) {
  uint8_t codes[kTile + kCodesPerByte] = {};
  for (i64 j = 0; j < count; ++j) codes[j] = sign_code(d[j]);
  for (i64 j = 0; j < count; j += kCodesPerByte) {
    const uint8_t* c = codes + j;
    out[j / kCodesPerByte] = static_cast<uint8_t>(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);
  }
}

template <class Acc>
RFSR_CLONES void pack_inside(const Acc* x, Range<Acc> range, i64 count, uint8_t* out) {
  uint8_t flags[2 * kTile + 8] = {};
  for (i64 k = 0; k < count; ++k) flags[k] = range.inside(x[k]);
  for (i64 k = 0; k < count; k += 8) {
    const uint8_t* f = flags + k;
    out[k / 8] = static_cast<uint8_t>(f[0] | f[1] << 1 | f[2] << 2 | f[3] << 3 | f[4] << 4 | f[5] << 5 |
                                      f[6] << 6 | f[7] << 7);
  }
}

// row[k] = 0 where pixel k was clamped; `Bits` is an integer as wide as a pixel, whose 0 is the number 0.
template <class Bits>
RFSR_CLONES void clear_clamped(const uint8_t* inside, i64 count, Bits* row) {
  typedef Bits Eight __attribute__((vector_size(8 * sizeof(Bits)), aligned(alignof(Bits)), may_alias));
  constexpr Eight bit = {1, 2, 4, 8, 16, 32, 64, 128};
  i64 k = 0;
  for (; k + 8 <= count; k += 8)
    *reinterpret_cast<Eight*>(row + k) &= reinterpret_cast<Eight>((bit & inside[k / 8]) != 0);
  for (; k < count; ++k) row[k] = bit_at(inside, k) ? row[k] : 0;
}

// Ends the sums e of `count` columns of a row as the mode says, if the last of them has no neighbour: only the end of
// an odd width has none. sum_at(k) is the sum of any column k.
template <class Acc, class SumAt>
RFSR_INLINE void end_row(i64 width, HaarEdge edge, i64 count, Acc* e, const SumAt& sum_at) {
  if (count % 2 == 0) return;
  const HaarTerms terms = haar_pair(haar_size(width) - 1, width, edge);
  Acc sum = static_cast<Acc>(terms.weight[0]) * e[count - 1];
  for (int t = 1; t < 3; ++t)
    if (terms.has(t)) sum += static_cast<Acc>(terms.weight[t]) * sum_at(terms.index[t]);
  e[count - 1] = sum;
  e[count] = 0;
}

RFSR_INLINE bool is_whole_pair(const HaarTerms& rows) { return rows.weight[1] == 1 && rows.weight[0] == 1; }

}  // namespace
}  // namespace rfsr
