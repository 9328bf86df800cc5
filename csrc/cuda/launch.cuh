// Helpers of the CUDA kernels: stream and device of the caller, launch checks, sums in a fixed order.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"

namespace rfsr {

constexpr int kThreads = 256;       // per block, in every kernel that adds up
constexpr i64 kMaxPartials = 1024;  // blocks of a summing kernel: fixed by shape, never by the GPU at hand

// Makes the tensor's GPU current for the life of the guard and knows the stream the caller is on.
//
// The stream comes from a C symbol of libtorch_cuda that is looked up at run time. Linking against it would
// stop this library from loading beside a CPU build of torch; the newer accelerator call needs torch 2.13.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    using CurrentStream = int32_t (*)(int32_t, void**);
    static const auto current_stream = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return torch_cuda ? reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                        : nullptr;
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(current_stream && current_stream(x.get_device_index(), &stream) == 0,
                    "torch did not give its current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
    // The runtime linked into this library keeps its own idea of the current device.
    cudaSetDevice(x.get_device_index());
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " did not launch: ", cudaGetErrorString(error),
                  " (if no kernel image is available, set TORCH_CUDA_ARCH_LIST to this GPU's and install again)");
}

// Blocks for a kernel in which each thread takes `per_thread` of `items`, at most kMaxPartials.
inline unsigned summing_blocks(i64 items, i64 per_thread) {
  return static_cast<unsigned>(larger(1, smaller(kMaxPartials, ceil_div(items, kThreads * per_thread))));
}

// Blocks for an element-wise kernel; the grid stride covers whatever lies beyond.
inline unsigned blocks_for(i64 items) {
  return static_cast<unsigned>(larger(1, smaller(i64(1) << 20, ceil_div(items, kThreads))));
}

#define RFSR_GRID_LOOP(index, count)                                            \
  for (i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x; index < (count); \
       index += i64(gridDim.x) * blockDim.x)

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

// out = (sum of partials) / divisor, one block. Empty sums divided by zero give NaN, as torch.mean does.
template <class Acc>
__global__ void finish_sum_kernel(const double* partials, int count, double divisor, Acc* out) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = static_cast<Acc>(sum / divisor);
}

template <class Acc>
void finish_sum(const Tensor& partials, double divisor, Acc* out, cudaStream_t stream) {
  finish_sum_kernel<<<1, kThreads, 0, stream>>>(data<double>(partials), static_cast<int>(partials.numel()), divisor, out);
  check_launch("finish_sum_kernel");
}

}  // namespace rfsr
