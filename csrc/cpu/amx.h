// bf16 matrix products by the tile unit of Intel's processors since 2023 (AMX): one instruction multiplies 16 x 32 by
// 32 x 16 and adds the products up in fp32, sixteen times the arithmetic of an AVX-512 multiply-add.
#pragma once

#include "rows.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RFSR_AMX __attribute__((target("avx512f,avx512bw,avx512bf16,amx-tile,amx-bf16")))
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rfsr {

#ifdef RFSR_AMX
constexpr i64 kTiled = 32;  // rows and columns of a product, and the step along which it is summed

inline bool has_amx() {
  static const bool yes = [] {
    constexpr int ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;  // the system saves tiles only where it is asked to
  }();
  return yes;
}

// The tile registers of this thread while they are in use: eight of 16 rows and 64 bytes.
class Tiles {
 public:
  RFSR_AMX Tiles() {
    // Static: GCC believes that the instruction reads eight bytes, and would not store more of a local one.
    static const struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shape = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&shape);
  }
  RFSR_AMX ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  RFSR_AMX void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // sum[i][j] += sum_k a[i * ld + k] b[k][j], 32 x 32; b holds rows in pairs, [k / 2][j][k % 2]. depth: multiple of 32.
  RFSR_AMX void add(const uint16_t* a, i64 ld, const uint32_t* b, i64 depth) {
    __asm__ volatile("" ::: "memory");  // the loads below do not say that they read what was stored before
    for (i64 k = 0; k < depth; k += kTiled, a += kTiled, b += kTiled / 2 * kTiled) {
      _tile_loadd(4, a, ld * 2);
      _tile_loadd(6, b, kTiled * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + 16, kTiled * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + 16 * ld, ld * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  RFSR_AMX void store(float (*sum)[kTiled]) {
    _tile_stored(0, sum[0], kTiled * 4);
    _tile_stored(1, sum[0] + 16, kTiled * 4);
    _tile_stored(2, sum[16], kTiled * 4);
    _tile_stored(3, sum[16] + 16, kTiled * 4);
  }
};

// high[j] + low[j] = x[j] but for a 2^-17th of it
RFSR_AMX inline void split_row(const float* x, i64 count, torch::headeronly::BFloat16* high,
                               torch::headeronly::BFloat16* low) {
  for (i64 j = 0; j < count; ++j) high[j] = x[j];
  for (i64 j = 0; j < count; ++j) low[j] = x[j] - static_cast<float>(high[j]);
}

// out[j] = bf16(sum[j] + bias), a whole row of a product
RFSR_AMX inline void store_row(const float* sum, float bias, void* out) {
  const __m512 low = _mm512_add_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(bias));
  const __m512 high = _mm512_add_ps(_mm512_loadu_ps(sum + 16), _mm512_set1_ps(bias));
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#endif

}  // namespace rfsr
