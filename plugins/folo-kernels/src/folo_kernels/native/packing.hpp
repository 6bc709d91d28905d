// From plain weights to panels, and back.
#pragma once

#include "product.hpp"

namespace folo {

// Rows of several plain matrices, as the columns of one packed matrix.
struct Source {
  const float* weights[4];  // each [outputs, inputs], rows contiguous
  const float* biases[4];
  int32_t outputs[4];
  int32_t count;
  int32_t gated;  // two of them, in turns of LANES: a panel holds both halves of a gated product
};

struct Column {
  const float* weights = nullptr;  // null for padding
  float bias = 0;
};

inline Column column_of(const Source& source, int inputs, int column) {
  int part = 0, place = column;
  if (source.gated) {
    part = column % PANEL / LANES;
    place = column / PANEL * LANES + column % LANES;
  } else {
    while (part < source.count && place >= source.outputs[part]) place -= source.outputs[part++];
  }
  if (part >= source.count || place >= source.outputs[part]) return {};
  const float* biases = source.biases[part];
  return {source.weights[part] + int64_t(place) * inputs, biases == nullptr ? 0.0f : biases[place]};
}

inline void pack_floats(const Column* columns, int inputs, unsigned char* to) {
  float* out = reinterpret_cast<float*>(to);
  for (int begin = 0; begin < inputs; begin += 64) {  // a stretch that stays in the cache while it is turned
    const int end = std::min(begin + 64, inputs);
    for (int j = 0; j < PANEL; ++j) {
      const float* from = columns[j].weights;
      for (int k = begin; k < end; ++k) out[int64_t(k) * PANEL + j] = from == nullptr ? 0.0f : from[k];
    }
  }
}

inline void pack_int8(const float* group, int j, unsigned char* to) {
  float top = 0;
  for (int u = 0; u < GROUP; ++u) top = std::max(top, std::fabs(group[u]));
  const float d = top / 127;
  for (int u = 0; u < GROUP; ++u) to[u * PANEL + j] = uint8_t(int8_t(d > 0 ? std::lrintf(group[u] / d) : 0));
  reinterpret_cast<float*>(to + GROUP * PANEL)[j] = d;
}

// Squared error of a group in steps d from m, whose codes go to `codes`.
inline float encode_int4(const float* group, float d, float m, uint8_t* codes) {
  float error = 0;
  for (int u = 0; u < GROUP; ++u) {
    const int q = d != 0 ? std::clamp(int(std::lrintf((group[u] - m) / d)), 0, 15) : 0;
    codes[u] = uint8_t(q);
    const float off = d * q + m - group[u];
    error += off * off;
  }
  return error;
}

// Steps from the least to the greatest weight, or from a little within them if that loses less.
inline void pack_int4(const float* group, int j, unsigned char* to) {
  const auto [low, high] = std::minmax_element(group, group + GROUP);
  uint8_t codes[GROUP], best_codes[GROUP] = {};
  uint16_t best_d = 0, best_m = 0;
  float best = INFINITY;
  for (int trial = 0; trial < 8 && best > 0; ++trial) {
    const float inset = (*high - *low) * 0.02f * trial;
    const uint16_t d = to_half((*high - *low - 2 * inset) / 15), m = to_half(*low + inset);
    const float error = encode_int4(group, from_half(d), from_half(m), codes);
    // Rounding alone: these were steps of this kind before.
    const bool exact = trial == 0 && error <= 1e-10f * (*high - *low) * (*high - *low);
    if (error < best) best = error, best_d = d, best_m = m, std::memcpy(best_codes, codes, GROUP);
    if (exact) break;
  }
  for (int u = 0; u < GROUP; u += 2) to[u / 2 * PANEL + j] = best_codes[u] | (best_codes[u + 1] << 4);
  std::memcpy(to + GROUP / 2 * PANEL + 2 * j, &best_d, 2);
  std::memcpy(to + GROUP / 2 * PANEL + 2 * (PANEL + j), &best_m, 2);
}

inline void pack_quantised(const Column* columns, const Matrix& m, unsigned char* to) {
  const int64_t bytes = m.panel_bytes / ((m.inputs + GROUP - 1) / GROUP);
  for (int k = 0; k < m.inputs; k += GROUP, to += bytes) {
    for (int j = 0; j < PANEL; ++j) {
      float group[GROUP] = {};
      const int count = std::min(GROUP, m.inputs - k);
      if (columns[j].weights != nullptr) std::memcpy(group, columns[j].weights + k, count * sizeof(float));
      m.format == INT8 ? pack_int8(group, j, to) : pack_int4(group, j, to);
    }
  }
}

inline void pack(Team& team, const Source& source, const Matrix& m, unsigned char* panels, float* bias) {
  for (int64_t panel = team.take(1); panel < m.num_panels; panel = team.take(1)) {
    Column columns[PANEL];
    for (int j = 0; j < PANEL; ++j) {
      columns[j] = column_of(source, m.inputs, int(panel) * PANEL + j);
      if (bias != nullptr) bias[panel * PANEL + j] = columns[j].bias;
    }
    unsigned char* to = panels + panel * m.panel_bytes;
    m.format == FLOAT32 ? pack_floats(columns, m.inputs, to) : pack_quantised(columns, m, to);
  }
}

// Plain float32 [packed columns, inputs], in packed order.
inline void unpack(Team& team, const Matrix& m, float* plain) {
  std::vector<float> expanded(size_t(round_up(m.inputs, GROUP)) * PANEL);
  for (int64_t panel = team.take(1); panel < m.num_panels; panel = team.take(1)) {
    const unsigned char* from = m.panels + panel * m.panel_bytes;
    const float* weights = reinterpret_cast<const float*>(from);
    if (m.format != FLOAT32) expand_panel(m, from, expanded.data()), weights = expanded.data();
    for (int j = 0; j < PANEL; ++j) {
      float* row = plain + (panel * PANEL + j) * m.inputs;
      for (int k = 0; k < m.inputs; ++k) row[k] = weights[int64_t(k) * PANEL + j];
    }
  }
}

}  // namespace folo
