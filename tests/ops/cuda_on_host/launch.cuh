// Stands in for csrc/cuda/launch.cuh: runs the CUDA kernels on the host.
//
// A block is a set of fibers on one thread. Each runs until it has to wait for others: at __syncthreads() for those
// of its block, at a product of a warp for those of its warp. Then the next has its turn, in an order that changes.
// That is slow and says nothing about speed, but every index, edge and sum of the kernels is computed by the lines a
// GPU would run. What a GPU would stop at stops here: a grid that is too large, shared memory that was not asked for,
// a barrier that some threads miss.
#pragma once

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "../tensors.h"

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(threads, blocks)

struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = void*;

#include "grid.cuh"

namespace rfsr {

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};

inline void check(bool fine, const char* mistake) {
  if (fine) return;
  std::fprintf(stderr, "%s in block %u, %u\n", mistake, blockIdx.x, blockIdx.y);
  std::abort();
}

// Heads or tails, the same ones in every run. Which threads come first, and which copies are early, is left to it: who
// takes a number that another thread has not written yet, or writes over one that another still needs, is found out in
// one of the orders.
inline bool toss() {
  static uint32_t state = 1;
  state ^= state << 13, state ^= state >> 17, state ^= state << 5;
  return state & 1;
}

// ---------------------------------------------------------------------------------------- fibers

enum class State { kReady, kAtProduct, kAtBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  explicit Fiber(int thread) : thread(thread), lane(thread % 32) {}
  const int thread, lane;
  State state = State::kDone;
  bool begun = false;
  jmp_buf context;
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[1 << 16]};
  std::vector<Copy> copies;  // under way, and how many groups of them are closed
  int groups = 0;
};
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* running;
inline jmp_buf scheduler;
inline std::function<void()> work;

// Contexts only begin a fiber: changing to one asks the system, for signal masks, and jumps do not.
inline void wait_as(State state) {
  running->state = state;
  if (_setjmp(running->context) == 0) _longjmp(scheduler, 1);
}
inline void run_fiber() {
  for (;;) {
    work();
    check(running->copies.empty(), "a copy that nobody waited for");
    wait_as(State::kDone);
  }
}
inline void go_on(Fiber& fiber) {
  running = &fiber;
  threadIdx = dim3(fiber.thread);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.context, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = 1 << 16;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

inline void synchronise() { wait_as(State::kAtBarrier); }
#define __syncthreads() ::rfsr::synchronise()

// True for the lane that comes to a product of its warp last, which computes it before the others go on.
inline int arrived;
inline bool last_of_warp() {
  if (++arrived < 32) {
    wait_as(State::kAtProduct);
    return false;
  }
  arrived = 0;
  for (int t = running->thread - running->lane, end = t + 32; t < end; ++t) fibers[t]->state = State::kReady;
  return true;
}

// Runs the lanes of a warp until all are at a barrier or done.
inline void run_warp(int first) {
  for (bool again = true; again;) {
    again = false;
    const int turn = toss() ? 31 : 0;
    for (int lane = 0; lane < 32; ++lane)
      if (Fiber& fiber = *fibers[first + (lane ^ turn)]; fiber.state == State::kReady) go_on(fiber), again = true;
  }
  check(arrived == 0, "a product that some lanes of the warp miss");
}

// ---------------------------------------------------------------------------------------- launch

// What a block asks for of the dynamic shared memory lies at its end, and beyond that is none.
constexpr size_t kSharedMemory = 96 * 1024, kPage = 65536;
inline unsigned char* const shared_end = [] {
  void* memory = mmap(nullptr, kSharedMemory + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(memory != MAP_FAILED, "no memory");
  unsigned char* end = static_cast<unsigned char*>(memory) + kSharedMemory;
  mprotect(end, kPage, PROT_NONE);
  return end;
}();
inline size_t shared_bytes;
inline unsigned char* shared_memory() { return shared_end - shared_bytes; }

template <class Kernel, class... Args>
void launch(const char*, Kernel kernel, Grid grid, cudaStream_t, Args... args) {
  work = [&] { kernel(args...); };
  gridDim = grid.blocks;
  blockDim = dim3(grid.threads);
  const int threads = static_cast<int>(grid.threads);
  check(0 < gridDim.x && gridDim.x < 1u << 31 && 0 < gridDim.y && gridDim.y < 1u << 16 && threads <= 1024,
        "a grid that no GPU runs,");
  check(grid.shared <= kSharedMemory && grid.shared % 16 == 0, "more shared memory than every GPU has, or an odd end");
  shared_bytes = grid.shared;
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>(fibers.size()));
  const unsigned blocks = gridDim.x * gridDim.y;
  for (unsigned b = 0, last = toss() ? blocks - 1 : 0; b < blocks; ++b) {
    const unsigned block = last ? last - b : b;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x);
    std::memset(shared_memory(), 0xff, shared_bytes);  // NaN
    for (int done = 0; done < threads;) {
      check(done == 0, "a barrier that some threads of the block miss");
      for (int t = 0; t < threads; ++t) fibers[t]->state = State::kReady;
      for (int w = 0, end = toss() ? threads - 32 : 0; w < threads; w += 32) run_warp(end ? end - w : w);
      for (int t = 0; t < threads; ++t) done += fibers[t]->state == State::kDone;
    }
  }
}

}  // namespace rfsr
