// Grids, and sums in an order that follows from the shape alone.
#pragma once

#include "launch.cuh"

namespace rfsr {

constexpr i64 kMaxPartials = 1024;  // blocks of a summing kernel: fixed by shape, never by the GPU at hand

// Blocks for a kernel in which each thread takes `per_thread` of `items`, at most kMaxPartials.
inline unsigned summing_blocks(i64 items, i64 per_thread) {
  return static_cast<unsigned>(max(1, min(kMaxPartials, ceil_div(items, kThreads * per_thread))));
}

// Blocks for an element-wise kernel; the grid stride covers whatever lies beyond.
inline unsigned blocks_for(i64 items) {
  return static_cast<unsigned>(max(1, min(i64(1) << 20, ceil_div(items, kThreads))));
}

#define RFSR_GRID_LOOP(index, count) \
  for (i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x; index < (count); index += i64(gridDim.x) * blockDim.x)

// Sum over a block of kThreads threads, as a tree whose shape never changes. The result is thread 0's.
__device__ inline double block_sum(double value) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// out[b] = (sum of partials[b * count ...]) / divisor for block b. Empty sums divided by zero give NaN, as
// torch.mean does.
template <class Acc>
__global__ void finish_sum_kernel(const double* partials, int count, double divisor, Acc* out) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i64(blockIdx.x) * count + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Acc>(sum / divisor);
}

// All partials to one sum, or in equal shares, in order, to several.
template <class Acc>
void finish_sum(const Tensor& partials, double divisor, Acc* out, cudaStream_t stream, i64 sums = 1) {
  if (sums == 0) return;
  launch("finish_sum_kernel", finish_sum_kernel<Acc>, static_cast<unsigned>(sums), stream, data<double>(partials),
         static_cast<int>(partials.numel() / sums), divisor, out);
}

}  // namespace rfsr
