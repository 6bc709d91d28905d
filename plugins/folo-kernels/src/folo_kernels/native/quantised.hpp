// Panels of 8-bit and 4-bit weights, in groups of GROUP input features.
//
// INT8: w = d q, q in [-127, 127]; a group is GROUP x PANEL bytes, then PANEL scales d in float32.
// INT4: w = d q + m, q in [0, 15]; a group is GROUP / 2 x PANEL bytes (low half: the even feature), then PANEL pairs
// d and m in float16. This holds what GGUF's Q4_1 and Q4_0 hold, to the bit.
// Activations stay in float32, so what is lost is lost in the weights alone.
#pragma once

#include "matrix.hpp"

namespace folo {

inline float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00) bits += 112u << 23;  // infinity and NaN
  float value;
  std::memcpy(&value, &bits, 4);
  if (magnitude < 0x0400) value = float(magnitude) * 0x1p-24f;  // subnormal
  uint32_t whole;
  std::memcpy(&whole, &value, 4);
  whole |= sign;
  std::memcpy(&value, &whole, 4);
  return value;
}

// Nearest float16, ties to even. Values beyond its range become infinite: weights are not.
inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = (bits >> 16) & 0x8000;
  const float magnitude = std::fabs(value);
  if (magnitude < 0x1p-14f) return sign | uint16_t(std::lrintf(magnitude * 0x1p24f));
  if (!(magnitude < 65520.0f)) return sign | 0x7c00;
  bits &= 0x7fffffff;
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | uint16_t((bits >> 13) - (112u << 10));
}

constexpr int FAR = 4096;  // bytes ahead that weights are fetched while they are multiplied as they are read

FOLO_INLINE Floats load_halves(const unsigned char* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Floats value;
  for (int i = 0; i < LANES; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    value[i] = from_half(half);
  }
  return value;
#endif
}

FOLO_INLINE Floats load_bytes(const unsigned char* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  Floats value;
  for (int i = 0; i < LANES; ++i) value[i] = float(static_cast<signed char>(from[i]));
  return value;
#endif
}

// The low or the high halves of LANES bytes.
template <bool HIGH>
FOLO_INLINE Floats load_nibbles(const unsigned char* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return (Floats)_mm512_cvtepi32_ps(HIGH ? _mm512_srli_epi32(wide, 4) : _mm512_and_si512(wide, _mm512_set1_epi32(15)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return (Floats)_mm256_cvtepi32_ps(HIGH ? _mm256_srli_epi32(wide, 4) : _mm256_and_si256(wide, _mm256_set1_epi32(15)));
#else
  Floats value;
  for (int i = 0; i < LANES; ++i) value[i] = float(HIGH ? from[i] >> 4 : from[i] & 15);
  return value;
#endif
}

// Write a quantised panel's weights as float32, [groups * GROUP, PANEL].
inline void expand_panel(const Matrix& m, const unsigned char* panel, float* to) {
  for (int k = 0; k < m.inputs; k += GROUP) {
    const bool is_int8 = m.format == INT8;
    const unsigned char* scales = panel + (is_int8 ? GROUP * PANEL : GROUP / 2 * PANEL);
    for (int half = 0; half < PANEL; half += LANES) {
      const unsigned char* from = panel + half;
      float* out = to + half;
      if (is_int8) {
        const Floats d = load(reinterpret_cast<const float*>(scales) + half);
        for (int u = 0; u < GROUP; ++u) store(out + u * PANEL, d * load_bytes(from + u * PANEL));
        continue;
      }
      const Floats d = load_halves(scales + 2 * half), least = load_halves(scales + 2 * (PANEL + half));
      for (int u = 0; u < GROUP; u += 2) {
        store(out + u * PANEL, d * load_nibbles<false>(from + u / 2 * PANEL) + least);
        store(out + (u + 1) * PANEL, d * load_nibbles<true>(from + u / 2 * PANEL) + least);
      }
    }
    panel = scales + PANEL * 4;
    to += GROUP * PANEL;
  }
}

// Sums of COUNT rows over one group, in one or two parts: with few rows, even and odd input features are summed apart,
// because each sum must wait for the one before it.
template <int COUNT>
struct GroupSums {
  static constexpr int APART = COUNT <= 2 ? 2 : 1;
  Floats parts[APART][COUNT][2] = {};

  template <int FEATURE>
  FOLO_INLINE void add(int row, float x, Floats first, Floats second) {
    parts[FEATURE % APART][row][0] += x * first;
    parts[FEATURE % APART][row][1] += x * second;
  }

  FOLO_INLINE Floats total(int row, int half) const {
    return APART == 2 ? parts[0][row][half] + parts[APART - 1][row][half] : parts[0][row][half];
  }
};

// Sums of COUNT rows over one panel of int8 weights. `x` is padded with zeros to whole groups.
template <int COUNT>
FOLO_INLINE void accumulate_int8(Floats (&sums)[COUNT][2], const float* const* x, const unsigned char* panel, int inputs) {
  for (int k = 0; k < inputs; k += GROUP) {
    GroupSums<COUNT> group;
    for (int u = 0; u < GROUP; u += 2, panel += 2 * PANEL) {
      const Floats first = load_bytes(panel), second = load_bytes(panel + LANES);
      const Floats third = load_bytes(panel + PANEL), fourth = load_bytes(panel + PANEL + LANES);
      for (int i = 0; i < COUNT; ++i) {
        group.template add<0>(i, x[i][k + u], first, second);
        group.template add<1>(i, x[i][k + u + 1], third, fourth);
      }
      __builtin_prefetch(panel + FAR, 0, 2);
    }
    const float* scales = reinterpret_cast<const float*>(panel);
    for (int i = 0; i < COUNT; ++i) {
      sums[i][0] += group.total(i, 0) * load(scales);
      sums[i][1] += group.total(i, 1) * load(scales + LANES);
    }
    panel += PANEL * 4;
  }
}

// Likewise of int4 weights; `group_sums[i]` holds the sum of row i's activations over each group.
template <int COUNT>
FOLO_INLINE void accumulate_int4(
    Floats (&sums)[COUNT][2], const float* const* x, const float* const* group_sums, const unsigned char* panel, int inputs) {
  for (int k = 0; k < inputs; k += GROUP) {
    GroupSums<COUNT> group;
    for (int u = 0; u < GROUP; u += 2, panel += PANEL) {
      const Floats first = load_nibbles<false>(panel), second = load_nibbles<false>(panel + LANES);
      const Floats third = load_nibbles<true>(panel), fourth = load_nibbles<true>(panel + LANES);
      for (int i = 0; i < COUNT; ++i) {
        group.template add<0>(i, x[i][k + u], first, second);
        group.template add<1>(i, x[i][k + u + 1], third, fourth);
      }
      __builtin_prefetch(panel + FAR, 0, 2);
    }
    for (int i = 0; i < COUNT; ++i) {
      const float total = group_sums[i][k / GROUP];
      for (int half = 0; half < 2; ++half) {
        const unsigned char* at = panel + half * LANES * 2;
        sums[i][half] += group.total(i, half) * load_halves(at) + total * load_halves(at + PANEL * 2);
      }
    }
    panel += PANEL * 4;
  }
}

}  // namespace folo
