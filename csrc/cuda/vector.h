// N adjacent elements of a row as N fp32 registers: by 16-byte accesses where the row allows, element by
// element in its tail and in rows that do not start on 16 bytes.
#pragma once

#include "dtype.h"

namespace fg::FG_LEVEL {

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of one 16-byte access

FG_DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// One instruction each, in global memory. The store is spelled out: left to itself the compiler splits some
// in four.
FG_DEVICE uint4 load16(const void* p) {
#ifdef FG_HOST_EMULATION
  if (!is_aligned(p)) emulation::fail("misaligned address", __FILE__, __LINE__);
#endif
  return *static_cast<const uint4*>(p);
}

FG_DEVICE void store16(void* p, uint4 v) {
#ifdef FG_HOST_EMULATION
  if (!is_aligned(p)) emulation::fail("misaligned address", __FILE__, __LINE__);
  *static_cast<uint4*>(p) = v;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

// p is aligned to 16 bytes.
template <int N, class T>
FG_DEVICE void load_vector(const T* p, float (&v)[N]) {
  static_assert(N % kVector<T> == 0);
#pragma unroll
  for (int i = 0; i < N; i += kVector<T>) {
    const uint4 raw = load16(p + i);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(T) == 4) {
        v[i + w] = float_of(words[w]);
      } else {
        v[i + 2 * w] = to_float(T{static_cast<uint16_t>(words[w])});
        v[i + 2 * w + 1] = to_float(T{static_cast<uint16_t>(words[w] >> 16)});
      }
    }
  }
}

template <int N, class T>
FG_DEVICE void store_vector(T* p, const float (&v)[N]) {
  static_assert(N % kVector<T> == 0);
#pragma unroll
  for (int i = 0; i < N; i += kVector<T>) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(T) == 4) {
        words[w] = bits_of(v[i + w]);
      } else {
        words[w] = two_bits(T{}, v[i + 2 * w], v[i + 2 * w + 1]);
      }
    }
    store16(p + i, uint4{words[0], words[1], words[2], words[3]});
  }
}

// The elements [0, N) at p, of which `count` exist (it may be above N, or negative); the others become
// `fill`. aligned: the row starts on 16 bytes, and p is a multiple of N elements into it.
template <int N, class T>
FG_DEVICE void load(const T* p, int64_t count, bool aligned, float (&v)[N], float fill = 0.0f) {
  if (aligned && count >= N) {
    load_vector(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = i < count ? to_float(p[i]) : fill;
  }
}

template <int N, class T>
FG_DEVICE void store(T* p, int64_t count, bool aligned, const float (&v)[N]) {
  if (aligned && count >= N) {
    store_vector(p, v);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) p[i] = from_float<T>(v[i]);
  }
}

}  // namespace fg::FG_LEVEL
