// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), word 0 alone: the
// random bits of element i depend on (seed, offset + i) and on nothing else.
#pragma once

#include "platform.h"

namespace fg::FG_LEVEL {

FG_DEVICE uint32_t philox(uint64_t seed, uint64_t index) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

struct Dropout {
  uint64_t seed, offset;
  uint32_t threshold;
  float scale;  // 1 / (1 - p)

  // rng: [seed, offset] in the device's memory.
  FG_DEVICE Dropout(const int64_t* rng, uint32_t threshold, float scale)
      : seed(static_cast<uint64_t>(rng[0])),
        offset(static_cast<uint64_t>(rng[1])),
        threshold(threshold),
        scale(scale) {}

  // x * scale where element `index` is kept, else 0.
  FG_DEVICE float apply(float x, int64_t index) const {
    return philox(seed, offset + static_cast<uint64_t>(index)) >= threshold ? x * scale : 0.0f;
  }
};

}  // namespace fg::FG_LEVEL
