// Instructions that CUDA C++ has no words for, as functions: copies that do not wait, and products by tensor cores.
// From sm_80 on. tests/ops/cuda_on_host has the same functions for the host.
#pragma once

#include "launch.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "the CUDA kernels need compute capability 8.0 or newer: take older ones out of TORCH_CUDA_ARCH_LIST"
#endif

namespace rfsr {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// ------------------------------------------------------------------------------------------ copies
// A thread's copies run on while it computes. commit_copies() closes a group of them; wait_copies<N>() waits until at
// most the N groups closed last are still under way. Other threads see the copies after a __syncthreads().

// Copies `bytes`, at most 16, from global to shared memory and fills the rest of 16 with zeros. Both aligned to 16.
// Past the first-level cache (.cg); the second level is to fetch whole lines of 128 bytes, whose rest comes next.
__device__ inline void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---------------------------------------------------------------------------------------- products
// A warp's product of small matrices, added to sum. Each lane brings its share of A and B and holds its share of the
// sum, as the PTX ISA lays down ("Matrix fragments"). With g = lane / 4 and t = lane % 4, for m16n8k16:
//   a0, a1, a2, a3   A[g][2t, 2t+1]   A[g+8][2t, 2t+1]   A[g][2t+8, 2t+9]   A[g+8][2t+8, 2t+9]    the first number of
//   b0, b1           B[2t, 2t+1][g]   B[2t+8, 2t+9][g]                                           a pair in the low half
//   sum[0 ... 3]     [g][2t]  [g][2t+1]  [g+8][2t]  [g+8][2t+1]
// The products are exact. PTX promises additions of at least single precision and leaves their rounding open;
// Fasi et al. 2021 (PeerJ CS 7:e330) found that tensor cores cut off.
#define RFSR_MMA(type)                                                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                              \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
__device__ inline void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1, BFloat16) {
  RFSR_MMA("bf16");
}
__device__ inline void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                           uint32_t b1, Half) {
  RFSR_MMA("f16");
}
#undef RFSR_MMA

// m8n8k4 in fp64: a = A[g][t], b = B[t][g], the sums [g][2t] and [g][2t+1].
__device__ inline void mma(double& sum0, double& sum1, double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sum0), "+d"(sum1)
               : "d"(a), "d"(b));
}

// ------------------------------------------------------------------------------------- conversions

// Two numbers rounded to bf16: `low` in the low half, `high` in the high half.
__device__ inline uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace rfsr
