// Gram matrix and Gram loss on CUDA; formulas as in csrc/cpu/gram.cpp.
//
//   G(F)[i,j] = sum_k F[i,k] F[j,k] / (C H W)
//   loss      = mean_n sum_ij D[i,j]^2,  D = G(F1) - G(F2)                            (arXiv 2412.03268, eq. 6)
//   backward  : S^T F with a C x C matrix S made from D
//
// Per feature element (s = bytes per element): the Gram reads s once per tile row that needs it and does C FLOP
// (lower triangle of 64 x 64 tiles), the backward reads s, writes s and does 2 C FLOP. On an H200 (4.3 TB/s,
// about 60 TFLOP/s of fp32 without tensor cores) the floor of relu1_1 at 512 x 512, C = 64, fp32, is 16 us by
// bytes and 18 us by FLOPs per tensor.
//
// How: the pixels are cut into ranges so that even C = 64, a single tile, keeps many blocks busy. Each block adds
// up its tile of F1 F1^T - F2 F2^T over its range in registers and writes it to a workspace. A second kernel adds
// the ranges in index order in fp64, scales, and writes both triangles and the sums of squares. G(F1) and G(F2)
// never exist.
//
// Deterministic: no atomics; ranges and blocks follow from the shape alone; every sum has a fixed order.
//
// First version, for correctness: plain multiply-adds, no tensor cores, three launches. Not run on a GPU yet; the
// tests run these lines on the host (tests/ops/cuda_on_host). Limits: the workspace takes up to some 20 MB; N * C^2 /
// 4096 tiles must stay below 2^31.

#include "sums.cuh"

namespace rfsr {
namespace {

constexpr int kTile = 64;        // tile of the result, by 16 x 16 threads with 4 x 4 results each
constexpr int kStep = 16;        // depth of a shared-memory stage
constexpr int kEach = 4;         // results per thread and axis
constexpr i64 kMinRange = 1024;  // pixels a block takes at least
constexpr int kFlush = 8;        // stages (128 pixels) summed before the sum joins the block's total
constexpr i64 kWantedBlocks = 512;

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

// stage[p][c] = x[channel0 + c, k0 + p], zero outside. Threads run along the pixels, as memory does in NCHW.
template <class T, class Acc>
__device__ void load_pixels(const T* x, const Strided4& v, i64 channel0, i64 k0, i64 end, Acc (*stage)[kTile + 4]) {
  for (int e = threadIdx.x; e < kStep * kTile; e += kThreads) {
    const int p = e % kStep, c = e / kStep;
    const i64 k = k0 + p;
    const bool inside = k < end && channel0 + c < v.c;
    const i64 offset = v.flat() ? k * v.sw : v.pixel(k);
    stage[p][c] = inside ? static_cast<Acc>(x[(channel0 + c) * v.sc + offset]) : Acc(0);
  }
}

template <class T>
__global__ void gram_partial_kernel(const T* x, Strided4 vx,      // [N, C, H, W], any strides
                                    const T* other, Strided4 vo,  // the same, or null for a plain Gram
                                    i64 range, i64 tiles,         // pixels per block; tiles of the lower triangle
                                    acc_t<T>* partials) {         // [N, tiles, ranges, 64, 64]
  using Acc = acc_t<T>;
  __shared__ Acc left[kStep][kTile + 4], right[kStep][kTile + 4];
  const i64 n = blockIdx.x / tiles, k0 = blockIdx.y * range, end = smaller(vx.pixels(), k0 + range);
  const TilePair pair = triangle(blockIdx.x % tiles);
  // Two levels of sums: a long row of additions to one number would lose a digit in fp32. The two inputs have
  // sums of their own until they are subtracted, so that equal inputs differ by exactly 0.
  Acc total[kEach][kEach] = {}, sum[2][kEach][kEach] = {};
  int stage = 0;
  for (i64 k = k0; k < end; k += kStep) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (side == 1 && !other) continue;
      const Strided4& v = side ? vo : vx;
      const T* f = (side ? other : x) + n * v.sn;
      load_pixels(f, v, pair.i * kTile, k, end, left);
      load_pixels(f, v, pair.j * kTile, k, end, right);
      __syncthreads();
      multiply_stage(left, right, sum[side]);
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
    }
  }
  Acc* out = partials + (blockIdx.x * i64(gridDim.y) + blockIdx.y) * kTile * kTile;
  const int row = threadIdx.x / 16 * kEach, column = threadIdx.x % 16 * kEach;
  for (int a = 0; a < kEach; ++a)
    for (int b = 0; b < kEach; ++b) out[(row + a) * kTile + column + b] = total[a][b];
}

template <class Acc>
__global__ void gram_finish_kernel(const Acc* partials, i64 samples, i64 channels, i64 tiles, i64 ranges, double scale,
                                   Acc* out,           // [N, C, C]
                                   double* squares) {  // [gridDim.x] or null
  double sum = 0;
  RFSR_GRID_LOOP(k, samples * channels * channels) {
    const i64 j = k % channels, i = k / channels % channels, n = k / channels / channels;
    const i64 low = larger(i, j), high = smaller(i, j);  // the lower triangle is what was computed
    const i64 ti = low / kTile, tj = high / kTile;
    const Acc* p =
        partials + (n * tiles + ti * (ti + 1) / 2 + tj) * ranges * kTile * kTile + low % kTile * kTile + high % kTile;
    double total = 0;
    for (i64 r = 0; r < ranges; ++r) total += static_cast<double>(p[r * kTile * kTile]);
    total *= scale;
    out[k] = static_cast<Acc>(total);
    sum += total * total;
  }
  if (!squares) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// out[n, c, k] = sum_p s[n, p, c] F[n, p, k]
template <class T>
__global__ void gram_backward_kernel(const acc_t<T>* s, i64 sn, i64 sp, i64 sc,  // [N, C, C]
                                     const T* x, Strided4 v,                     // [N, C, H, W], any strides
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
  for (int a = 0; a < kEach; ++a)
    for (int b = 0; b < kEach; ++b)
      if (c0 + row + a < v.c && k0 + column + b < pixels)
        out[(n * v.c + c0 + row + a) * pixels + k0 + column + b] = static_cast<T>(sum[a][b]);
}

// D (or G, when other is null) of every sample into out; with `loss`, also mean_n sum D^2.
template <class T>
void gram_launch(const Tensor& like, const T* x, const Strided4& vx, const T* other, const Strided4& vo, acc_t<T>* out,
                 acc_t<T>* loss, cudaStream_t stream) {
  using Acc = acc_t<T>;
  const i64 rows = ceil_div(vx.c, kTile), tiles = rows * (rows + 1) / 2, pixels = vx.pixels();
  const i64 wanted = larger(1, smaller(ceil_div(kWantedBlocks, larger(1, tiles * vx.n)), ceil_div(pixels, kMinRange)));
  const i64 range = ceil_div(ceil_div(pixels, wanted), kStep) * kStep, ranges = ceil_div(pixels, range);
  const i64 results = vx.n * vx.c * vx.c;
  const unsigned blocks = summing_blocks(results, 1);
  Tensor partials =
      torch::stable::new_empty(like, {vx.n * tiles * ranges * kTile * kTile}, acc_dtype(like.scalar_type()));
  Tensor squares = torch::stable::new_empty(like, {loss ? blocks : 0}, ScalarType::Double);
  if (results > 0) {
    const dim3 grid(static_cast<unsigned>(vx.n * tiles), static_cast<unsigned>(ranges));
    launch("gram_partial_kernel", gram_partial_kernel<T>, grid, stream, x, vx, other, vo, range, tiles,
           mutable_data<Acc>(partials));
  }
  launch("gram_finish_kernel", gram_finish_kernel<Acc>, blocks, stream, data<Acc>(partials), vx.n, vx.c, tiles, ranges,
         1.0 / static_cast<double>(vx.c * pixels), out, loss ? mutable_data<double>(squares) : nullptr);
  if (loss) finish_sum(squares, static_cast<double>(vx.n), loss, stream);
}

Tensor gram_matrix(const Tensor& features) {
  const Strided4 v = view4(features, "features");
  const OnDevice stream(features);
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.c}, acc_dtype(features.scalar_type()));
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    gram_launch<T>(features, data<T>(features), v, nullptr, v, mutable_data<acc_t<T>>(out), nullptr, stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> gram_l2(const Tensor& features, const Tensor& target) {
  const Strided4 vx = view4(features, "features"), vy = view4(target, "target_features");
  check_alike(features, target, "target_features");
  const OnDevice stream(features);
  const ScalarType acc = acc_dtype(features.scalar_type());
  Tensor loss = torch::stable::new_empty(features, {}, acc);
  Tensor difference = torch::stable::new_empty(features, {vx.n, vx.c, vx.c}, acc);
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    gram_launch<T>(features, data<T>(features), vx, data<T>(target), vy, mutable_data<acc_t<T>>(difference),
                   mutable_data<acc_t<T>>(loss), stream);
  });
  return {loss, difference};
}

Tensor gram_backward(const Tensor& s, const Tensor& features) {
  const Strided4 v = view4(features, "features");
  STD_TORCH_CHECK(s.dim() == 3 && s.size(0) == v.n && s.size(1) == v.c && s.size(2) == v.c && on_gpu(s) &&
                      s.scalar_type() == acc_dtype(features.scalar_type()),
                  "s must be [N, C, C] in the accumulation dtype of features");
  Tensor out = torch::stable::new_empty(features, {v.n, v.c, v.h, v.w}, features.scalar_type());
  if (out.numel() == 0) return out;
  const OnDevice stream(features);
  const i64 row_tiles = ceil_div(v.c, kTile);
  STD_TORCH_CHECK(v.n * row_tiles < 65536, "gram_backward takes fewer than 65536 tiles of 64 channels over the batch");
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    const dim3 grid(static_cast<unsigned>(ceil_div(v.pixels(), kTile)), static_cast<unsigned>(v.n * row_tiles));
    launch("gram_backward_kernel", gram_backward_kernel<T>, grid, stream, data<acc_t<T>>(s), s.stride(0), s.stride(1),
           s.stride(2), data<T>(features), v, row_tiles, mutable_data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfsr_ext, CUDA, m) {
  m.impl("gram_matrix", TORCH_BOX(&gram_matrix));
  m.impl("gram_l2", TORCH_BOX(&gram_l2));
  m.impl("gram_backward", TORCH_BOX(&gram_backward));
}

}  // namespace rfsr
