// Lanes: a vector register of numbers computed side by side, and the choice at run time of how wide
// registers are.
//
// Every operation here is rounded by itself (setup.py turns contraction to FMA off), so SSE2, AVX2
// and AVX-512 give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#define BLD_EXT_INLINE [[gnu::always_inline]] inline
#define BLD_EXT_INLINE_LAMBDA __attribute__((always_inline))

namespace bld_ext {

template <typename T, int64_t W> struct Vector {
  typedef T type __attribute__((vector_size(W * sizeof(T)), may_alias));
  typedef T anywhere __attribute__((vector_size(W * sizeof(T)), may_alias, aligned(alignof(T))));
};
template <typename T, int64_t W> using Lanes = typename Vector<T, W>::type;

// A register from any address, in one load. A memcpy into an element of an array is made of loads
// and stores of 16 bytes, and reading the whole element has to wait for them.
template <int64_t W, typename T> BLD_EXT_INLINE Lanes<T, W> read(const T *from) {
  return *reinterpret_cast<const typename Vector<T, W>::anywhere *>(from);
}

// e^x for x <= 0; 0 where the result would not be a normal number. Relative error below 1.2e-7.
template <int64_t W> BLD_EXT_INLINE void exp_nonpositive(Lanes<float, W> &x) {
  typedef Lanes<float, W> Floats;
  typedef Lanes<int32_t, W> Ints;
  const Floats smallest = Floats{} - 87.33f; // log of the smallest normal float
  const auto underflow = x < smallest;
  const Floats z = underflow ? smallest : x; // nan stays
  // n = round(z / ln 2): adding 1.5 * 2^23 leaves the integer in the low bits
  const float magic = 12582912.f;
  const Floats shifted = z * 1.44269504f + magic;
  const Floats n = shifted - magic;
  // ln 2 in two parts, the first with so few bits that n times it is exact
  const Floats r = (z - n * 0.693359375f) - n * -2.12194440e-4f;
  const Floats p =
      (((1.3813145e-3f * r + 8.3694188e-3f) * r + 4.1668456e-2f) * r + 1.6666515e-1f) * r +
      4.9999994e-1f;
  const Floats y = p * (r * r) + r + 1.f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23; // 2^n
  Floats scale;
  std::memcpy(&scale, &bits, sizeof scale);
  x = underflow ? Floats{} : y * scale;
}

// log x for x >= 1. Relative error below 2e-7.
template <int64_t W> BLD_EXT_INLINE void log_of_sum(Lanes<float, W> &x) {
  typedef Lanes<float, W> Floats;
  typedef Lanes<int32_t, W> Ints;
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Ints n = (bits - 0x3f3504f3) >> 23; // x = m * 2^n with m in [sqrt 1/2, sqrt 2)
  bits = bits - (n << 23);
  Floats m;
  std::memcpy(&m, &bits, sizeof m);
  const Floats f = m - 1.f, e = __builtin_convertvector(n, Floats);
  const Floats p =
      ((((((-7.6344997e-2f * f + 1.2761582e-1f) * f - 1.3160184e-1f) * f + 1.4201757e-1f) * f -
         1.6623357e-1f) *
            f +
        2.0001227e-1f) *
           f -
       2.5000820e-1f) *
          f +
      3.3333331e-1f;
  const Floats tail = f * f * (f * p - 0.5f) + e * -2.12194440e-4f;
  x = (e * 0.693359375f + (f + tail)) + (x - x); // x - x: nan stays nan
}

template <int64_t W> BLD_EXT_INLINE void exp_nonpositive(Lanes<double, W> &x) {
  for (int64_t i = 0; i < W; ++i)
    x[i] = std::exp(x[i]);
}

template <int64_t W> BLD_EXT_INLINE void log_of_sum(Lanes<double, W> &x) {
  for (int64_t i = 0; i < W; ++i)
    x[i] = std::log(x[i]);
}

enum class Registers { baseline, avx2, avx512 };

// The widest registers of this machine, or fewer where ATEN_CPU_CAPABILITY asks torch for fewer.
inline Registers registers() {
#if defined(__x86_64__)
  static const Registers chosen = [] {
    const char *variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string_view wanted = variable ? variable : "";
    __builtin_cpu_init();
    if (wanted != "default" && wanted != "avx2" && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Registers::avx512;
    if (wanted != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return Registers::avx2;
    return Registers::baseline;
  }();
  return chosen;
#else
  return Registers::baseline;
#endif
}

} // namespace bld_ext
