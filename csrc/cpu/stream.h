// Streaming stores: a plain store first reads the line that it then overwrites, a streaming one writes past
// the caches. Where the output is too large to be still in a cache when it is read, that is a third of the
// traffic.
//
//   const Streaming streaming(bytes of the output);             // in each chunk, before its rows
//   for_lanes_out<2>(y, n, streaming.on, [&](int64_t j, int u, auto lanes) { put(y + j, value, lanes); });
#pragma once

#include <cstring>

#include "vec.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fg::FG_LEVEL {

// Full vectors whose place in the output is aligned.
struct Stream : Full {};
struct StreamTwice : Twice {};

// The whole vectors of a row, taken Twice or not.
template <bool Two>
struct Wholes {
  using Plain = Full;
  using Streamed = Stream;
};
template <>
struct Wholes<true> {
  using Plain = Twice;
  using Streamed = StreamTwice;
};

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

// Whether each row of n begins with a cache line.
template <class T>
bool in_lines(const T* out, int64_t n) {
  return reinterpret_cast<uintptr_t>(out) % 64 == 0 && n * static_cast<int64_t>(sizeof(T)) % 64 == 0;
}

// How much of `rows` rows of n may be streamed: all or nothing. Rows that are taken Twice from their
// beginning, with scratch in that order, only if they are in lines.
template <class T>
int64_t streamed_bytes(const T* out, int64_t rows, int64_t n) {
  const bool may = out != nullptr && (in_lines(out, n) || !kTwice<T>);
  return may ? rows * n * static_cast<int64_t>(sizeof(T)) : 0;
}

template <class T, class V, class Lanes>
FG_INLINE void put(T* p, V a, Lanes lanes) {
#if defined(FG_STREAMS)
  if constexpr (__is_base_of(Stream, Lanes) || __is_base_of(StreamTwice, Lanes)) return stream(p, a);
#endif
  store(p, a, lanes);
}

// for_lanes over an output row `to`, whose elements body stores by `put`. When streaming, a part comes first,
// up to where vectors are aligned: body must not care where they begin. Two as in for_lanes.
template <int U, bool Two = false, class T, class Body>
FG_INLINE void for_lanes_out(const T* to, int64_t n, bool streaming, const Body& body) {
  constexpr int64_t kStep = Two ? 2 * W : W;
  constexpr uintptr_t kAligned = kStep * sizeof(T);
  const uintptr_t at = reinterpret_cast<uintptr_t>(to), past = at % kAligned;
  if (!streaming || at % sizeof(T) != 0) return for_lanes<U, Two>(n, body);
  int64_t j = past == 0 ? 0 : static_cast<int64_t>((kAligned - past) / sizeof(T));
  if (j > n) j = n;
  if (j > 0) for_lanes<1>(j, body);
  const typename Wholes<Two>::Streamed streamed;
  for (; j + U * kStep <= n; j += U * kStep) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) body(j + u * kStep, u, streamed);
  }
  for (; j + kStep <= n; j += kStep) body(j, 0, streamed);
  // What is left does not fill a vector, nor with Two a cache line: plain, so that what follows may share it.
  for_lanes<1>(n - j, [&](int64_t k, int u, auto lanes) FG_LAMBDA { body(j + k, u, lanes); });
}

// As std::memcpy, past the caches but for the lines of which it is a part. next: asked for on the way, as
// many bytes.
inline void stream_copy(void* to, const void* from, int64_t bytes, const void* next) {
  char* p = static_cast<char*>(to);
  const char* q = static_cast<const char*>(from);
#if defined(__SSE2__)
  if (bytes >= 64) {
    const int64_t head = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) & 63;
    const char* ahead = static_cast<const char*>(next);
    std::memcpy(p, q, static_cast<uint64_t>(head));
    p += head, q += head, bytes -= head;
    for (; bytes >= 64; p += 64, q += 64, ahead += 64, bytes -= 64) {
      prefetch(ahead);
      for (int i = 0; i < 64; i += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(q + i));
        _mm_stream_si128(reinterpret_cast<__m128i*>(p + i), x);
      }
    }
  }
#endif
  std::memcpy(p, q, static_cast<uint64_t>(bytes));
}

// Zeros past the caches, but in the lines of which they are a part.
inline void stream_zeros(void* to, int64_t bytes) {
  char* p = static_cast<char*>(to);
#if defined(__SSE2__)
  if (bytes >= 64) {
    const int64_t head = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) & 63;
    std::memset(p, 0, static_cast<uint64_t>(head));
    p += head, bytes -= head;
    for (; bytes >= 64; p += 64, bytes -= 64)
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(p + i), _mm_setzero_si128());
  }
#endif
  std::memset(p, 0, static_cast<uint64_t>(bytes));
}

}  // namespace fg::FG_LEVEL
