// Products of small matrices by tensor cores, with the digits of the numbers that come in.
//
// A warp adds A B to a 32 x 32 tile of the result, its 32 lanes holding all three. Within a product the order along
// the depth is free as long as A and B agree, and so is which row of the result a row of registers stands for. Lanes
// use that: a lane's numbers are neighbors in memory and come in by loads of 16 bytes.
//
//   bf16, fp16   products of two such numbers are exact; one instruction for 16 x 8 results, 16 deep
//   fp32         is exactly the sum of three bf16 numbers, x = x1 + x2 + x3, each what rounding left over of those
//                before it: |x2| <= 2^-8 |x|, |x3| <= 2^-17 |x|. Of the nine products the six largest are taken: x1 y1,
//                x1 y2, x2 y1, x2 y2, x1 y3, x3 y1. The others come to at most 1.001 * 2^-24 |x y|, which is what
//                rounding the product to fp32 may take off too. bf16 has the range of fp32, so nothing is scaled; but
//                infinities and numbers from 3.39e38 on give NaN. (Products of two tf32 numbers each, three of them,
//                take as long and leave out up to 3 * 2^-22 |x y|.)
//   fp64         by fp64's own instruction
//
// Tensor cores cut sums off where others round, and in a long sum of one sign that adds up. So they add up 64 bytes
// of a row only (32 products of bf16, 16 of fp32), small parts first; ordinary additions take it from there.
#pragma once

#include "instructions.cuh"

namespace rfsr {

// A lane's share of a row of A or a column of B in products 16 deep (fp64: 4 deep), `Steps` of them: four numbers of
// each (fp64: one), as sums of `Terms` numbers of type Number.
template <class Number, int Terms, int Steps>
struct Slice {
  uint32_t pairs[Terms][2 * Steps];

  // Takes numbers 2 * place and 2 * place + 1.
  __device__ void set(int place, Number x, Number y) {
    static_assert(Terms == 1);
    pairs[0][place] = x.x | uint32_t(y.x) << 16;
  }
  __device__ void set(int place, float x, float y) {
#pragma unroll
    for (int term = 0; term < Terms; ++term) {
      const uint32_t pair = bf16_pair(x, y);
      pairs[term][place] = pair;
      x -= float_of(pair << 16);  // exact
      y -= float_of(pair & 0xffff0000u);
    }
  }
};

template <int Steps>
struct Slice<double, 1, Steps> {
  double numbers[Steps];
  __device__ void set(int place, double x, double y) { numbers[2 * place] = x, numbers[2 * place + 1] = y; }
};

// sum[n] += rows * column n, where lane (g, t) brings rows g ("upper") and g + 8 ("lower") and column g of each n, and
// has columns 2t and 2t + 1 of the results: sum[n] = upper row, upper row, lower row, lower row.
template <class Number, int TermsA, int TermsB, int Steps, int Count>
__device__ void multiply(const Slice<Number, TermsA, Steps>& upper, const Slice<Number, TermsA, Steps>& lower,
                         const Slice<Number, TermsB, Steps> (&columns)[Count], float (&sum)[Count][4]) {
  constexpr int last = TermsA > TermsB ? TermsA : TermsB;
#pragma unroll
  for (int s = 0; s < 2 * Steps; s += 2)
#pragma unroll
    for (int order = last - 1; order >= 0; --order)  // from the smallest products to the largest
#pragma unroll
      for (int a = 0; a < TermsA; ++a) {
        const int b = order - a;
        if (b < 0 || b >= TermsB) continue;
#pragma unroll
        for (int n = 0; n < Count; ++n)
          mma(sum[n], upper.pairs[a][s], lower.pairs[a][s], upper.pairs[a][s + 1], lower.pairs[a][s + 1],
              columns[n].pairs[b][s], columns[n].pairs[b][s + 1], Number{});
      }
}
template <int Steps, int Count>
__device__ void multiply(const Slice<double, 1, Steps>& upper, const Slice<double, 1, Steps>& lower,
                         const Slice<double, 1, Steps> (&columns)[Count], double (&sum)[Count][4]) {
#pragma unroll
  for (int s = 0; s < Steps; ++s)
#pragma unroll
    for (int n = 0; n < Count; ++n) {
      mma(sum[n][0], sum[n][1], upper.numbers[s], columns[n].numbers[s]);
      mma(sum[n][2], sum[n][3], lower.numbers[s], columns[n].numbers[s]);
    }
}

// A warp's tile of the result: 32 x 32, as 2 x 4 pieces of 16 x 8. Lane (g, t) has, of piece (m, n), places 0 and 1 of
// row `2m` and places 2 and 3 of row `2m + 1` of the four rows it brings, in columns 2t and 2t + 1 of piece column n.
constexpr int kWarpTile = 32;
template <class Acc>
struct Tile {
  Acc v[2][4][4] = {};

  // Adds sign * A B. The product is summed on its own first: equal ones of opposite signs leave exactly 0.
  template <class A, class B>
  __device__ void add(const A (&rows)[4], const B (&columns)[4], Acc sign) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      Acc sum[4][4] = {};
      multiply(rows[2 * m], rows[2 * m + 1], columns, sum);
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) v[m][n][e] += sign * sum[n][e];
    }
  }
};

}  // namespace rfsr
