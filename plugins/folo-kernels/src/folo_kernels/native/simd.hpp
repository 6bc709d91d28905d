// Vectors of float in the widest registers that the compiler was told of, and the few functions needed over them.
//
// The code is written once, with the vector extensions of GCC and Clang, and compiled once for each instruction set
// (see hatch_build.py). LANES, ROWS and the panel width below are all that differs.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace folo {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
// ROWS rows times two vectors of sums, and what feeds them, fill the registers: 12 of 16, or 24 of 32.

constexpr int PANEL = 2 * LANES;  // columns of a packed panel

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define FOLO_INLINE inline __attribute__((always_inline))

FOLO_INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
FOLO_INLINE void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }
FOLO_INLINE Floats fill(float value) { return value - Floats{}; }

FOLO_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
FOLO_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

FOLO_INLINE float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

FOLO_INLINE float largest(Floats v) {
  float found = v[0];
  for (int i = 1; i < LANES; ++i) found = v[i] > found ? v[i] : found;
  return found;
}

// e^x with a relative error below 3e-7: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial for e^r
// (coefficients: Cephes' expf). Below -87.3 the result is 0 to within the smallest normal number. NaN stays NaN.
FOLO_INLINE Floats exponential(Floats x) {
  const Floats bounded = smaller(larger(x, fill(-87.3f)), fill(88.3f));
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = bounded * 1.44269504088896341f + shift;
  const Floats n = shifted - shift;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = ((Ints)shifted - (Ints)fill(shift)) << 23;
  const Floats result = (Floats)((Ints)p + power);
  return x == x ? result : x;
}

FOLO_INLINE Floats hyperbolic_tangent(Floats x) {
  // 1 - 2 / (e^2x + 1) loses digits near 0, where tanh is its series.
  const Floats far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
  const Floats square = x * x;
  const Floats near = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15)));
  return square < 0.0025f ? near : far;
}

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

}  // namespace folo
