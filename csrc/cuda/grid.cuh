// The shape of a launch, for launch.cuh and for what tests/ops/cuda_on_host puts in its place; both know dim3 before.
#pragma once

namespace rfsr {

constexpr int kThreads = 256;  // per block, unless a launch says otherwise

// Blocks of a launch, the threads of each, and its bytes of dynamic shared memory.
struct Grid {
  dim3 blocks;
  unsigned threads, shared;
  Grid(dim3 blocks, unsigned threads = kThreads, unsigned shared = 0)
      : blocks(blocks), threads(threads), shared(shared) {}
  Grid(unsigned blocks) : Grid(dim3(blocks)) {}
};

}  // namespace rfsr
