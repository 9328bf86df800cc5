// Gram matrix and distances of Gram matrices on the CPU.
//
//   G(F)[i,j] = sum_k F[i,k] F[j,k] / (C H W),   k over the H W pixels                (F: [C, H, W] per sample)
//   loss      = mean_n of sum D^2 (l2), sum |D| (l1) or sqrt(sum D^2) (fro),  D = G(F1) - G(F2)
//               l2 is arXiv 2412.03268, eq. 6
//   backward  : dF = S^T F + b, with a small C x C matrix S made from D in rfsr_ext/ops/gram.py. A bias b per
//               channel comes with layer norm, whose Gram is that of F less a shift with a rank-2 correction.
//
// Per feature element (s = bytes per element): the Gram reads s once and does C FLOP (only the lower triangle
// of panels is computed), the backward reads s, writes s and does 2 C FLOP. C is 64 ... 512 in VGG19, so on a
// CPU all of it is bound by arithmetic: relu1_1 of a 512 x 512 image is 1.1 GFLOP, 11 ms on a core of 100 GFLOP/s.
// D comes from one signed accumulation over both inputs; the two Gram matrices are never written.
//
// How: a panel is 32 channels (forward) or 32 pixels (backward) of a block that fits in a second-level cache, packed
// pixel by pixel, as fp32 or fp64 whatever the dtype and layout of the input; an 8 x 32 tile of the result is then a
// sum of outer products that lives in 16 AVX-512 registers (or, 3 x 32 at a time, in 12 of AVX2). Where the processor
// has a tile unit, bf16 stays bf16: 32 x 32 products by AMX, and in the backward S as the sum of two bf16 matrices, of
// which one holds what rounding took from the other. fp16 has no such unit and is computed as fp32.
//
//   gram_tiles.h    1 narrow tiles for AVX2 and SSE2, 2 wide tiles for AVX-512
//   gram_columns.h  forward and backward by such tiles
//   gram_amx.h      3 both of bf16 by the tile unit
//
// Threads share the forward by slices of the pixels and by tiles. Each packs what its tiles need: a panel that another
// core has packed costs more to fetch than to pack.
//
// Deterministic: slices depend on the shape alone, and a tile of a slice is added up by one thread, over pixels in
// order. At most 128 products (AMX: 512) are summed in fp32 (fp64 for fp64) and those sums are added in fp64, so length
// costs no accuracy and the difference of two nearly equal Grams keeps the digits the inputs have.
//
// Limits: fp64 sums of C*C/2 entries, or up to 1 MB, are held, and each thread packs up to 1 MB; the samples of a batch
// take turns. AMX takes numbers below 1e-38 for 0.

#include "gram_amx.h"
#include "gram_columns.h"

namespace rfsr {
namespace {

constexpr i64 kSlice = 2048;     // pixels of a slice, at least ...
constexpr i64 kSums = 131072;    // ... and what the fp64 sums of all slices together may hold

// Sums of one sample, in fp64: of its rows, and a 32 x 32 block for each pair of panels of the lower triangle; each for
// some slices of the pixels.
struct Sums {
  explicit Sums(const Strided4& v)
      : panels(ceil_div(v.c, kPanel)),
        pairs(panels * (panels + 1) / 2),
        slices(max(1, min(ceil_div(v.pixels(), kSlice), kSums / (pairs * kPanel * kPanel)))),
        slice(ceil_div(ceil_div(v.pixels(), slices), kPiece) * kPiece),
        blocks(slices * pairs * kPanel * kPanel),
        rows(slices * panels * kPanel) {}
  void clear() {
    std::fill(block(0, 0), block(slices, 0), 0.0);
    std::fill(rows.begin(), rows.end(), 0.0);
  }
  double* block(i64 index, i64 pair) const { return blocks.get() + (index * pairs + pair) * kPanel * kPanel; }

  i64 panels, pairs, slices, slice;  // slice: its pixels
  Buffer<double> blocks;             // of the first slice, then of the second ...; nothing until it is cleared
  std::vector<double> rows;
};

// sums += sign * (F - shift) (F - shift)^T over all pixels, and the sums of F - shift if they are wanted.
template <class Packed, class T>
void accumulate(const T* x, const Strided4& v, acc_t<T> shift, double sign, bool wants_rows, Sums& sums) {
  // A task is a strip of a pair of panels, in one slice.
  const i64 tasks = sums.pairs * Packed::kStrips, pixels = v.pixels();
  const i64 fitting = max(Packed::kElements / (sums.panels * kPanel) / Packed::kDepth, 1) * Packed::kDepth;
  const i64 block = min(sums.slice, fitting), work = sums.slice * kPanel * kPanel / Packed::kStrips;
  torch::stable::parallel_for(0, sums.slices * tasks, grain(work), [&](i64 begin, i64 end) {
    Packed packed(sums.panels, block);
    for (i64 slice = begin / tasks; slice * tasks < end; ++slice) {
      const i64 first = max(begin - slice * tasks, 0), last = min(end - slice * tasks, tasks);
      const i64 needed = triangle((last - 1) / Packed::kStrips).i + 1, stop = min((slice + 1) * sums.slice, pixels);
      for (i64 k0 = slice * sums.slice; k0 < stop; k0 += block) {
        const i64 count = min(block, stop - k0);
        for (i64 panel = 0; panel < needed; ++panel)
          for (i64 k = 0; k < count; k += kPiece) packed.pack(x, v, panel, k0, k, min(kPiece, count - k), shift);
        // Who has the last tile has packed all panels.
        for (i64 panel = 0; wants_rows && last == tasks && panel < needed; ++panel)
          packed.add_rows(panel, count, sums.rows.data() + (slice * sums.panels + panel) * kPanel);
        // Neighbouring tasks need the same panels at the same pixels, which so stay in the fastest cache.
        for (i64 k = 0; k < count; k += Packed::kDepth)
          for (i64 task = first; task < last; ++task) {
            const i64 pair = task / Packed::kStrips, strip = task % Packed::kStrips;
            const i64 depth = min(Packed::kDepth, count - k);
            packed.add_product(triangle(pair), strip, k, depth, sign, sums.block(slice, pair));
          }
      }
    }
  });
}

template <class T>
void accumulate(const T* x, const Strided4& v, std::optional<acc_t<T>> shift, double sign, Sums& sums) {
#ifdef RFSR_AMX
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    if (!shift && has_amx()) return accumulate<Pairs>(x, v, 0, sign, false, sums);
  }
#endif
  accumulate<Columns<acc_t<T>>>(x, v, shift.value_or(0), sign, shift.has_value(), sums);
}

// Adds up the slices, writes out = sums / (C H W), both triangles, and returns the criterion of it.
template <class Acc>
double reduce_slices(Sums& sums, const Strided4& v, i64 criterion, Acc* out) {
  const double scale = 1.0 / static_cast<double>(v.c * v.pixels());
  std::vector<double> totals(static_cast<size_t>(sums.pairs));
  torch::stable::parallel_for(0, sums.pairs, grain(kPanel * kPanel), [&](i64 begin, i64 end) {
    for (i64 pair = begin; pair < end; ++pair) {
      double *block = sums.block(0, pair), lanes[kPanel] = {};
      for (i64 slice = 1; slice < sums.slices; ++slice)
        for (i64 i = 0; i < kPanel * kPanel; ++i) block[i] += sums.block(slice, pair)[i];
      const i64 i0 = triangle(pair).i * kPanel, j0 = triangle(pair).j * kPanel;
      const i64 height = min(kPanel, v.c - i0), width = min(kPanel, v.c - j0);
      for (i64 i = 0; j0 == i0 && i < height; ++i)  // on the diagonal only the lower triangle is there
        for (i64 j = i + 1; j < width; ++j) block[i * kPanel + j] = block[j * kPanel + i];
      for (i64 i = 0; i < height; ++i)
        for (i64 j = 0; j < width; ++j) {
          const double d = scale * block[i * kPanel + j];
          out[(i0 + i) * v.c + j0 + j] = static_cast<Acc>(d);
          lanes[j] += (j0 < i0 ? 2 : 1) * criterion_term(criterion, d);
        }
      for (i64 j = 0; j0 < i0 && j < width; ++j)
        for (i64 i = 0; i < height; ++i) out[(j0 + j) * v.c + i0 + i] = out[(i0 + i) * v.c + j0 + j];
      for (double lane : lanes) totals[pair] += lane;
    }
  });
  double total = 0;
  for (double part : totals) total += part;
  return criterion_value(criterion, total);
}

// -> (gram [N, C, C], means [N, C]) of features less shift [N]; without a shift the means are left out (empty).
std::tuple<Tensor, Tensor> gram_moments(const Tensor& features, std::optional<Tensor> shift) {
  const Strided4 v = view4(features, "features");
  check_per_sample(shift, features, "shift", {v.n});
  const ScalarType acc = acc_dtype(features.scalar_type());
  Tensor gram = torch::stable::new_empty(features, {v.n, v.c, v.c}, acc);
  Tensor means = shift ? torch::stable::new_empty(features, {v.n, v.c}, acc)
                       : torch::stable::new_empty(features, {0}, acc);
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    Sums sums(v);
    for (i64 n = 0; n < v.n; ++n) {
      sums.clear();
      std::optional<Acc> off;
      if (shift) off = data<Acc>(*shift)[n * shift->stride(0)];
      accumulate<T>(data<T>(features) + n * v.sn, v, off, 1.0, sums);
      reduce_slices(sums, v, kL2, mutable_data<Acc>(gram) + n * v.c * v.c);
      for (i64 c = 0; shift && c < v.c; ++c) {
        double sum = 0;
        for (i64 slice = 0; slice < sums.slices; ++slice) sum += sums.rows[slice * sums.panels * kPanel + c];
        mutable_data<Acc>(means)[n * v.c + c] = static_cast<Acc>(sum / static_cast<double>(v.pixels()));
      }
    }
  });
  return {gram, means};
}

// -> (loss: scalar, difference: D [N, C, C])
std::tuple<Tensor, Tensor> gram_distance(const Tensor& features, const Tensor& target, int64_t criterion) {
  const Strided4 vx = view4(features, "features"), vy = view4(target, "target_features");
  check_alike(features, target, "target_features");
  check_criterion(criterion);
  const ScalarType acc = acc_dtype(features.scalar_type());
  Tensor loss = torch::stable::new_empty(features, {}, acc);
  Tensor difference = torch::stable::new_empty(features, {vx.n, vx.c, vx.c}, acc);
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    Sums sums(vx);
    double total = 0;
    for (i64 n = 0; n < vx.n; ++n) {
      sums.clear();
      accumulate<T>(data<T>(features) + n * vx.sn, vx, {}, 1.0, sums);
      accumulate<T>(data<T>(target) + n * vy.sn, vy, {}, -1.0, sums);
      total += reduce_slices(sums, vx, criterion, mutable_data<Acc>(difference) + n * vx.c * vx.c);
    }
    *mutable_data<Acc>(loss) = static_cast<Acc>(total / static_cast<double>(vx.n));
  });
  return {loss, difference};
}

Tensor gram_backward(const Tensor& s, const Tensor& features, std::optional<Tensor> bias) {
  const Strided4 v = view4(features, "features");
  check_per_sample(s, features, "s", {v.n, v.c, v.c});
  check_per_sample(bias, features, "bias", {v.n, v.c});
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.h, v.w}, features.scalar_type());
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * out.element_size());
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
#ifdef RFSR_AMX
    if (std::is_same_v<T, torch::headeronly::BFloat16> && has_amx())
      return backward_tiles(s, data<uint16_t>(features), v, bias ? &*bias : nullptr, mutable_data<uint16_t>(out));
#endif
    backward_kernel<T>(s, data<T>(features), v, bias ? &*bias : nullptr, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfsr_ext, CPU, m) {
  m.impl("gram_moments", TORCH_BOX(&gram_moments));
  m.impl("gram_distance", TORCH_BOX(&gram_distance));
  m.impl("gram_backward", TORCH_BOX(&gram_backward));
}

}  // namespace rfsr
