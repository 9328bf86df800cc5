// The only file that talks to the GPU: the caller's device and stream, and launches that are checked.
//
// Kernels are launched through launch() alone, so that tests/ops/cuda_on_host can put another launch.cuh in
// this one's place and run the kernels, line for line, on a machine without a GPU.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"
#include "grid.cuh"

namespace rfsr {

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

// The dynamic shared memory of a block.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

template <class Kernel, class... Args>
void launch(const char* name, Kernel kernel, Grid grid, cudaStream_t stream, Args... args) {
  if (grid.shared > 48 * 1024)  // more than every GPU has: asked for by kernel
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
  kernel<<<grid.blocks, grid.threads, grid.shared, stream>>>(args...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, " did not launch: ", cudaGetErrorString(error),
                  " (if no kernel image is available: for compute capability 8.0 and newer set TORCH_CUDA_ARCH_LIST to"
                  " this GPU's and install again, for an older GPU set RFSR_BACKEND=reference)");
}

}  // namespace rfsr
