// Gram matrix and distances of Gram matrices on CUDA; formulas as in csrc/cpu/gram.cpp.
//
//   G(F)[i,j] = sum_k F[i,k] F[j,k] / (C H W)
//   loss      = mean_n of sum D^2 (l2), sum |D| (l1) or sqrt(sum D^2) (fro),  D = G(F1) - G(F2)
//               l2 is arXiv 2412.03268, eq. 6
//   backward  : S^T F + b with a C x C matrix S made from D, and a bias b per channel with layer norm
//
// Per feature element (s = bytes per element): the Gram reads s once per tile row that needs it and does C FLOP
// (lower triangle of 64 x 64 tiles), the backward reads s, writes s and does 2 C FLOP. On an H200 (a copy
// reaches 4.3 TB/s, fp32 without tensor cores about 60 TFLOP/s) the floor of relu1_1 at 512 x 512, C = 64, fp32, is
// 16 us by bytes and 18 us by FLOPs per tensor.
//
// How: the pixels are cut into ranges so that even C = 64, a single tile, keeps many blocks busy. Each block adds
// up its tile of F1 F1^T - F2 F2^T over its range in registers and writes it to a workspace. A second kernel adds
// the ranges in index order in fp64, scales, and writes both triangles and sums of the criterion; a third adds
// those. G(F1) and G(F2) never exist. Blocks on the diagonal also add up the rows, where the means are wanted.
//
// Deterministic: no atomics; ranges and blocks follow from the shape alone; every sum has a fixed order.
//
// The plain version, for correctness: multiply-adds without tensor cores, three launches. Not run on a GPU yet; the
// tests run these lines on the host (tests/ops/cuda_on_host). Limits: the workspace takes up to some 20 MB; N * C^2 /
// 4096 tiles must stay below 2^31.

#include "../gram.h"
#include "sums.cuh"

namespace rfsr {
namespace {

constexpr int kTile = 64;        // tile of the result, by 16 x 16 threads with 4 x 4 results each
constexpr int kStep = 16;        // depth of a shared-memory stage
constexpr int kEach = 4;         // results per thread and axis
constexpr i64 kMinRange = 1024;  // pixels a block takes at least
constexpr int kFlush = 8;        // stages (128 pixels) summed before the sum joins the block's total
constexpr i64 kWantedBlocks = 512;
constexpr i64 kParts = 64;  // blocks that share the criterion of a sample

// One stage of a 64 x 64 product: sum[a][b] += sum_p left[p][.] * right[p][.]
template <class Acc>
__device__ void multiply_stage(const Acc (*left)[kTile + 4], const Acc (*right)[kTile + 4], Acc (*sum)[kEach]) {
  const int row = threadIdx.x / 16 * kEach, column = threadIdx.x % 16 * kEach;
#pragma unroll
  for (int p = 0; p < kStep; ++p)
#pragma unroll
    for (int a = 0; a < kEach; ++a)
#pragma unroll
      for (int b = 0; b < kEach; ++b) sum[a][b] += left[p][row + a] * right[p][column + b];
}

// stage[p][c] = x[channel0 + c, k0 + p] - shift, zero outside. Threads run along the pixels, as memory does in NCHW.
template <class T, class Acc>
__device__ void load_pixels(const T* x, const Strided4& v, i64 channel0, i64 k0, i64 end, Acc shift,
                            Acc (*stage)[kTile + 4]) {
  for (int e = threadIdx.x; e < kStep * kTile; e += kThreads) {
    const int p = e % kStep, c = e / kStep;
    const i64 k = k0 + p;
    const bool inside = k < end && channel0 + c < v.c;
    const i64 offset = v.flat() ? k * v.sw : v.pixel(k);
    stage[p][c] = inside ? static_cast<Acc>(x[(channel0 + c) * v.sc + offset]) - shift : Acc(0);
  }
}

template <class T>
__global__ void gram_partial_kernel(const T* x, Strided4 vx,            // [N, C, H, W], any strides
                                    const T* other, Strided4 vo,        // the same, or null for a plain Gram
                                    const acc_t<T>* shift, i64 stride,  // [N] or null: taken off x
                                    i64 range, i64 tiles,               // pixels per block; tiles of the triangle
                                    acc_t<T>* partials,                 // [N, tiles, ranges, 64, 64]
                                    acc_t<T>* rows) {                   // [N, tiles, ranges, 64] or null: row sums
  using Acc = acc_t<T>;
  __shared__ Acc left[kStep][kTile + 4], right[kStep][kTile + 4];
  const i64 n = blockIdx.x / tiles, k0 = blockIdx.y * range, end = min(vx.pixels(), k0 + range);
  const TilePair pair = triangle(blockIdx.x % tiles);
  // Two levels of sums: a long row of additions to one number would lose a digit in fp32. The two inputs have
  // sums of their own until they are subtracted, so that equal inputs differ by exactly 0.
  Acc total[kEach][kEach] = {}, sum[2][kEach][kEach] = {};
  Acc row_total = 0, row_sum = 0;
  const Acc off = shift ? shift[n * stride] : Acc(0);
  int stage = 0;
  for (i64 k = k0; k < end; k += kStep) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side == 1 && !other) continue;
      const Strided4& v = side ? vo : vx;
      const T* f = (side ? other : x) + n * v.sn;
      load_pixels(f, v, pair.i * kTile, k, end, off, left);
      load_pixels(f, v, pair.j * kTile, k, end, off, right);
      __syncthreads();
      multiply_stage(left, right, sum[side]);
      if (rows && pair.i == pair.j && threadIdx.x < kTile)
        for (int p = 0; p < kStep; ++p) row_sum += left[p][threadIdx.x];
      __syncthreads();
    }
    if (++stage % kFlush == 0 || k + kStep >= end) {
#pragma unroll
      for (int a = 0; a < kEach; ++a)
#pragma unroll
        for (int b = 0; b < kEach; ++b) {
          total[a][b] += sum[0][a][b] - sum[1][a][b];
          sum[0][a][b] = sum[1][a][b] = Acc(0);
        }
      row_total += row_sum;
      row_sum = Acc(0);
    }
  }
  const i64 place = blockIdx.x * i64(gridDim.y) + blockIdx.y;
  Acc* out = partials + place * kTile * kTile;
  const int row = threadIdx.x / 16 * kEach, column = threadIdx.x % 16 * kEach;
  for (int a = 0; a < kEach; ++a)
    for (int b = 0; b < kEach; ++b) out[(row + a) * kTile + column + b] = total[a][b];
  if (rows && pair.i == pair.j && threadIdx.x < kTile) rows[place * kTile + threadIdx.x] = row_total;
}

// Adds the ranges in index order; kParts blocks for a sample.
template <class Acc>
__global__ void gram_finish_kernel(const Acc* partials, i64 channels, i64 tiles, i64 ranges, double scale,
                                   i64 criterion,
                                   Acc* out,         // [N, C, C]
                                   double* terms) {  // [N, kParts], the criterion's sums, or null
  const i64 n = blockIdx.x / kParts;
  double sum = 0;
  for (i64 k = blockIdx.x % kParts * kThreads + threadIdx.x; k < channels * channels; k += kParts * kThreads) {
    const i64 i = k / channels, j = k % channels;
    const i64 low = max(i, j), high = min(i, j);  // the lower triangle is what was computed
    const i64 ti = low / kTile, tj = high / kTile;
    const Acc* p =
        partials + (n * tiles + ti * (ti + 1) / 2 + tj) * ranges * kTile * kTile + low % kTile * kTile + high % kTile;
    double total = 0;
    for (i64 r = 0; r < ranges; ++r) total += static_cast<double>(p[r * kTile * kTile]);
    total *= scale;
    out[n * channels * channels + k] = static_cast<Acc>(total);
    sum += criterion_term(criterion, total);
  }
  if (!terms) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) terms[blockIdx.x] = sum;
}

// loss = mean over the samples of the criterion, one block. An empty batch gives 0 / 0.
template <class Acc>
__global__ void gram_loss_kernel(const double* terms, i64 samples, i64 criterion, Acc* loss) {
  double sum = 0;
  for (i64 n = threadIdx.x; n < samples; n += kThreads) {
    double sample = 0;
    for (i64 part = 0; part < kParts; ++part) sample += terms[n * kParts + part];
    sum += criterion_value(criterion, sample);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = static_cast<Acc>(sum / static_cast<double>(samples));
}

template <class Acc>
__global__ void gram_means_kernel(const Acc* rows, i64 samples, i64 channels, i64 tiles, i64 ranges, i64 pixels,
                                  Acc* means) {  // [N, C]
  RFSR_GRID_LOOP(k, samples * channels) {
    const i64 n = k / channels, c = k % channels, t = c / kTile;
    const Acc* p = rows + (n * tiles + t * (t + 1) / 2 + t) * ranges * kTile + c % kTile;
    double total = 0;
    for (i64 r = 0; r < ranges; ++r) total += static_cast<double>(p[r * kTile]);
    means[k] = static_cast<Acc>(total / static_cast<double>(pixels));
  }
}

// out[n, c, k] = bias[n, c] + sum_p s[n, p, c] F[n, p, k]
template <class T>
__global__ void gram_backward_kernel(const acc_t<T>* s, i64 sn, i64 sp, i64 sc,  // [N, C, C]
                                     const T* x, Strided4 v,                     // [N, C, H, W], any strides
                                     const acc_t<T>* bias, i64 bn, i64 bc,       // [N, C] or null
                                     i64 row_tiles,
                                     T* out) {  // [N, C, H, W], contiguous
  using Acc = acc_t<T>;
  __shared__ Acc left[kStep][kTile + 4], right[kStep][kTile + 4];
  const i64 n = blockIdx.y / row_tiles, c0 = blockIdx.y % row_tiles * kTile, k0 = blockIdx.x * i64(kTile);
  const i64 pixels = v.pixels();
  Acc sum[kEach][kEach] = {};
  for (i64 p0 = 0; p0 < v.c; p0 += kStep) {
    for (int e = threadIdx.x; e < kStep * kTile; e += kThreads) {
      const int q = e % kTile, p = e / kTile;  // threads run along columns of S and pixels of F
      const i64 channel = p0 + p, k = k0 + q;
      const i64 offset = v.flat() ? k * v.sw : v.pixel(k);
      left[p][q] = channel < v.c && c0 + q < v.c ? s[n * sn + channel * sp + (c0 + q) * sc] : Acc(0);
      right[p][q] = channel < v.c && k < pixels ? static_cast<Acc>(x[n * v.sn + channel * v.sc + offset]) : Acc(0);
    }
    __syncthreads();
    multiply_stage(left, right, sum);
    __syncthreads();
  }
  const int row = threadIdx.x / 16 * kEach, column = threadIdx.x % 16 * kEach;
  for (int a = 0; a < kEach && c0 + row + a < v.c; ++a) {
    const i64 channel = c0 + row + a;
    const Acc offset = bias ? bias[n * bn + channel * bc] : Acc(0);
    for (int b = 0; b < kEach; ++b)
      if (k0 + column + b < pixels)
        out[(n * v.c + channel) * pixels + k0 + column + b] = static_cast<T>(sum[a][b] + offset);
  }
}

// D (or G, when target is null) of every sample into out; with `loss` also the criterion, with `means` the rows'.
template <class T>
void gram_launch(const Tensor& features, const Strided4& vx, const Tensor* target, const Strided4& vo,
                 const Tensor* shift, i64 criterion, Tensor& out, const Tensor* loss, const Tensor* means) {
  using Acc = acc_t<T>;
  const OnDevice stream(features);
  const i64 side = ceil_div(vx.c, kTile), tiles = side * (side + 1) / 2, pixels = vx.pixels();
  const i64 wanted = max(1, min(ceil_div(kWantedBlocks, max(1, tiles * vx.n)), ceil_div(pixels, kMinRange)));
  const i64 range = ceil_div(ceil_div(pixels, wanted), kStep) * kStep, ranges = ceil_div(pixels, range);
  const auto workspace = [&](i64 count, ScalarType type) { return torch::stable::new_empty(features, {count}, type); };
  const Tensor partials = workspace(vx.n * tiles * ranges * kTile * kTile, out.scalar_type());
  const Tensor rows = workspace(means ? vx.n * tiles * ranges * kTile : 0, out.scalar_type());
  const Tensor terms = workspace(loss ? vx.n * kParts : 0, ScalarType::Double);
  if (out.numel() > 0) {
    const dim3 grid(static_cast<unsigned>(vx.n * tiles), static_cast<unsigned>(ranges));
    launch("gram_partial_kernel", gram_partial_kernel<T>, grid, stream, data<T>(features), vx,
           target ? data<T>(*target) : nullptr, vo, shift ? data<Acc>(*shift) : nullptr, shift ? shift->stride(0) : 0,
           range, tiles, mutable_data<Acc>(partials), means ? mutable_data<Acc>(rows) : nullptr);
    launch("gram_finish_kernel", gram_finish_kernel<Acc>, static_cast<unsigned>(vx.n * kParts), stream,
           data<Acc>(partials), vx.c, tiles, ranges, 1.0 / static_cast<double>(vx.c * pixels), criterion,
           mutable_data<Acc>(out), loss ? mutable_data<double>(terms) : nullptr);
    if (means)
      launch("gram_means_kernel", gram_means_kernel<Acc>, blocks_for(vx.n * vx.c), stream, data<Acc>(rows), vx.n, vx.c,
             tiles, ranges, pixels, mutable_data<Acc>(*means));
  }
  if (loss)
    launch("gram_loss_kernel", gram_loss_kernel<Acc>, 1, stream, data<double>(terms), vx.n, criterion,
           mutable_data<Acc>(*loss));
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
    gram_launch<decltype(t)>(features, v, nullptr, v, shift ? &*shift : nullptr, kL2, gram, nullptr,
                             shift ? &means : nullptr);
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
    gram_launch<decltype(t)>(features, vx, &target, vy, nullptr, criterion, difference, &loss, nullptr);
  });
  return {loss, difference};
}

Tensor gram_backward(const Tensor& s, const Tensor& features, std::optional<Tensor> bias) {
  const Strided4 v = view4(features, "features");
  check_per_sample(s, features, "s", {v.n, v.c, v.c});
  check_per_sample(bias, features, "bias", {v.n, v.c});
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.h, v.w}, features.scalar_type());
  if (out.numel() == 0) return out;
  const OnDevice stream(features);
  const i64 row_tiles = ceil_div(v.c, kTile);
  STD_TORCH_CHECK(v.n * row_tiles < 65536, "gram_backward takes fewer than 65536 tiles of 64 channels over the batch");
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    const dim3 grid(static_cast<unsigned>(ceil_div(v.pixels(), kTile)), static_cast<unsigned>(v.n * row_tiles));
    launch("gram_backward_kernel", gram_backward_kernel<T>, grid, stream, data<Acc>(s), s.stride(0), s.stride(1),
           s.stride(2), data<T>(features), v, bias ? data<Acc>(*bias) : nullptr, bias ? bias->stride(0) : 0,
           bias ? bias->stride(1) : 0, row_tiles, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfsr_ext, CUDA, m) {
  m.impl("gram_moments", TORCH_BOX(&gram_moments));
  m.impl("gram_distance", TORCH_BOX(&gram_distance));
  m.impl("gram_backward", TORCH_BOX(&gram_backward));
}

}  // namespace rfsr
