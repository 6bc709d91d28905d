// The product of a step's rows with a packed matrix, shared among a team's threads.
#pragma once

#include <vector>

#include "quantised.hpp"

namespace folo {

// Up to so many rows are multiplied with quantised weights as they are read; more are worth expanding a panel for.
constexpr int DIRECT_ROWS = 4;

// One thread's own memory, kept from step to step.
struct Scratch {
  std::vector<float> panel;   // an expanded panel
  std::vector<float> rows;    // activations padded to whole groups
  std::vector<float> totals;  // their sums over each group
  std::vector<float> scores;  // attention: [rows, keys] and [rows, value size]
  std::vector<const float*> queries;

  template <class T>
  T* grown(std::vector<T>& memory, size_t size) {
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }
};

inline Scratch& scratch() {
  static thread_local Scratch memory;
  return memory;
}

template <int COUNT>
void multiply_quantised(const Product& p, int row, int panel, const float* padded, const float* totals) {
  const Matrix& m = *p.matrix;
  const int groups = (m.inputs + GROUP - 1) / GROUP;
  const unsigned char* weights = m.panels + panel * m.panel_bytes;
  const float* x[COUNT];
  const float* group_sums[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    x[i] = padded + (row + i) * groups * GROUP;
    group_sums[i] = totals + (row + i) * groups;
  }
  Floats sums[COUNT][2] = {};
  if (m.format == INT8) {
    accumulate_int8<COUNT>(sums, x, weights, m.inputs);
  } else {
    accumulate_int4<COUNT>(sums, x, group_sums, weights, m.inputs);
  }
  for (int i = 0; i < COUNT; ++i) finish_row(p, row + i, panel, sums[i][0], sums[i][1]);
}

// Few rows and quantised weights: every thread keeps its own padded copy of the rows.
inline void multiply_directly(const Product& p, int first, int last, const float* padded, const float* totals) {
  for (int panel = first; panel < last; ++panel) {
    with_count<DIRECT_ROWS>(p.rows, [&](auto count) { multiply_quantised<count.value>(p, 0, panel, padded, totals); });
  }
}

inline void pad_rows(const Product& p, float* padded, float* totals) {
  const int inputs = p.matrix->inputs, groups = (inputs + GROUP - 1) / GROUP;
  for (int row = 0; row < p.rows; ++row) {
    float* to = padded + row * groups * GROUP;
    std::memcpy(to, p.x + row * p.x_stride, inputs * sizeof(float));
    std::fill(to + inputs, to + groups * GROUP, 0.0f);
    for (int group = 0; group < groups; ++group) {
      float total = 0;
      for (int u = 0; u < GROUP; ++u) total += to[group * GROUP + u];
      totals[row * groups + group] = total;
    }
  }
}

// A block of rows by one panel, while the panel after it is fetched.
inline void multiply_panel(const Product& p, int first_row, int last_row, int panel, const float* weights) {
  const Matrix& m = *p.matrix;
  const int blocks = (last_row - first_row + ROWS - 1) / ROWS;
  const bool plain = m.format == FLOAT32 && panel + 1 < m.num_panels;
  const char* next = reinterpret_cast<const char*>(m.panels + (panel + 1) * m.panel_bytes);
  const int lines = (PANEL / 16 * 4 + blocks - 1) / blocks;  // a panel has PANEL / 16 lines for each input feature
  const int64_t stretch = int64_t(lines) * 64 * (m.inputs / 4);
  for (int block = 0, row = first_row; block < blocks; ++block) {
    const int count = (last_row - row + blocks - block - 1) / (blocks - block);
    const bool fetches = plain && block * stretch < m.panel_bytes;
    const Prefetch ahead{next + block * stretch, fetches ? lines : 0};
    with_count<ROWS>(count, [&](auto c) { multiply_rows<c.value>(p, row, panel, weights, ahead); });
    row += count;
  }
}

inline void multiply_panels(const Product& p, int first_row, int last_row, int first, int last) {
  const Matrix& m = *p.matrix;
  Scratch& own = scratch();
  for (int panel = first; panel < last; ++panel) {
    const unsigned char* packed = m.panels + panel * m.panel_bytes;
    const float* weights = reinterpret_cast<const float*>(packed);
    if (m.format != FLOAT32) {
      float* expanded = own.grown(own.panel, size_t(round_up(m.inputs, GROUP)) * PANEL);
      expand_panel(m, packed, expanded);
      weights = expanded;
    }
    multiply_panel(p, first_row, last_row, panel, weights);
  }
}

// One phase of a team: y = epilogue(x W^T). A barrier must follow before y is read.
inline void multiply(Team& team, const Product& p) {
  const Matrix& m = *p.matrix;
  const bool direct = m.format != FLOAT32 && p.rows <= DIRECT_ROWS;
  const int row_blocks = (p.rows + ROW_BLOCK - 1) / ROW_BLOCK;
  const int rows_each = (p.rows + row_blocks - 1) / row_blocks;
  // Small enough for threads to end together, large enough for a panel's fetched neighbour to be one's own.
  const int chunk = std::clamp(m.num_panels / (team.size() * 6), 1, 16);
  const int chunks = (m.num_panels + chunk - 1) / chunk;
  Scratch& own = scratch();
  float *padded = nullptr, *totals = nullptr;
  if (direct) {
    const int groups = (m.inputs + GROUP - 1) / GROUP;
    padded = own.grown(own.rows, size_t(p.rows) * groups * GROUP);
    totals = own.grown(own.totals, size_t(p.rows) * groups);
    pad_rows(p, padded, totals);
  }
  for (int64_t item = team.take(1); item < int64_t(chunks) * row_blocks; item = team.take(1)) {
    const int first = int(item % chunks) * chunk, last = std::min(first + chunk, m.num_panels);
    const int first_row = int(item / chunks) * rows_each, last_row = std::min(first_row + rows_each, p.rows);
    if (direct) {
      multiply_directly(p, first, last, padded, totals);
    } else {
      multiply_panels(p, first_row, last_row, first, last);
    }
  }
}

}  // namespace folo
