// Gram matrix and distances of Gram matrices on CUDA; formulas as in csrc/cpu/gram.cpp.
//
//   G(F)[i,j] = sum_k F[i,k] F[j,k] / (C H W)
//   loss      = mean_n of sum D^2 (l2), sum |D| (l1) or sqrt(sum D^2) (fro),  D = G(F1) - G(F2)
//               l2 is arXiv 2412.03268, eq. 6
//   backward  : S^T F + b with a C x C matrix S made from D, and a bias b per channel with layer norm
//
// Per feature element (s = bytes per element): the Gram reads s once per tile row that needs it and does C FLOP
// (lower triangle of tiles), the backward reads s, writes s and does 2 C FLOP; fp32 does six times as many (see
// products.cuh), and so does layer norm, whose features less the shift are fp32. On an H200 (a copy reaches 4.3 TB/s)
// the floor of relu1_1 at 512 x 512, C = 64, bf16, is 8 us per tensor by bytes. benchmarks/results/cuda-sass.md has the
// other shapes, and what the compilers make of this file.
//
// How: the pixels are cut into ranges so that even C = 64, a single tile, keeps many blocks busy. Each block adds up
// its tile of F1 F1^T - F2 F2^T over its range in registers, products by tensor cores, and writes it to a workspace.
// 64 bytes of every row at a time pass through a ring in shared memory, copied while earlier ones are multiplied. A
// second kernel adds the ranges in fp64, scales, and writes both triangles and sums of the criterion; a third adds
// those. G(F1) and G(F2) never exist. Blocks on the diagonal also add up the rows, where the means are wanted. The
// backward is one such product, S^T times F.
//
// Deterministic: no atomics; ranges and blocks follow from the shape alone; every sum has a fixed order.
//
// Any strides are right; planes of contiguous pixels that begin at multiples of 16 bytes are fast. Compiled for
// sm_80, sm_90 and sm_120, not run on a GPU yet; the tests run these lines on the host (tests/ops/cuda_on_host).
// Limits: the workspace takes up to some 10 MB, twice the result, or 6 % of the features, whichever is most;
// N * C^2 / 4096 tiles must stay below 2^31.

#include "../gram.h"
#include "packs.cuh"
#include "products.cuh"
#include "sums.cuh"

namespace rfsr {
namespace {

// ---------------------------------------------------------------------------------------- forward

constexpr int kRow = 64;         // bytes of a row of a panel: four lanes, 16 each
constexpr int kRing = 8;         // panels in shared memory
constexpr i64 kMinRange = 256;   // pixels a block takes at least ...
constexpr i64 kMaxRange = 8192;  // ... and at most, so that sums stay short;
constexpr i64 kMaxRanges = 65535;  // but a grid has no more rows than this, one for each range
template <class S>
constexpr int kDepth = kRow / sizeof(S);  // pixels of a panel

// Tiles of 64 x 64, four warps, or 128 x 128, sixteen, each with its 32 x 32.
constexpr int threads_of(int tile) { return tile * tile / kWarpTile; }

// Blocks that a multiprocessor's registers are to hold: 16 warps with 128 for each lane, in fp64 8 with twice as many.
// Left to themselves the compilers save registers, and spill.
template <class T>
constexpr int blocks_at_once(int threads) {
  return (std::is_same_v<T, double> ? 256 : 512) / threads;
}

// How a lane keeps its 16 bytes of a row: fp32 as three bf16 numbers.
template <class S>
struct RowOf {
  using type = Slice<S, 1, 2>;
};
template <>
struct RowOf<float> {
  using type = Slice<BFloat16, 3, 1>;
};

// Planes of numbers in any layout.
template <class T>
struct Source {
  const T* x;  // [N, C, H, W], any strides
  Strided4 v;
  bool packs;  // planes_of_packs
};

// 16 bytes of numbers of channel c of sample n from pixel k on, less the shift; zeros beyond C and beyond pixel `end`.
// S is T, or float where a shift is taken off half types.
template <class T, class S>
__device__ void load_pack(const Source<T>& source, i64 n, i64 c, i64 k, i64 end, const acc_t<T>* shift, S* to) {
  constexpr int count = kPerPack<S>;
  const Strided4& v = source.v;
  const int inside = c < v.c ? static_cast<int>(max(0, min(count, end - k))) : 0;
  const T* plane = source.x + n * v.sn + c * v.sc;
  if constexpr (std::is_same_v<S, T>)
    if (source.packs && !shift) {
      copy_async(to, inside ? plane + k : source.x, inside * int(sizeof(T)));
      return;
    }
  // What cannot be copied as it is goes through registers.
  Pack<T, count> from;
  if (source.packs && inside == count) {
    from = *reinterpret_cast<const Pack<T, count>*>(plane + k);
  } else {
    i64 row = k / v.w, column = k % v.w;
#pragma unroll
    for (int q = 0; q < count; ++q) {
      from.v[q] = q < inside ? plane[row * v.sh + column * v.sw] : T(0);
      if (++column == v.w) column = 0, ++row;
    }
  }
  Pack<S, count> pack;
#pragma unroll
  for (int q = 0; q < count; ++q)
    pack.v[q] = q < inside && shift ? static_cast<S>(static_cast<acc_t<T>>(from.v[q]) - *shift)
                                    : static_cast<S>(from.v[q]);
  *reinterpret_cast<Pack<S, count>*>(to) = pack;
}

// panel[r] = channel c0 + r of sample n, pixels k ... k + kDepth.
template <class T, class S, int kTile>
__device__ void load_panel(const Source<T>& source, i64 n, i64 c0, i64 k, i64 end, const acc_t<T>* shift,
                           S (*panel)[kDepth<S>]) {
  constexpr int count = kPerPack<S>, packs = kDepth<S> / count;
  const bool across = source.v.sc == 1;  // threads run along memory: the pixels, or the channels of channels_last
#pragma unroll
  for (int e = threadIdx.x; e < kTile * packs; e += threads_of(kTile)) {
    const int r = across ? e % kTile : e / packs, p = (across ? e / kTile : e % packs) * count;
    load_pack(source, n, c0 + r, k + p, end, shift, panel[r] + p);
  }
}

// A lane's share of row r.
template <class S>
__device__ void load_row(const S* row, int t, typename RowOf<S>::type& slice) {
  const auto pack = reinterpret_cast<const Pack<S, kPerPack<S>>*>(row)[t];
#pragma unroll
  for (int q = 0; q < kPerPack<S>; q += 2) slice.set(q / 2, pack.v[q], pack.v[q + 1]);
}

template <class T, class S, int kTile>
__global__ void __launch_bounds__(threads_of(kTile), blocks_at_once<T>(threads_of(kTile)))
    gram_partial_kernel(Source<T> x, Source<T> other,       // other.x is null for a plain Gram
                        const acc_t<T>* shift, i64 stride,  // [N] or null: taken off x
                        i64 range, i64 tiles,               // pixels per block; tiles of the triangle
                        acc_t<T>* partials,                 // [N, tiles, ranges, kTile, kTile]
                        acc_t<T>* rows) {                   // [N, tiles, ranges, kTile] or null: row sums
  using Acc = acc_t<T>;
  constexpr int depth = kDepth<S>;
  using Panel = S[kTile][depth];
  Panel* ring = reinterpret_cast<Panel*>(shared_memory());

  const i64 n = blockIdx.x / tiles, k0 = blockIdx.y * range, end = min(x.v.pixels(), k0 + range);
  const TilePair pair = triangle(blockIdx.x % tiles);
  const bool diagonal = pair.i == pair.j;  // then one panel is both sides of the product
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = warp / (kTile / kWarpTile) * kWarpTile, column = warp % (kTile / kWarpTile) * kWarpTile;
  // Nobody reads what lies above the diagonal or beyond C.
  const bool wanted = pair.i * kTile + row < x.v.c && (!diagonal || row >= column);

  // A stage is the next pixels of x or, in turn, of other: of the channels of the tile's rows and of its columns.
  const int in_turn = other.x ? 1 : 0, panels = diagonal ? 1 : 2, ahead = kRing / panels - 1;
  const int stages = static_cast<int>(ceil_div(end - k0, depth)) << in_turn;
  Tile<Acc> total;
  Acc row_total = 0;
  for (int stage = -ahead; stage < stages; ++stage) {
    if (stage >= 0) {
      if (diagonal)  // this stage is there; those after it may be under way
        wait_copies<kRing - 2>();
      else
        wait_copies<kRing / 2 - 2>();
      __syncthreads();  // ... for all threads, and all are done with the stage before, whose place is free
    }
    if (const int next = stage + ahead; next < stages) {
      Source<T> source = x;  // by value: a reference to one of two would be an address, and they in local memory
      if (next & in_turn) source = other;
#pragma unroll 1
      for (int p = 0; p < panels; ++p)
        load_panel<T, S, kTile>(source, n, (p ? pair.j : pair.i) * kTile, k0 + (next >> in_turn) * depth, end,
                                shift ? shift + n * stride : nullptr, ring[(next * panels + p) % kRing]);
    }
    commit_copies();
    if (stage < 0) continue;

    const Panel& left = ring[stage * panels % kRing];
    const Panel& right = ring[(stage * panels + panels - 1) % kRing];
    if (wanted) {
      typename RowOf<S>::type a[4], b[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) load_row(left[row + 8 * q + g], t, a[q]);
#pragma unroll
      for (int q = 0; q < 4; ++q) load_row(right[column + 8 * q + g], t, b[q]);
      total.add(a, b, stage & in_turn ? Acc(-1) : Acc(1));
    }
    if constexpr (std::is_same_v<S, Acc>)  // means go with a shift
      if (rows && diagonal && threadIdx.x < kTile) {
        Acc sum = 0;
        for (int p = 0; p < depth; ++p) sum += left[threadIdx.x][p];
        row_total += sum;
      }
  }

  const i64 place = blockIdx.x * i64(gridDim.y) + blockIdx.y;
  Acc* out = partials + place * kTile * kTile;
  if (wanted)
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          *reinterpret_cast<Pack<Acc, 2>*>(out + (row + 16 * m + 8 * half + g) * kTile + column + 8 * c + 2 * t) = {
              total.v[m][c][2 * half], total.v[m][c][2 * half + 1]};
  if (rows && diagonal && threadIdx.x < kTile) rows[place * kTile + threadIdx.x] = row_total;
}

// ------------------------------------------------------------------------------ sums over ranges

// Threads that share the ranges of a sum: a few loads for each of them, instead of many in a row.
inline int sharing(i64 ranges) { return ranges > 64 ? 8 : ranges > 16 ? 4 : 1; }

// Sum of p[r * stride] over the ranges, in fp64, by `share` threads that are kThreads / share apart; for the first.
template <class Acc>
__device__ double sum_ranges(const Acc* p, i64 stride, i64 ranges, int share) {
  __shared__ double sums[kThreads];
  const int apart = kThreads / share;
  double sum = 0;
  if (p)
#pragma unroll 8
    for (i64 r = threadIdx.x / apart; r < ranges; r += share) sum += static_cast<double>(p[r * stride]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < apart)
    for (int q = 1; q < share; ++q) sum += sums[threadIdx.x + q * apart];
  return sum;
}

// Adds the ranges up, `blocks` blocks for a sample.
template <class Acc>
__global__ void gram_finish_kernel(const Acc* partials, i64 tile, i64 channels, i64 tiles, i64 ranges, int share,
                                   double scale, i64 criterion, unsigned blocks,
                                   Acc* out,         // [N, C, C]
                                   double* terms) {  // [N, blocks], the criterion's sums, or null
  const int apart = kThreads / share;
  const i64 n = blockIdx.x / blocks, entry = i64(blockIdx.x % blocks) * apart + threadIdx.x % apart;
  const i64 number = entry / (tile * tile), place = entry % (tile * tile);
  const TilePair pair = triangle(number);
  const i64 i = pair.i * tile + place / tile, j = pair.j * tile + place % tile;
  const bool lower = j <= i && i < channels;  // what was computed
  const Acc* p = partials + (n * tiles + number) * ranges * tile * tile + place;
  const double total = scale * sum_ranges(lower ? p : nullptr, tile * tile, ranges, share);
  double sum = 0;
  if (lower && static_cast<int>(threadIdx.x) < apart) {
    Acc* gram = out + n * channels * channels;
    gram[i * channels + j] = gram[j * channels + i] = static_cast<Acc>(total);
    sum = (i == j ? 1 : 2) * criterion_term(criterion, total);
  }
  if (!terms) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) terms[blockIdx.x] = sum;
}

// loss = mean over the samples of the criterion, by one block; a warp takes a sample. An empty batch gives 0 / 0.
template <class Acc>
__global__ void gram_loss_kernel(const double* terms, i64 samples, i64 blocks, i64 criterion, Acc* loss) {
  __shared__ double lanes[kThreads];
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (i64 first = 0; first < samples; first += kThreads / 32) {
    const i64 n = first + threadIdx.x / 32;
    double part = 0;
    for (i64 b = lane; n < samples && b < blocks; b += 32) part += terms[n * blocks + b];
    lanes[threadIdx.x] = part;
    __syncthreads();
    for (int half = 16; half > 0; half /= 2) {
      if (lane < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
      __syncthreads();
    }
    if (lane == 0 && n < samples) sum += criterion_value(criterion, lanes[threadIdx.x]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = static_cast<Acc>(sum / static_cast<double>(samples));
}

template <class Acc>
__global__ void gram_means_kernel(const Acc* rows, i64 tile, i64 samples, i64 channels, i64 tiles, i64 ranges,
                                  int share, i64 pixels,
                                  Acc* means) {  // [N, C]
  const int apart = kThreads / share;
  const i64 k = i64(blockIdx.x) * apart + threadIdx.x % apart, n = k / channels, c = k % channels, t = c / tile;
  const bool inside = k < samples * channels;
  const Acc* p = rows + (n * tiles + t * (t + 1) / 2 + t) * ranges * tile + c % tile;
  const double total = sum_ranges(inside ? p : nullptr, tile, ranges, share);
  if (inside && static_cast<int>(threadIdx.x) < apart) means[k] = static_cast<Acc>(total / static_cast<double>(pixels));
}

// --------------------------------------------------------------------------------------- backward

constexpr int kSlab = 16;   // channels of F a stage sums over
constexpr int kStages = 4;  // slabs in shared memory

// A slab of a matrix, one row per channel. The padding lets lanes that read different rows meet no bank twice.
template <class T, int kColumns>
using Slab = T[kSlab][kColumns + 32 / sizeof(T)];

// How a lane keeps its four numbers of a column, for features of type T: S is rounded to two bf16 numbers (three for
// fp32 features), an error of 2^-17 where the result is rounded by 2^-9 or, in fp16, 2^-12. fp16 features are two.
template <class T>
struct ColumnOf {
  using S = Slice<BFloat16, 2, 1>;
  using F = Slice<BFloat16, std::is_same_v<T, Half> ? 2 : 1, 1>;
};
template <>
struct ColumnOf<float> {
  using S = Slice<BFloat16, 3, 1>;
  using F = S;
};
template <>
struct ColumnOf<double> {
  using S = Slice<double, 1, 4>;
  using F = S;
};

// A lane's share of the four columns from `column` on: rows t, t + 4, t + 8 and t + 12 of each.
template <class T, class Column, int kWidth>
__device__ void load_columns(const T (&slab)[kSlab][kWidth], int t, int column, Column (&columns)[4]) {
  using Number = std::conditional_t<std::is_same_v<T, Half>, float, T>;
  Pack<T, 4> rows[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) rows[r] = *reinterpret_cast<const Pack<T, 4>*>(slab[t + 4 * r] + column);
#pragma unroll
  for (int q = 0; q < 4; ++q)
#pragma unroll
    for (int r = 0; r < 4; r += 2)
      columns[q].set(r / 2, static_cast<Number>(rows[r].v[q]), static_cast<Number>(rows[r + 1].v[q]));
}

// slab[p] = channel p0 + p of sample n, pixels k ... k + kColumns.
template <class T, int kColumns, int kThreadsUsed>
__device__ void load_slab(const Source<T>& source, i64 n, i64 p0, i64 k, Slab<T, kColumns>& slab) {
  constexpr int count = kPerPack<T>, packs = kColumns / count;
  const acc_t<T>* no_shift = nullptr;
#pragma unroll
  for (int e = threadIdx.x; e < kSlab * packs; e += kThreadsUsed) {
    const int p = e / packs, q = e % packs * count;
    load_pack(source, n, p0 + p, k + q, source.v.pixels(), no_shift, slab[p] + q);
  }
}

// out[n, c, k] = bias[n, c] + sum_p s[n, p, c] F[n, p, k], kChannels x kPixels of it
template <class T, int kChannels, int kPixels>
__global__ void __launch_bounds__(kChannels* kPixels / kWarpTile, blocks_at_once<T>(kChannels* kPixels / kWarpTile))
    gram_backward_kernel(Source<acc_t<T>> s,                    // [N, C, 1, C]: p and c
                         Source<T> x,                           // [N, C, H, W], any strides
                         const acc_t<T>* bias, i64 bn, i64 bc,  // [N, C] or null
                         i64 row_tiles, bool packs,             // packs: planes of out begin at multiples of 16 bytes
                         T* out) {                              // [N, C, H, W], contiguous
  using Acc = acc_t<T>;
  constexpr int threads = kChannels * kPixels / kWarpTile;
  struct Stage {
    Slab<Acc, kChannels> s;
    Slab<T, kPixels> x;
  };
  Stage* ring = reinterpret_cast<Stage*>(shared_memory());

  const i64 n = blockIdx.y / row_tiles, c0 = blockIdx.y % row_tiles * kChannels, k0 = blockIdx.x * i64(kPixels);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = warp / (kPixels / kWarpTile) * kWarpTile + 4 * g;  // the lane's first channel, and ...
  const int column = warp % (kPixels / kWarpTile) * kWarpTile;       // ... the warp's first pixel

  const int stages = static_cast<int>(ceil_div(x.v.c, kSlab));
  Tile<Acc> total;
  for (int stage = 1 - kStages; stage < stages; ++stage) {
    if (stage >= 0) {
      wait_copies<kStages - 2>();
      __syncthreads();
    }
    if (const int next = stage + kStages - 1; next < stages) {
      Stage& to = ring[next % kStages];
      load_slab<Acc, kChannels, threads>(s, n, next * kSlab, c0, to.s);
      load_slab<T, kPixels, threads>(x, n, next * kSlab, k0, to.x);
    }
    commit_copies();
    if (stage < 0) continue;
    typename ColumnOf<T>::S a[4];
    typename ColumnOf<T>::F b[4];
    load_columns(ring[stage % kStages].s, t, row, a);
    load_columns(ring[stage % kStages].x, t, column + 4 * g, b);
    total.add(a, b, Acc(1));
  }

  // Piece column n of the product stands for pixels n, n + 4, n + 8 ...: a lane has eight neighbors of four channels.
  const i64 pixels = x.v.pixels(), k = k0 + column + 8 * t;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const i64 channel = c0 + row + q;
    if (channel >= x.v.c) continue;
    const Acc offset = bias ? bias[n * bn + channel * bc] : Acc(0);
    Pack<T, 8> pack;
#pragma unroll
    for (int e = 0; e < 8; ++e) pack.v[e] = static_cast<T>(total.v[q / 2][e % 4][q % 2 * 2 + e / 4] + offset);
    T* to = out + (n * x.v.c + channel) * pixels + k;
    if (packs && k + 8 <= pixels) {
      *reinterpret_cast<Pack<T, 8>*>(to) = pack;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (k + e < pixels) to[e] = pack.v[e];
    }
  }
}

// --------------------------------------------------------------------------------------- launches

template <class T>
Source<T> source(const Tensor& x, const Strided4& v) {
  return {data<T>(x), v, planes_of_packs(data<T>(x), v)};
}

// body(kTile): small tiles where they hold all channels, and for fp64, whose sums take twice the registers.
template <class T, class Body>
void with_tile(i64 channels, Body&& body) {
  if constexpr (!std::is_same_v<T, double>)
    if (channels > 64) return body(std::integral_constant<int, 128>{});
  body(std::integral_constant<int, 64>{});
}

// D (or G, when target is null) of every sample into out; with `loss` also the criterion, with `means` the rows'.
template <class T>
void gram_launch(const Tensor& features, const Strided4& vx, const Tensor* target, const Strided4& vo,
                 const Tensor* shift, i64 criterion, Tensor& out, const Tensor* loss, const Tensor* means) {
  using Acc = acc_t<T>;
  const OnDevice stream(features);
  const auto workspace = [&](i64 count, ScalarType type) { return torch::stable::new_empty(features, {count}, type); };
  with_tile<T>(vx.c, [&](auto tile_size) {
    constexpr int tile = tile_size;
    const i64 side = ceil_div(vx.c, tile), tiles = side * (side + 1) / 2, pixels = vx.pixels();
    // By shape alone, for GPUs of some 100 to 200 multiprocessors, each with room for one large or a few small tiles.
    const i64 blocks = ceil_div(16384 / tile, max(1, tiles * vx.n));
    const i64 short_enough = max(min(blocks, ceil_div(pixels, kMinRange)), ceil_div(pixels, kMaxRange));
    const i64 wanted = min(short_enough, kMaxRanges);
    const i64 range = ceil_div(ceil_div(pixels, wanted), kRow) * kRow, ranges = ceil_div(pixels, range);
    const int share = sharing(ranges);
    const auto finishing = static_cast<unsigned>(tiles * tile * tile * share / kThreads);
    const Tensor partials = workspace(vx.n * tiles * ranges * tile * tile, out.scalar_type());
    const Tensor rows = workspace(means ? vx.n * tiles * ranges * tile : 0, out.scalar_type());
    const Tensor terms = workspace(loss ? vx.n * finishing : 0, ScalarType::Double);
    if (out.numel() > 0) {
      const auto partial = [&](auto kernel) {
        const dim3 grid(static_cast<unsigned>(vx.n * tiles), static_cast<unsigned>(ranges));
        launch("gram_partial_kernel", kernel, Grid(grid, threads_of(tile), kRing * tile * kRow), stream,
               source<T>(features, vx), target ? source<T>(*target, vo) : Source<T>{nullptr, vo, false},
               shift ? data<Acc>(*shift) : nullptr, shift ? shift->stride(0) : 0, range, tiles,
               mutable_data<Acc>(partials), means ? mutable_data<Acc>(rows) : nullptr);
      };
      if (shift)
        partial(gram_partial_kernel<T, Acc, tile>);  // less a shift, half types need the digits of fp32
      else
        partial(gram_partial_kernel<T, T, tile>);
      launch("gram_finish_kernel", gram_finish_kernel<Acc>, static_cast<unsigned>(vx.n * finishing), stream,
             data<Acc>(partials), tile, vx.c, tiles, ranges, share, 1.0 / static_cast<double>(vx.c * pixels), criterion,
             finishing, mutable_data<Acc>(out), loss ? mutable_data<double>(terms) : nullptr);
      if (means)
        launch("gram_means_kernel", gram_means_kernel<Acc>,
               static_cast<unsigned>(ceil_div(vx.n * vx.c * share, kThreads)), stream, data<Acc>(rows), tile, vx.n,
               vx.c, tiles, ranges, share, pixels, mutable_data<Acc>(*means));
    }
    if (loss)
      launch("gram_loss_kernel", gram_loss_kernel<Acc>, 1, stream, data<double>(terms), vx.n, i64(finishing), criterion,
             mutable_data<Acc>(*loss));
  });
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
  dispatch(features.scalar_type(), "features", [&](auto t) {
    using T = decltype(t);
    using Acc = acc_t<T>;
    const Strided4 vs{v.n, v.c, 1, v.c, s.stride(0), s.stride(1), 0, s.stride(2)};
    with_tile<T>(v.c, [&](auto tile) {
      constexpr int channels = tile, width = std::is_same_v<T, double> ? 64 : 128;
      const i64 row_tiles = ceil_div(v.c, channels);
      STD_TORCH_CHECK(v.n * row_tiles < 65536, "gram_backward takes fewer than 65536 tiles of ", channels,
                      " channels over the batch");
      const dim3 blocks(static_cast<unsigned>(ceil_div(v.pixels(), width)), static_cast<unsigned>(v.n * row_tiles));
      constexpr size_t stage = sizeof(Slab<Acc, channels>) + sizeof(Slab<T, width>);
      launch("gram_backward_kernel", gram_backward_kernel<T, channels, width>,
             Grid(blocks, channels * width / kWarpTile, kStages * stage), stream, source<Acc>(s, vs),
             source<T>(features, v), bias ? data<Acc>(*bias) : nullptr, bias ? bias->stride(0) : 0,
             bias ? bias->stride(1) : 0, row_tiles, v.pixels() % kPerPack<T> == 0, mutable_data<T>(out));
    });
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
