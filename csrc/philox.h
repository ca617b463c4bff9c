// Philox4x32-10 and the maps from its words to numbers: bld_ext/philox.py in C++, with the same
// bits. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace bld_ext {

using Words = std::array<uint32_t, 4>;

// counter = (image index, view, step, op), key = seed
inline Words philox(Words counter, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53) * counter[0];
    const uint64_t product1 = uint64_t(0xCD9E8D57) * counter[2];
    counter = {
        static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(product0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return counter;
}

// In [0, 1) with 24 random bits, exact.
inline double uniform(uint32_t word) { return (word >> 8) * 0x1p-24; }

// The ends of an interval, as float32.
struct Interval {
  float low, span, high;
  Interval(double low_, double high_)
      : low(static_cast<float>(low_)), span(static_cast<float>(high_ - low_)),
        high(static_cast<float>(high_)) {}
  static Interval around(double center, double reach) { return {center - reach, center + reach}; }
};

// In [low, high]; the product is exact, so fused and separate multiply-add agree.
inline float between(uint32_t word, const Interval &in) {
  return std::min(static_cast<float>(in.low + uniform(word) * in.span), in.high);
}

// 0 to n - 1
inline int64_t below(uint32_t word, int64_t n) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(n)) >> 32);
}

} // namespace bld_ext
