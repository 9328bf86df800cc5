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
// How: a row of pairs is computed tile by tile, in passes that a compiler turns into vector code. The loss of pixels
// side by side is spelt for AVX-512 as well, one pass that holds everything between two images and their signs in
// registers: the other way it is the passes, not the memory, that half types wait for.
//
// Deterministic: every output is written by one thread. The loss adds rows of a sample in groups whose size
// depends on the shape alone, within a group in a fixed order of lanes, and adds groups and samples in index
// order in fp64, so the bits do not depend on the number of threads.
//
// Limits: one level (rfsr_ext/ops/haar.py repeats it); gradients come out contiguous whatever the input's layout.

#include <vector>

#include "../haar.h"
#include "rows.h"

// Every processor that has AVX-512 has BMI2 too.
#if defined(__x86_64__) && defined(__GNUC__)
#define RFSR_AVX512_L1 __attribute__((target("avx512f,bmi2")))
#include <immintrin.h>
#endif

namespace rfsr {
namespace {

constexpr i64 kTile = 512;    // LL coefficients at a time: its input rows (4 x 4 kB in fp32) fit the L1 cache
constexpr i64 kAhead = 8192;  // bytes between a pixel that is read and one that is asked for
constexpr int kLanes = 16;    // independent partial sums: enough to hide the latency of an addition

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
    Acc sum[kLanes] = {};                                                                                            \
    i64 j = 0;                                                                                                       \
    for (; j + kLanes <= pairs; j += kLanes)                                                                         \
      for (int l = 0; l < kLanes; ++l) sum[l] += std::fabs(d[j + l]);                                                \
    for (int l = 0; j + l < pairs; ++l) sum[l] += std::fabs(d[j + l]);                                               \
    for (int l = 0; l < kLanes; ++l) lanes[l] += sum[l];                                                             \
  }                                                                                                                  \
  RFSR_CLONES void clamp_row(const Acc* x, Range<Acc> range, i64 count, Acc* out) {                                  \
    for (i64 k = 0; k < count; ++k) out[k] = range.clamped(x[k]);                                                    \
  }                                                                                                                  \
  /* One byte per number first, which vectorises; then four codes, or eight flags, are put together.          */ \
  RFSR_CLONES void pack_signs(const Acc* d, i64 count, uint8_t* out) {                                               \
    uint8_t codes[kTile + kCodesPerByte] = {};                                                                       \
    for (i64 j = 0; j < count; ++j) codes[j] = sign_code(d[j]);                                                      \
    for (i64 j = 0; j < count; j += kCodesPerByte) {                                                                 \
      const uint8_t* c = codes + j;                                                                                  \
      out[j / kCodesPerByte] = static_cast<uint8_t>(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6);                       \
    }                                                                                                                \
  }                                                                                                                  \
  RFSR_CLONES void pack_inside(const Acc* x, Range<Acc> range, i64 count, uint8_t* out) {                            \
    uint8_t flags[2 * kTile + 8] = {};                                                                               \
    for (i64 k = 0; k < count; ++k) flags[k] = range.inside(x[k]);                                                   \
    for (i64 k = 0; k < count; k += 8) {                                                                             \
      const uint8_t* f = flags + k;                                                                                  \
      out[k / 8] = static_cast<uint8_t>(f[0] | f[1] << 1 | f[2] << 2 | f[3] << 3 | f[4] << 4 | f[5] << 5 |           \
                                        f[6] << 6 | f[7] << 7);                                                      \
    }                                                                                                                \
  }
RFSR_ROW_PASSES(float)
RFSR_ROW_PASSES(double)

// row[k] = 0 where pixel k was clamped; `Bits` is an integer as wide as a pixel, whose 0 is the number 0.
#define RFSR_CLEAR_CLAMPED(Bits)                                                                                     \
  RFSR_CLONES void clear_clamped(const uint8_t* inside, i64 count, Bits* row) {                                      \
    typedef Bits Eight __attribute__((vector_size(8 * sizeof(Bits)), aligned(alignof(Bits)), may_alias));            \
    constexpr Eight bit = {1, 2, 4, 8, 16, 32, 64, 128};                                                             \
    i64 k = 0;                                                                                                       \
    for (; k + 8 <= count; k += 8)                                                                                   \
      *reinterpret_cast<Eight*>(row + k) &= reinterpret_cast<Eight>((bit & inside[k / 8]) != 0);                     \
    for (; k < count; ++k) row[k] = bit_at(inside, k) ? row[k] : 0;                                                  \
  }
RFSR_CLEAR_CLAMPED(uint16_t)
RFSR_CLEAR_CLAMPED(uint32_t)
RFSR_CLEAR_CLAMPED(uint64_t)

// ------------------------------------------------------------------------------------- forward

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

template <class T, class Out>
void ll_kernel(const T* x, const Strided4& v, HaarEdge edge, Out* out) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(v.h), w = haar_size(v.w);
  torch::stable::parallel_for(0, v.n * v.c * h, grain(2 * v.w), [&](i64 begin, i64 end) {
    Acc a[2 * kTile], b[2 * kTile], e[2 * kTile], ll[kTile];
    for (i64 row = begin; row < end; ++row) {
      const i64 plane = row / h, n = plane / v.c, c = plane % v.c;
      const HaarTerms rows = haar_pair(row % h, v.h, edge);
      const auto add_up = [&](i64 column, i64 count, Acc* sums) {
        const auto load = [&](int t, Acc* scratch) {
          return load_row(x + v.at(n, c, rows.index[t], column), v.sw, count, scratch);
        };
        if (is_whole_pair(rows)) return add_rows(load(0, a), load(1, b), count, sums);
        std::fill(sums, sums + count, Acc(0));
        for (int t = 0; t < 3; ++t)
          if (rows.has(t)) add_weighted(static_cast<Acc>(rows.weight[t]), load(t, a), count, sums);
      };
      const auto sum_at = [&](i64 column) {
        Acc sum;
        add_up(column, 1, &sum);
        return sum;
      };
      for (i64 j = 0; j < w; j += kTile) {
        const i64 pairs = smaller(kTile, w - j), count = smaller(2 * pairs, v.w - 2 * j);
        add_up(2 * j, count, e);
        end_row(v.w, edge, count, e, sum_at);
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

// A row of an image, and where the bits of its pixels that are not clamped go; null: no bits.
template <class T>
struct Row {
  const T* pixels;
  i64 ahead;  // how far away the row lies that is to be asked for
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
  i64 ahead = ceil_div(kAhead, larger(1, 2 * v.sh * static_cast<i64>(sizeof(T)))) * 2 * v.sh;

  RFSR_INLINE Row<T> row(i64 n, i64 c, i64 r) const {
    return {x + v.at(n, c, r, 0), ahead, kept && range.active ? kept + layout.mask_row(mask, n, c, r) : nullptr};
  }

  // Asks for the row two below, which is next: a row is too short for the processor to guess that itself.
  RFSR_INLINE void expect(i64 n, i64 c, i64 r, i64 column, i64 count) const {
    if (v.sw != 1) return;
    const char* next = reinterpret_cast<const char*>(x + v.at(n, c, r, column) + 2 * v.sh);
    for (i64 byte = 0; byte < count * static_cast<i64>(sizeof(T)); byte += 64) RFSR_PREFETCH(next + byte);
  }

  // `count` pixels of a row; `fresh` unless they have been here before.
  RFSR_INLINE const Acc* load(i64 n, i64 c, i64 r, i64 column, i64 count, bool fresh, Acc* scratch) const {
    const Acc* pixels = load_row(x + v.at(n, c, r, column), v.sw, count, scratch);
    if (!range.active) return pixels;
    if (kept && fresh) pack_inside(pixels, range, count, row(n, c, r).inside + column / 8);
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
        _mm_prefetch(reinterpret_cast<const char*>(row->pixels + row->ahead + k + line), _MM_HINT_T1);
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
  const i64 group = larger(1, 16384 / w), groups = ceil_div(rows, group);
  std::vector<double> partial(static_cast<size_t>(v.n * groups));
#ifdef RFSR_AVX512_L1
  const bool wide = has_avx512() && v.sw == 1 && target.v.sw == 1;
#endif
  torch::stable::parallel_for(0, v.n * groups, grain(4 * group * v.w), [&](i64 begin, i64 end) {
    Acc a[2 * kTile], b[2 * kTile], p[2 * kTile], q[2 * kTile], e[2 * kTile], d[kTile];
    for (i64 g = begin; g < end; ++g) {
      const i64 n = g / groups, start = g % groups * group;
      double sum = 0;
      for (i64 row = start; row < smaller(rows, start + group); ++row) {
        const i64 c = row / h, i = row % h;
        const HaarTerms terms = haar_pair(i, v.h, edge);
        // Sums of columns [column, column + count) of the difference; `fresh` unless they have been here before.
        const auto add_up = [&](i64 column, i64 count, bool fresh, Acc* out) {
          const auto load = [&](const Input<T>& input, int t, bool first, Acc* scratch) {
            return input.load(n, c, terms.index[t], column, count, fresh && first, scratch);
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
          const i64 stop = smaller(w, tile + kTile);
          i64 j = tile;
#ifdef RFSR_AVX512_L1
          if constexpr (std::is_same_v<Acc, float>) {
            if (wide && is_whole_pair(terms)) {
              const auto row = [&](const Input<T>& input, int t) { return input.row(n, c, terms.index[t]); };
              j += add_wide(row(pred, 0), row(pred, 1), row(target, 0), row(target, 1), pred.range, j,
                            smaller(stop, v.w / 2) - j, signs, lanes);
            }
          }
#endif
          if (j == stop) continue;
          const i64 pairs = stop - j, count = smaller(2 * pairs, v.w - 2 * j);
          for (const auto* input : {&pred, &target})
            for (int t = 0; t < 2; ++t) input->expect(n, c, terms.index[t], 2 * j, count);
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

// ------------------------------------------------------------------------------------ backward

// The rows of a gradient from those of the coefficients': source.read(n, c, i, j, count, v) fills v with `count` of
// row i from column j on, source.twice(n, c, i, pairs, out) writes each of the first `pairs` of row i to two
// neighbouring pixels, and source.finish(n, c, r, row) has the last word on each row.
template <class T, class Source>
void spread(T* grad, i64 samples, i64 channels, i64 height, i64 width, HaarEdge edge, const Source& shared) {
  using Acc = acc_t<T>;
  const i64 h = haar_size(height);
  expect_writes(grad, samples * channels * height * width * static_cast<i64>(sizeof(T)));
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
          source.twice(n, c, rows.index[0], width / 2, out);
        } else {
          for (i64 j = 0; j < width / 2; j += kTile) {
            const i64 pairs = smaller(kTile, width / 2 - j);
            gather(rows, j, pairs);
            for (i64 k = 0; k < pairs; ++k) out[2 * (j + k)] = out[2 * (j + k) + 1] = static_cast<T>(v[k]);
          }
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
      const HaarTerms rows = haar_users(top, height, edge);
      fill(rows, upper);
      if (top + 1 < height) {
        const HaarTerms next = haar_users(top + 1, height, edge);
        if (plain(rows) && plain(next))
          std::copy(upper, upper + width, upper + width);
        else
          fill(next, upper + width);
        source.finish(n, c, top + 1, upper + width);
      }
      source.finish(n, c, top, upper);
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
  void twice(i64 n, i64 c, i64 i, i64 pairs, T* out) const {
    Acc values[kTile];
    for (i64 j = 0; j < pairs; j += kTile) {
      const i64 count = smaller(kTile, pairs - j);
      read(n, c, i, j, count, values);
      for (i64 k = 0; k < count; ++k) out[2 * (j + k)] = out[2 * (j + k) + 1] = static_cast<T>(values[k]);
    }
  }
  void finish(i64, i64, i64, T*) const {}
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
  void twice(i64 n, i64 c, i64 i, i64 pairs, T* out) {
    look_up(n);
    const uint8_t* codes = bits + layout.sign_row(n, c, i);
    const i64 whole = pairs / kCodesPerByte;
    for (i64 b = 0; b < whole; ++b, out += 2 * kCodesPerByte) std::copy_n(pixels[codes[b]], 2 * kCodesPerByte, out);
    if (pairs % kCodesPerByte != 0) std::copy_n(pixels[codes[whole]], 2 * (pairs % kCodesPerByte), out);
  }
  void finish(i64 n, i64 c, i64 r, T* row) const {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    if (mask < 0) return;
    clear_clamped(bits + layout.mask_row(mask, n, c, r), layout.width, reinterpret_cast<Bits*>(row));
  }
};

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
    if (dtype == grad.scalar_type())
      spread(mutable_data<T>(out), v.n, v.c, height, width, edge, Band<T, T>{data<T>(grad), v});
    else
      spread(mutable_data<T>(out), v.n, v.c, height, width, edge, Band<T, Acc>{data<Acc>(grad), v});
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
    Signs<T> source{data<uint8_t>(kept), layout, static_cast<int>(mask), data<Acc>(grad),
                    reduction == kNone ? grad.stride(0) : 0, factor};
    spread(mutable_data<T>(out), kept.size(0), channels, height, width, edge, source);
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
