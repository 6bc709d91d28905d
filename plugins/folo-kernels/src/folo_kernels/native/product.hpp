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

// Rows first..last by one panel, while the panel that this thread takes next is fetched, evenly over the time.
inline void multiply_panel(const Product& p, int first, int last, int panel, const float* weights, const char* next) {
  const Matrix& m = *p.matrix;
  const int blocks = (last - first + ROWS - 1) / ROWS;
  const int lines_each = PANEL / 16 * 4;  // of a panel, for every four input features
  const int64_t line_bytes = int64_t(m.inputs / 4) * 64;
  for (int block = 0, row = first; block < blocks; ++block) {
    const int count = (last - row + blocks - block - 1) / (blocks - block);
    const int begin = block * lines_each / blocks, lines = (block + 1) * lines_each / blocks - begin;
    const Prefetch ahead{next + begin * line_bytes, next == nullptr ? 0 : lines};
    with_count<ROWS>(count, [&](auto c) { multiply_rows<c.value>(p, row, panel, weights, ahead); });
    row += count;
  }
}

// One thread's way of working through a product's items: a panel by a block of rows.
class ProductWorker {
 public:
  explicit ProductWorker(const Product& p) : p_(p), m_(*p.matrix), own_(scratch()) {
    row_blocks_ = (p.rows + ROW_BLOCK - 1) / ROW_BLOCK;
    rows_each_ = (p.rows + row_blocks_ - 1) / row_blocks_;
    direct_ = m_.format != FLOAT32 && p.rows <= DIRECT_ROWS;
    if (!direct_) return;
    const int groups = (m_.inputs + GROUP - 1) / GROUP;
    padded_ = own_.grown(own_.rows, size_t(p.rows) * groups * GROUP);
    totals_ = own_.grown(own_.totals, size_t(p.rows) * groups);
    pad_rows(p, padded_, totals_);
  }

  int64_t items() const { return int64_t(m_.num_panels) * row_blocks_; }

  // Do one item, knowing which is next.
  void run(int64_t item, int64_t next) {
    const int panel = int(item % m_.num_panels);
    if (direct_) {
      return with_count<DIRECT_ROWS>(
          p_.rows, [&](auto count) { multiply_quantised<count.value>(p_, 0, panel, padded_, totals_); });
    }
    const int first = int(item / m_.num_panels) * rows_each_, last = std::min(first + rows_each_, p_.rows);
    const bool fetches = m_.format == FLOAT32 && next < items();
    const unsigned char* ahead = fetches ? m_.panels + next % m_.num_panels * m_.panel_bytes : nullptr;
    multiply_panel(p_, first, last, panel, plain(panel), reinterpret_cast<const char*>(ahead));
  }

 private:
  const float* plain(int panel) {
    const unsigned char* packed = m_.panels + panel * m_.panel_bytes;
    if (m_.format == FLOAT32) return reinterpret_cast<const float*>(packed);
    float* expanded = own_.grown(own_.panel, size_t(round_up(m_.inputs, GROUP)) * PANEL);
    expand_panel(m_, packed, expanded);
    return expanded;
  }

  const Product& p_;
  const Matrix& m_;
  Scratch& own_;
  int row_blocks_, rows_each_;
  bool direct_;  // few rows and quantised weights: multiplied as they are read, with rows padded to whole groups
  float *padded_ = nullptr, *totals_ = nullptr;
};

// One phase of a team: y = epilogue(x W^T). A barrier must follow before y is read.
inline void multiply(Team& team, const Product& p) {
  ProductWorker worker(p);
  for (int64_t item = team.take(1), next; item < worker.items(); item = next) {
    next = team.take(1);
    worker.run(item, next);
  }
}

}  // namespace folo
