// 16 bytes at a time.
#pragma once

#include "launch.cuh"

namespace rfsr {

// `Count` neighboring numbers, moved 16 bytes at a time, or all at once where they are fewer.
template <class T, int Count>
struct alignas(Count * sizeof(T) < 16 ? Count * sizeof(T) : 16) Pack {
  T v[Count];
};

template <class T>
constexpr int kPerPack = 16 / sizeof(T);

// True when x and all strides beyond a row of pixels are multiples of 16 bytes, and the row is contiguous.
template <class T>
bool aligned_planes(const T* x, const Strided4& v) {
  constexpr i64 each = kPerPack<T>;
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && v.sw == 1 && v.sc % each == 0 && v.sn % each == 0;
}

// True when every row of the view begins at a multiple of 16 bytes and is contiguous.
template <class T>
bool rows_of_packs(const T* x, const Strided4& v) {
  return aligned_planes(x, v) && v.sh % kPerPack<T> == 0;
}

// True when every plane of the view does and is contiguous.
template <class T>
bool planes_of_packs(const T* x, const Strided4& v) {
  return aligned_planes(x, v) && v.flat();
}

}  // namespace rfsr
