// Helpers of the CPU kernels: function clones for newer instruction sets, and rows of numbers.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../tensors.h"

// One binary, several instruction sets: the loader picks the clone the processor can run. Without this
// a portable build would stop at SSE2, a quarter of what today's processors add up in one instruction.
// No clone for AVX-512: the loader would pick it whatever ATEN_CPU_CAPABILITY says, and it was never faster.
// None under ThreadSanitizer: whoever picks a clone would call its functions before the loader has found them.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#if __GNUC__ >= 12
#define RFSR_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))  // AVX2 and FMA
#else
#define RFSR_CLONES __attribute__((target_clones("fma", "default")))  // which AVX comes with; no AVX2
#endif
#else
#define RFSR_CLONES
#endif
#if defined(__GNUC__)
#define RFSR_INLINE inline __attribute__((always_inline))
#define RFSR_PREFETCH(address) __builtin_prefetch(address)
#else
#define RFSR_INLINE inline
#define RFSR_PREFETCH(address)
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define RFSR_F16C __attribute__((target("avx2,f16c")))
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define RFSR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RFSR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})  // Index: integers as wide as the elements
#endif

namespace rfsr {

// Kernels that are written for AVX-512, rather than left to the compiler's clones, ask here. As for PyTorch's own,
// ATEN_CPU_CAPABILITY=avx2 or default stands for a smaller processor.
#if defined(__x86_64__) && defined(__GNUC__)
#define RFSR_AVX512 __attribute__((target("avx512f")))
inline bool has_avx512() {
  static const bool yes = [] {
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
    return (capability == nullptr || std::strncmp(capability, "avx512", 6) == 0) && __builtin_cpu_supports("avx512f");
  }();
  return yes;
}
#else
#define RFSR_AVX512
inline bool has_avx512() { return false; }
#endif

// Asks for huge pages under a large result that is about to be written, as NumPy does for its arrays: new memory
// otherwise stops the writer at every 4 KiB, which costs more than the arithmetic here. Where the system has none of
// them to give, nothing happens.
inline void advise_huge_pages(void* memory, i64 bytes) {
#ifdef __linux__
  constexpr i64 page = 4096;
  if (bytes < (i64(1) << 22)) return;
  const i64 skipped = (page - reinterpret_cast<i64>(memory) % page) % page;
  madvise(static_cast<char*>(memory) + skipped, static_cast<size_t>(bytes - skipped), MADV_HUGEPAGE);
#endif
}

// Uninitialised memory at a cache-line boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(i64 count)
      : data_(
            static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(max(count, 1)), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// out[k] = p[k], with the type's own rounding.
template <class From, class To>
RFSR_INLINE void convert_row(const From* p, i64 count, To* out) {
  for (i64 k = 0; k < count; ++k) out[k] = static_cast<To>(p[k]);
}

// bf16 is the upper half of fp32: as functions of their own these vectorise for the processor at hand.
#define RFSR_CONVERT_BFLOATS(name, From, To)                                                       \
  RFSR_CLONES inline void name(const From* p, i64 count, To* out) {                                \
    for (i64 k = 0; k < count; ++k) out[k] = static_cast<To>(p[k]);                                \
  }                                                                                                \
  RFSR_INLINE void convert_row(const From* p, i64 count, To* out) { name(p, count, out); }
RFSR_CONVERT_BFLOATS(widen, torch::headeronly::BFloat16, float)
RFSR_CONVERT_BFLOATS(narrow, float, torch::headeronly::BFloat16)

// fp16 by the processor's own instruction, eight at a time: the compiler would convert one by one, in software.
// Both ways round to nearest even, so they give the same numbers.
#ifdef RFSR_F16C
inline bool has_f16c() {
  static const bool yes = __builtin_cpu_supports("avx2");  // no processor has AVX2 without F16C
  return yes;
}
RFSR_F16C inline i64 convert_eights(const torch::headeronly::Half* p, i64 count, float* out) {
  i64 k = 0;
  for (; k + 8 <= count; k += 8)
    _mm256_storeu_ps(out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + k))));
  return k;
}
RFSR_F16C inline i64 convert_eights(const float* p, i64 count, torch::headeronly::Half* out) {
  i64 k = 0;
  for (; k + 8 <= count; k += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k),
                     _mm256_cvtps_ph(_mm256_loadu_ps(p + k), _MM_FROUND_TO_NEAREST_INT));
  return k;
}
#define RFSR_CONVERT_HALVES(From, To)                                    \
  RFSR_INLINE void convert_row(const From* p, i64 count, To* out) {      \
    const i64 done = has_f16c() ? convert_eights(p, count, out) : 0;     \
    for (i64 k = done; k < count; ++k) out[k] = static_cast<To>(p[k]);   \
  }
RFSR_CONVERT_HALVES(torch::headeronly::Half, float)
RFSR_CONVERT_HALVES(float, torch::headeronly::Half)
#endif

// `count` elements from p on as contiguous Acc values: the memory itself where it already is that,
// else a converted copy in `scratch`. Converting a tile at a time keeps the arithmetic below free of
// dtypes and strides, and the copy never leaves the L1 cache.
template <class T, class Acc>
RFSR_INLINE const Acc* load_row(const T* p, i64 stride, i64 count, Acc* scratch) {
  if constexpr (std::is_same_v<T, Acc>) {
    if (stride == 1) return p;
  }
  if (stride == 1) {
    convert_row(p, count, scratch);
  } else {
    for (i64 k = 0; k < count; ++k) scratch[k] = static_cast<Acc>(p[k * stride]);
  }
  return scratch;
}

// Iterations per thread so that waking one is worth it: about 32k elementary operations.
inline i64 grain(i64 work_per_item) { return max(1, 32768 / max(1, work_per_item)); }

}  // namespace rfsr
