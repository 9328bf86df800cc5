// Stands in for csrc/cuda/instructions.cuh: copies that come early or late, and products of a warp, on the host.
#pragma once

#include <algorithm>
#include <cstring>

#include "launch.cuh"

namespace rfsr {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// ------------------------------------------------------------------------------------------ copies
// Nothing has to be copied before wait_copies() says so: whoever reads too early finds NaN, or what was there before.
// Some copies come at once: whoever still reads what was there before finds them.

inline void make(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.bytes);
}
inline void copy_async(void* shared, const void* global, int bytes) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  check(aligned(shared) && (bytes == 0 || aligned(global)) && 0 <= bytes && bytes <= 16, "an unaligned copy");
  running->copies.push_back({shared, global, bytes, running->groups});
  if (toss()) make(running->copies.back());
}
inline void commit_copies() { ++running->groups; }
template <int Pending>
void wait_copies() {
  auto& copies = running->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < running->groups - Pending; ++done) make(copies[done]);
  copies.erase(copies.begin(), copies.begin() + done);
}

// ---------------------------------------------------------------------------------------- products
// What the lanes of a warp brought; the last of them computes for all. PTX ISA, "Matrix fragments".

template <class Number>
float half_of(uint32_t pair, int high) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * high);
  Number number;
  std::memcpy(&number, &bits, 2);
  return static_cast<float>(number);
}

// The products are exact here too. As tensor cores were found to, this lines up what it adds at the largest of it and
// cuts off what lies below: here below the last bit that the largest has in fp32, the least precision that PTX allows.
inline float cut_off(double sum) {
  const auto rounded = static_cast<float>(sum);
  return std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}
template <int Count>
float add_cut_off(const double (&terms)[Count]) {
  double sum = 0, largest = 0;
  for (double term : terms) sum += term, largest = std::max(largest, std::fabs(term));
  if (largest == 0 || !std::isfinite(sum)) return static_cast<float>(sum);
  const double last_bit = std::ldexp(1.0, std::ilogb(largest) - 23);
  int64_t cut = 0;
  for (double term : terms) cut += static_cast<int64_t>(term / last_bit);
  return cut_off(static_cast<double>(cut) * last_bit);
}

template <class Number>
void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Number) {
  struct Share {
    uint32_t a[4], b[2];
    float* sum;
  };
  static Share shares[32];
  shares[running->lane] = {{a0, a1, a2, a3}, {b0, b1}, sum};
  if (!last_of_warp()) return;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Share& share = shares[lane];
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {  // element i of A, as PTX numbers them
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][column] = half_of<Number>(share.a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      b[row][group] = half_of<Number>(share.b[i / 2], i % 2);
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float& total = shares[i % 8 * 4 + j / 2].sum[i / 8 * 2 + j % 2];
      double terms[17] = {total};
      for (int k = 0; k < 16; ++k) terms[k + 1] = double(a[i][k]) * b[k][j];
      total = add_cut_off(terms);
    }
}

inline void mma(double& sum0, double& sum1, double a, double b) {
  struct Share {
    double a, b;
    double* sums[2];
  };
  static Share shares[32];
  shares[running->lane] = {a, b, {&sum0, &sum1}};
  if (!last_of_warp()) return;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) {
      const int row = lane >> 2, column = lane % 4 * 2 + i;
      for (int k = 0; k < 4; ++k) *shares[lane].sums[i] += shares[row * 4 + k].a * shares[column * 4 + k].b;
    }
}

// ------------------------------------------------------------------------------------- conversions

inline uint32_t bf16_pair(float low, float high) {
  return BFloat16(low).x | uint32_t(BFloat16(high).x) << 16;
}
inline float float_of(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

}  // namespace rfsr
