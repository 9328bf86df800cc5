// The L1 loss of two LL bands, and the signs and bits it keeps for backward.
//
//   1  passes over the rows of a tile: any strides, edges, dtypes and processors
//   2  add_wide: one pass by AVX-512 that holds everything between two images and their signs in registers, for fp32
//      and half types, pixels side by side and whole pairs of rows. The same sums in the same order: the same bits.
#pragma once

#include <vector>

#include "haar_rows.h"

// Every processor that has AVX-512 has BMI2 too.
#if defined(__x86_64__) && defined(__GNUC__)
#define RFSR_AVX512_L1 __attribute__((target("avx512f,bmi2")))
#include <immintrin.h>
#endif

namespace rfsr {
namespace {

// A row of an image, and where the bits of its pixels that are not clamped go; null: no bits.
template <class T>
struct Row {
  const T* pixels;
  i64 prefetch_distance;  // how far away the row lies that is to be prefetched
  uint8_t* inside;
};

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
  i64 prefetch_distance =
      ceil_div(kPrefetchBytes, max(1, 2 * v.sh * static_cast<i64>(sizeof(T)))) * 2 * v.sh;

  RFSR_INLINE Row<T> row(i64 n, i64 c, i64 r) const {
    return {x + v.at(n, c, r, 0), prefetch_distance,
            kept && range.active ? kept + layout.mask_row(mask, n, c, r) : nullptr};
  }

  // Prefetches the row two below, which is next: a row is too short for the processor to guess that itself.
  RFSR_INLINE void prefetch(i64 n, i64 c, i64 r, i64 column, i64 count) const {
    if (v.sw != 1) return;
    const char* next = reinterpret_cast<const char*>(x + v.at(n, c, r, column) + 2 * v.sh);
    for (i64 byte = 0; byte < count * static_cast<i64>(sizeof(T)); byte += 64) RFSR_PREFETCH(next + byte);
  }

  // `count` pixels of a row; `first_visit`: their bits are not kept yet.
  RFSR_INLINE const Acc* load(i64 n, i64 c, i64 r, i64 column, i64 count, bool first_visit, Acc* scratch) const {
    const Acc* pixels = load_row(x + v.at(n, c, r, column), v.sw, count, scratch);
    if (!range.active) return pixels;
    if (kept && first_visit) pack_inside(pixels, range, count, row(n, c, r).inside + column / 8);
    clamp_row(pixels, range, count, scratch);
    return scratch;
  }
};

#ifdef RFSR_AVX512_L1
RFSR_AVX512_L1 inline __m512 load_wide(const float* p) { return _mm512_loadu_ps(p); }
RFSR_AVX512_L1 inline __m512 load_wide(const torch::headeronly::BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
RFSR_AVX512_L1 inline __m512 load_wide(const torch::headeronly::Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Pixels [k, k + 16) of a row.
template <class T>
RFSR_AVX512_L1 inline __m512 load_wide(const Row<T>& row, const Range<float>& range, i64 k) {
  const __m512 x = load_wide(row.pixels + k);
  if (!range.active) return x;
  const __m512 low = _mm512_set1_ps(range.low), high = _mm512_set1_ps(range.high);
  if (row.inside) {
    const __mmask16 bits = _mm512_cmp_ps_mask(x, low, _CMP_NLE_UQ) & _mm512_cmp_ps_mask(x, high, _CMP_NGE_UQ);
    std::memcpy(row.inside + k / 8, &bits, sizeof bits);
  }
  const __m512 raised = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ), low);
  return _mm512_mask_mov_ps(raised, _mm512_cmp_ps_mask(raised, high, _CMP_GT_OQ), high);
}

// The rows above a and b less those of p and q, as the passes above do it but without leaving the registers: 16
// coefficients at a time, as many as there are from pair j on in `pairs`. Adds |d| to lanes, writes the sign codes
// unless `signs` is null, and returns how many pairs are done.
template <class T>
RFSR_AVX512_L1 i64 add_wide(const Row<T>& a, const Row<T>& b, const Row<T>& p, const Row<T>& q,
                            const Range<float>& range, i64 j, i64 pairs, uint8_t* signs, float* lanes) {
  static_assert(kLanes == 16, "a lane of the sum is one of a register");
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const auto columns = [&](i64 k) __attribute__((always_inline)) RFSR_AVX512_L1 {
    return _mm512_add_ps(_mm512_sub_ps(load_wide(a, range, k), load_wide(p, range, k)),
                         _mm512_sub_ps(load_wide(b, range, k), load_wide(q, range, k)));
  };
  __m512 sum = _mm512_setzero_ps();
  i64 done = 0;
  for (; done + 16 <= pairs; done += 16) {
    const i64 k = 2 * (j + done);
    for (const Row<T>* row : {&a, &b, &p, &q})
      for (i64 line = 0; line < 32; line += 64 / static_cast<i64>(sizeof(T)))
        _mm_prefetch(reinterpret_cast<const char*>(row->pixels + row->prefetch_distance + k + line), _MM_HINT_T1);
    const __m512 first = columns(k), second = columns(k + 16);
    const __m512 d = _mm512_add_ps(_mm512_permutex2var_ps(first, even, second),
                                   _mm512_permutex2var_ps(first, odd, second));
    sum = _mm512_add_ps(sum, _mm512_abs_ps(d));
    if (signs == nullptr) continue;
    const __m512 zero = _mm512_setzero_ps();
    const uint32_t codes = _pdep_u32(_mm512_cmp_ps_mask(d, zero, _CMP_NLE_UQ), 0x55555555) |  // plus, or NaN
                           _pdep_u32(_mm512_cmp_ps_mask(d, zero, _CMP_NGE_UQ), 0xAAAAAAAA);   // minus, or NaN
    std::memcpy(signs + (j + done) / kCodesPerByte, &codes, sizeof codes);
  }
  _mm512_storeu_ps(lanes, _mm512_add_ps(_mm512_loadu_ps(lanes), sum));
  return done;
}
#endif

// sums[n] = sum of |LL(pred) - LL(target)| of sample n; writes sign codes when `kept` is not null.
template <class T>
void l1_kernel(const Input<T>& pred, const Input<T>& target, HaarEdge edge, uint8_t* kept, const Kept& layout,
               std::vector<double>& sums) {
  using Acc = acc_t<T>;
  const Strided4& v = pred.v;
  const i64 h = haar_size(v.h), w = haar_size(v.w), rows = v.c * h;
  // Rows per partial sum: by shape alone, so that threads only decide who computes it. Few enough terms
  // (some 2^14 over 16 lanes) for fp32 to keep six digits.
  const i64 group = max(1, 16384 / w), groups = ceil_div(rows, group);
  std::vector<double> partial(static_cast<size_t>(v.n * groups));
#ifdef RFSR_AVX512_L1
  const bool wide = has_avx512() && v.sw == 1 && target.v.sw == 1;
#endif
  torch::stable::parallel_for(0, v.n * groups, grain(4 * group * v.w), [&](i64 begin, i64 end) {
    Acc a[2 * kTile], b[2 * kTile], p[2 * kTile], q[2 * kTile], e[2 * kTile], d[kTile];
    for (i64 g = begin; g < end; ++g) {
      const i64 n = g / groups, start = g % groups * group;
      double sum = 0;
      for (i64 row = start; row < min(rows, start + group); ++row) {
        const i64 c = row / h, i = row % h;
        const HaarTerms terms = haar_pair(i, v.h, edge);
        // Sums of columns [column, column + count) of the difference; `first_visit`: as in Input::load.
        const auto add_up = [&](i64 column, i64 count, bool first_visit, Acc* out) {
          const auto load = [&](const Input<T>& input, int t, bool first, Acc* scratch) {
            return input.load(n, c, terms.index[t], column, count, first_visit && first, scratch);
          };
          if (is_whole_pair(terms))
            return add_differences(load(pred, 0, true, a), load(pred, 1, true, b), load(target, 0, true, p),
                                   load(target, 1, true, q), count, out);
          std::fill(out, out + count, Acc(0));
          for (int t = 0; t < 3; ++t) {
            if (!terms.has(t)) continue;
            std::fill(b, b + count, Acc(0));
            add_differences(load(pred, t, t == 0, a), b, load(target, t, t == 0, p), b, count, q);
            add_weighted(static_cast<Acc>(terms.weight[t]), q, count, out);
          }
        };
        const auto sum_at = [&](i64 column) {
          Acc sum;
          add_up(column, 1, false, &sum);
          return sum;
        };
        uint8_t* signs = kept ? kept + layout.sign_row(n, c, i) : nullptr;
        Acc lanes[kLanes] = {};
        for (i64 tile = 0; tile < w; tile += kTile) {
          const i64 stop = min(w, tile + kTile);
          i64 j = tile;
#ifdef RFSR_AVX512_L1
          if constexpr (std::is_same_v<Acc, float>) {
            if (wide && is_whole_pair(terms)) {
              const auto row = [&](const Input<T>& input, int t) { return input.row(n, c, terms.index[t]); };
              j += add_wide(row(pred, 0), row(pred, 1), row(target, 0), row(target, 1), pred.range, j,
                            min(stop, v.w / 2) - j, signs, lanes);
            }
          }
#endif
          if (j == stop) continue;
          const i64 pairs = stop - j, count = min(2 * pairs, v.w - 2 * j);
          for (const auto* input : {&pred, &target})
            for (int t = 0; t < 2; ++t) input->prefetch(n, c, terms.index[t], 2 * j, count);
          add_up(2 * j, count, true, e);
          end_row(v.w, edge, count, e, sum_at);
          pair_up_and_add(e, pairs, d, lanes);
          if (signs) pack_signs(d, pairs, signs + j / kCodesPerByte);
        }
        for (Acc lane : lanes) sum += lane;
      }
      partial[static_cast<size_t>(g)] = sum;
    }
  });
  for (i64 g = 0; g < v.n * groups; ++g) sums[static_cast<size_t>(g / groups)] += partial[static_cast<size_t>(g)];
}

}  // namespace
}  // namespace rfsr
