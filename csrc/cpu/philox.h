// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), word 0 alone: the
// random bits of element i depend on (seed, offset + i) and on nothing else.
#pragma once

#include "vec.h"

namespace fg::FG_LEVEL {

typedef uint64_t Counter __attribute__((vector_size(sizeof(U64))));

// words[l] = philox(key = seed, counter = (index + l * step, 0))[0] for W lanes.
FG_INLINE void philox(uint64_t seed, uint64_t index, uint32_t* words, uint64_t step = 1) {
  constexpr int L =
      sizeof(U64) / 8;  // 64-bit lanes: half of W; their high halves hold rubbish that nobody reads
  const Counter m0 = Counter{} + 0xD2511F53u, m1 = Counter{} + 0xCD9E8D57u;
  for (int half = 0; half < W / L; ++half) {
    Counter c0, c1, c2{}, c3{};
    for (int l = 0; l < L; ++l) c0[l] = index + static_cast<uint64_t>(half * L + l) * step;
    c1 = c0 >> 32;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Counter p0 =
          reinterpret_cast<Counter>(multiply32(reinterpret_cast<U64>(c0), reinterpret_cast<U64>(m0)));
      const Counter p1 =
          reinterpret_cast<Counter>(multiply32(reinterpret_cast<U64>(c2), reinterpret_cast<U64>(m1)));
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int l = 0; l < L; ++l) words[half * L + l] = static_cast<uint32_t>(c0[l]);
  }
}

struct Dropout {
  uint64_t seed, offset;
  uint32_t threshold;
  float scale;  // 1 / (1 - p)

  // x * scale where element `index` and its followers are kept, else 0.
  FG_INLINE F apply(F x, int64_t index) const {
    alignas(64) uint32_t words[W];
    philox(seed, offset + static_cast<uint64_t>(index), words);
    return select(at_least(words, threshold), x * set(scale), set(0.0f));
  }
};

}  // namespace fg::FG_LEVEL
