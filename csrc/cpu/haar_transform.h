// The LL band of an image, tile by tile.
#pragma once

#include "haar_rows.h"

namespace rfsr {
namespace {

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
        const i64 pairs = min(kTile, w - j), count = min(2 * pairs, v.w - 2 * j);
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

}  // namespace
}  // namespace rfsr
