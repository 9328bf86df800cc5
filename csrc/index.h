// Index arithmetic shared by host and device code.
//
// Everything here is plain integer arithmetic on 64-bit sizes, so the lines a GPU runs are the lines
// the tests of a machine without a GPU run. The two operators need:
//   * Strided4: a view of an [N, C, H, W] tensor by sizes and strides (in elements), which is how any
//     layout - contiguous, channels_last, sliced, expanded, transposed - is read without a copy;
//   * the edge rule of the Haar transform. A one-level transform pairs samples (2i, 2i+1). When the
//     length is odd the last pair lacks its second sample, and symmetric extension repeats the first.
//     Transposed (the gradient), that repetition is a weight of 2 on the last sample.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RFSR_HD __host__ __device__ __forceinline__
#else
#define RFSR_HD inline
#endif

namespace rfsr {

using i64 = int64_t;

RFSR_HD i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
RFSR_HD i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
RFSR_HD i64 larger(i64 a, i64 b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------- views

struct Strided4 {
  i64 n, c, h, w;      // sizes
  i64 sn, sc, sh, sw;  // strides, in elements

  RFSR_HD i64 pixels() const { return h * w; }
  RFSR_HD i64 at(i64 in, i64 ic, i64 ih, i64 iw) const { return in * sn + ic * sc + ih * sh + iw * sw; }
  // True when the pixels of a plane lie at one constant distance, so that H and W can be walked as one
  // axis: contiguous and channels_last are, a crop is not.
  RFSR_HD bool flat() const { return h == 1 || sh == w * sw; }
  RFSR_HD i64 pixel(i64 k) const { return (k / w) * sh + (k % w) * sw; }
};

// ----------------------------------------------------------------------------------- Haar pairs

RFSR_HD i64 haar_size(i64 size) { return (size + 1) / 2; }

// Index of the second sample of pair i; the first is 2i.
RFSR_HD i64 haar_second(i64 i, i64 size) { return smaller(2 * i + 1, size - 1); }

// How often sample k enters its pair: twice at an odd end, else once.
RFSR_HD int haar_weight(i64 k, i64 size) { return (k == size - 1 && size % 2 == 1) ? 2 : 1; }

// ----------------------------------------------------------------------------------- sign codes
// The gradient of |d| needs only the sign of d. It is kept as two bits per coefficient, four
// coefficients to a byte along W: 1/16 byte per input pixel instead of both inputs. The fourth code
// carries NaN, so that a gradient says NaN where the loss did.

constexpr int kCodesPerByte = 4;
enum SignCode : uint8_t { kZero = 0, kPlus = 1, kMinus = 2, kNaN = 3 };

template <class Acc>
RFSR_HD uint8_t sign_code(Acc d) {
  return static_cast<uint8_t>((d > Acc(0)) | ((d < Acc(0)) << 1) | ((d != d) * 3));
}

RFSR_HD uint8_t code_at(const uint8_t* row, i64 j) { return (row[j / kCodesPerByte] >> (2 * (j % kCodesPerByte))) & 3; }

// d|x|/dx times g. 0 * g rather than 0, so that a non-finite incoming gradient stays visible.
template <class Acc>
RFSR_HD Acc signed_value(uint8_t code, Acc g) {
  return code == kPlus ? g : code == kMinus ? -g : code == kZero ? Acc(0) * g : g * static_cast<Acc>(NAN);
}

// ------------------------------------------------------------------------- lower-triangle tiles

// Tile number t of a lower triangle, row by row: 0 -> (0,0), 1 -> (1,0), 2 -> (1,1), 3 -> (2,0) ...
struct TilePair {
  i64 i, j;  // j <= i
};
RFSR_HD TilePair triangle(i64 t) {
  i64 i = 0;
  while ((i + 1) * (i + 2) / 2 <= t) ++i;  // at most a few dozen steps: exact where sqrt would round
  return {i, t - i * (i + 1) / 2};
}

}  // namespace rfsr
