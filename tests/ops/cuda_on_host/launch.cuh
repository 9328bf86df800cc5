// Stands in for csrc/cuda/launch.cuh: runs the CUDA kernels on the host.
//
// A block is a set of fibers on one thread. Each runs until __syncthreads() or its end, then the next has its
// turn; once all have, the round begins again. That is slow and says nothing about speed, but every index, edge
// and sum of the kernels is computed by the lines a GPU would run.
#pragma once

#include <ucontext.h>

#include <functional>
#include <vector>

#include "../tensors.h"

#define __global__
#define __device__
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = void*;

namespace rfsr {

constexpr int kThreads = 256;

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};
inline bool on_gpu(const Tensor&) { return true; }

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
};
inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void()> work;

inline void run_fiber() {
  work();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}
inline void synchronise() { swapcontext(&running->context, &scheduler); }
#define __syncthreads() ::rfsr::synchronise()

template <class Kernel, class... Args>
void launch(const char*, Kernel kernel, dim3 grid, cudaStream_t, Args... args) {
  static std::vector<Fiber> fibers(kThreads);
  work = [&] { kernel(args...); };
  gridDim = grid;
  blockDim = dim3(kThreads);
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    blockIdx = dim3(block % grid.x, block / grid.x);
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
      fiber.done = false;
    }
    for (bool unfinished = true; unfinished;) {
      unfinished = false;
      for (int t = 0; t < kThreads; ++t) {
        if (fibers[t].done) continue;
        running = &fibers[t];
        threadIdx = dim3(t);
        swapcontext(&scheduler, &running->context);
        unfinished |= !running->done;
      }
    }
  }
}

}  // namespace rfsr
