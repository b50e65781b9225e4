// Streaming stores: a plain store first reads the line that it then overwrites, a streaming one writes past
// the caches. Where the output is too large to be still in a cache when it is read, that is a third of the
// traffic.
//
//   const Streaming streaming(bytes of the output);             // in each chunk, before its rows
//   for_lanes_out<2>(y, n, streaming.on, [&](int64_t j, int u, auto lanes) { put(y + j, value, lanes); });
#pragma once

#include "vec.h"

namespace fg::FG_LEVEL {

// Full vectors whose place in the output is aligned.
struct Stream : Full {};
struct StreamTwice : Twice {};

#if defined(__AVX512F__)
#define FG_STREAMS 1
FG_INLINE void stream(float* p, F a) { _mm512_stream_ps(p, a.v); }
FG_INLINE void stream(bf16* p, F a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
FG_INLINE void stream(bf16* p, F2 a) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_bf16(a)); }
FG_INLINE void stream(f16* p, F a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
#define FG_STREAMS 1
FG_INLINE void stream(float* p, F a) { _mm256_stream_ps(p, a.v); }
FG_INLINE void stream(bf16* p, F a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a)); }
FG_INLINE void stream(f16* p, F a) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#endif

struct Streaming {
  static constexpr int64_t kLeastBytes = 12 * 1024 * 1024;  // measured on chains of ops: benchmarks/NOTES.md

  bool on = false;
#if defined(FG_STREAMS)
  explicit Streaming(int64_t bytes) : on(bytes >= kLeastBytes) {}
  ~Streaming() {  // other threads see streaming stores in no order without this
    if (on) _mm_sfence();
  }
#else
  explicit Streaming(int64_t) {}
#endif
};

template <class T, class V, class Lanes>
FG_INLINE void put(T* p, V a, Lanes lanes) {
#if defined(FG_STREAMS)
  if constexpr (__is_base_of(Stream, Lanes) || __is_base_of(StreamTwice, Lanes)) return stream(p, a);
#endif
  store(p, a, lanes);
}

// for_lanes over an output row `to`, whose elements body stores by `put`. When streaming, a part comes first,
// up to where vectors are aligned. Two as in for_lanes.
template <int U, bool Two = false, class T, class Body>
FG_INLINE void for_lanes_out(const T* to, int64_t n, bool streaming, const Body& body) {
  constexpr int64_t kStep = Two ? 2 * W : W;
  constexpr uintptr_t kAligned = kStep * sizeof(T);
  const uintptr_t at = reinterpret_cast<uintptr_t>(to), past = at % kAligned;
  if (!streaming || at % sizeof(T) != 0) return for_lanes<U, Two>(n, body);
  int64_t j = past == 0 ? 0 : static_cast<int64_t>((kAligned - past) / sizeof(T));
  if (j > n) j = n;
  if (j > 0) for_lanes<1>(j, body);
  if constexpr (Two) {
    for (; j + U * kStep <= n; j += U * kStep) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) body(j + u * kStep, u, StreamTwice{});
    }
    for (; j + kStep <= n; j += kStep) body(j, 0, StreamTwice{});
  } else {
    for (; j + U * W <= n; j += U * W) {
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) body(j + u * W, u, Stream{});
    }
  }
  for (; j + W <= n; j += W) body(j, 0, Stream{});
  if (j < n) body(j, 0, Part{static_cast<int>(n - j)});
}

}  // namespace fg::FG_LEVEL
