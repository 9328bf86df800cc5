// Index arithmetic shared by host and device code.
//
// Everything here is plain integer arithmetic on 64-bit sizes, so the lines a GPU runs are the lines
// the tests of a machine without a GPU run. The two operators need:
//   * Strided4: a view of an [N, C, H, W] tensor by sizes and strides (in elements), which is how any
//     layout - contiguous, channels_last, sliced, expanded, transposed - is read without a copy;
//   * the edge rules of the Haar transform: which samples a pair is the sum of and, read the other way
//     round for the gradient, which pairs a sample is part of;
//   * what the Haar loss keeps for backward, in bits.
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
RFSR_HD i64 min(i64 a, i64 b) { return a < b ? a : b; }
RFSR_HD i64 max(i64 a, i64 b) { return a > b ? a : b; }

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
// A one-level transform pairs samples (2i, 2i+1). Only an odd length n leaves a pair incomplete, and only
// by one sample, so each of PyWavelets' extension modes comes down to three numbers:
//   x[n] = last * x[n-1] + before * x[n-2] + first * x[0]

struct HaarEdge {
  int last, before, first;
};

// In the order of MODES in rfsr_ext/ops/reference.py.
enum HaarMode : i64 {
  kSymmetric,
  kReflect,
  kPeriodic,
  kZeroPad,
  kConstant,
  kSmooth,
  kAntisymmetric,
  kAntireflect,
  kPeriodization,
  kHaarModes
};

RFSR_HD HaarEdge haar_edge(i64 mode) {
  switch (mode) {
    case kReflect:
      return {0, 1, 0};
    case kPeriodic:
      return {0, 0, 1};
    case kZeroPad:
      return {0, 0, 0};
    case kAntisymmetric:
      return {-1, 0, 0};
    case kSmooth:
    case kAntireflect:
      return {2, -1, 0};
    default:  // symmetric, constant, periodization: the last sample once more
      return {1, 0, 0};
  }
}

RFSR_HD i64 haar_size(i64 size) { return (size + 1) / 2; }

// Up to three samples or pairs with their weights. The first always counts, even 0 times; the others only
// with a weight, so that a NaN which the mode does not look at stays where it is.
struct HaarTerms {
  i64 index[3];
  int weight[3];

  RFSR_HD bool has(int t) const { return t == 0 || weight[t] != 0; }
};

// The samples whose weighted sum is pair i. A single sample is its own neighbour.
RFSR_HD HaarTerms haar_pair(i64 i, i64 size, HaarEdge edge) {
  const i64 k = 2 * i;
  if (k + 1 < size) return {{k, k + 1, k}, {1, 1, 0}};
  return {{k, max(k - 1, 0), 0}, {1 + edge.last, edge.before, edge.first}};
}

// The pairs that sample k is part of: the columns of the matrix whose rows are haar_pair. The gradient
// gathers along them, so every pixel has one writer.
RFSR_HD HaarTerms haar_users(i64 k, i64 size, HaarEdge edge) {
  const i64 pair = k / 2, end = size - 1;
  if (size % 2 == 0) return {{pair, pair, pair}, {1, 0, 0}};
  return {{pair, end / 2, end / 2},
          {k == end ? 1 + edge.last : 1, k == max(end - 1, 0) ? edge.before : 0, k == 0 ? edge.first : 0}};
}

// --------------------------------------------------------------------------------- range of pixels

// An input range [low, high] that is mapped to [0, 1] and cut off outside; low == high means none.
// LL is linear, so of the map (x - low) / (high - low) a difference of two LL bands keeps only the factor
// 1 / (high - low). The sum is multiplied by it, and pixels are only clamped.
template <class Acc>
struct Range {
  Acc low, high;
  bool active;

  // A pixel on an end of the range has no gradient, as in torch.clamp of torch 2.15. NaN is inside and stays
  // NaN, so that it is seen in the loss and in the gradient.
  RFSR_HD bool inside(Acc x) const { return !(x <= low) & !(x >= high); }
  RFSR_HD Acc clamped(Acc x) const { return x < low ? low : x > high ? high : x; }
};

template <class Acc>
RFSR_HD Range<Acc> range_of(double low, double high) {
  return {static_cast<Acc>(low), static_cast<Acc>(high), low != high};
}
RFSR_HD double range_factor(double low, double high) { return low == high ? 1 : 1 / (high - low); }

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

// ------------------------------------------------------------------------- kept by the Haar loss

// Bytes the loss keeps for backward. Of each sample, one after the other:
//   signs   [C, h, ceil(w/4)]  two bits per coefficient
//   inside  [C, H, ceil(W/8)]  one bit per pixel: not clamped. None, or one block for each clamped input
//                              whose gradient is wanted
struct Kept {
  i64 channels, height, width;
  int masks;  // blocks of inside bits

  RFSR_HD i64 sign_bytes() const { return ceil_div(haar_size(width), kCodesPerByte); }  // of a row
  RFSR_HD i64 mask_bytes() const { return ceil_div(width, 8); }
  RFSR_HD i64 signs() const { return channels * haar_size(height) * sign_bytes(); }  // of a sample
  RFSR_HD i64 mask() const { return channels * height * mask_bytes(); }
  RFSR_HD i64 sample() const { return signs() + masks * mask(); }
  RFSR_HD i64 sign_row(i64 n, i64 c, i64 i) const { return n * sample() + (c * haar_size(height) + i) * sign_bytes(); }
  RFSR_HD i64 mask_row(int which, i64 n, i64 c, i64 r) const {
    return n * sample() + signs() + which * mask() + (c * height + r) * mask_bytes();
  }
};

RFSR_HD bool bit_at(const uint8_t* row, i64 k) { return (row[k / 8] >> (k % 8)) & 1; }

// What the sum of |d| over N samples of `coefficients` each is divided by; in the order of REDUCTIONS in
// rfsr_ext/ops/reference.py. kNone gives the mean of each sample.
enum Reduction : i64 { kMean, kSum, kNone };
RFSR_HD i64 divisor(i64 reduction, i64 n, i64 coefficients) {
  return reduction == kSum ? 1 : reduction == kNone ? coefficients : n * coefficients;
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
