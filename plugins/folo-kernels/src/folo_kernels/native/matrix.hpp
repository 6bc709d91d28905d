// Weights packed in panels, and their product with rows of activations.
//
// A panel holds PANEL output columns, input feature by input feature, so that one product streams through it once.
// Rows are taken ROWS at a time against registers of sums (the micro-kernel of Goto and van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication", 2008). While one panel is multiplied, the next is fetched towards the cache:
// with few rows the product is as fast as memory can deliver weights.
//
// Every sum of float32 weights runs over the input features in order, whatever the number of rows: a row's bits depend on
// no other row.
#pragma once

#include <algorithm>

#include "simd.hpp"
#include "team.hpp"

namespace folo {

constexpr int GROUP = 32;  // input features that share a scale in quantised weights

enum Format : int32_t { FLOAT32 = 0, INT8 = 1, INT4 = 2 };

// What becomes of a product.
enum Epilogue : int32_t { STORE = 0, ADD = 1, SILU_GATE = 2, GELU_TANH_GATE = 3 };

struct Matrix {
  const unsigned char* panels;
  const float* bias;  // in packed column order, or null
  int64_t panel_bytes;
  int32_t outputs;  // columns that exist; the last panel may be padded
  int32_t inputs;
  int32_t num_panels;
  int32_t format;
};

inline int64_t panel_bytes(int inputs, int format) {
  const int64_t groups = (inputs + GROUP - 1) / GROUP;
  switch (format) {
    case INT8: return groups * (GROUP * PANEL + PANEL * 4);
    case INT4: return groups * (GROUP * PANEL / 2 + PANEL * 4);
    default: return int64_t(inputs) * PANEL * 4;
  }
}

// Output rows of a step that one thread multiplies together: their activations should stay in its second cache.
constexpr int ROW_BLOCK = 96;

struct Product {
  const float* x;  // [rows, inputs]
  int64_t x_stride;
  int rows;
  const Matrix* matrix;
  float* y;  // [rows, outputs], or half as many columns if gated
  int64_t y_stride;
  int epilogue;
};

// x / (1 + e^-x). Below -88 the result is 0 to within 1e-36, and e^-x would not fit.
FOLO_INLINE Floats silu(Floats x) { return x < fill(-88.0f) ? Floats{} : x / (1.0f + exponential(-x)); }

FOLO_INLINE Floats gelu_tanh(Floats x) {
  return 0.5f * x * (1.0f + hyperbolic_tangent(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// Write `count` of a vector's lanes.
FOLO_INLINE void write(float* to, Floats value, int count, bool add) {
  if (count >= LANES) {
    store(to, add ? load(to) + value : value);
    return;
  }
  for (int i = 0; i < count; ++i) to[i] = add ? to[i] + value[i] : value[i];
}

// One row's sums of one panel, on their way out.
FOLO_INLINE void finish_row(const Product& p, int row, int panel, Floats first, Floats second) {
  const Matrix& m = *p.matrix;
  if (m.bias != nullptr) {
    first += load(m.bias + panel * PANEL);
    second += load(m.bias + panel * PANEL + LANES);
  }
  if (p.epilogue == SILU_GATE || p.epilogue == GELU_TANH_GATE) {
    const Floats gate = p.epilogue == SILU_GATE ? silu(first) : gelu_tanh(first);
    write(p.y + row * p.y_stride + panel * LANES, gate * second, m.outputs / 2 - panel * LANES, false);
    return;
  }
  float* to = p.y + row * p.y_stride + panel * PANEL;
  const int left = m.outputs - panel * PANEL;
  write(to, first, left, p.epilogue == ADD);
  if (left > LANES) write(to + LANES, second, left - LANES, p.epilogue == ADD);
}

struct Prefetch {
  const char* from;
  int lines;  // for every four input features
};

// Sums of COUNT rows over one panel of float32.
template <int COUNT>
FOLO_INLINE void accumulate(Floats (&sums)[COUNT][2], const float* const* x, const float* panel, int inputs, Prefetch ahead) {
  int k = 0;
  for (; k + 4 <= inputs; k += 4) {
    for (int i = 0; i < ahead.lines; ++i, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u, panel += PANEL) {
      const Floats first = load(panel), second = load(panel + LANES);
#pragma GCC unroll 12
      for (int i = 0; i < COUNT; ++i) {
        const Floats value = fill(x[i][k + u]);
        sums[i][0] += value * first;
        sums[i][1] += value * second;
      }
    }
  }
  for (; k < inputs; ++k, panel += PANEL) {
    for (int i = 0; i < COUNT; ++i) {
      sums[i][0] += x[i][k] * load(panel);
      sums[i][1] += x[i][k] * load(panel + LANES);
    }
  }
}

template <int COUNT>
__attribute__((noinline)) void multiply_rows(const Product& p, int row, int panel, const float* weights, Prefetch ahead) {
  const float* x[COUNT];
  for (int i = 0; i < COUNT; ++i) x[i] = p.x + (row + i) * p.x_stride;
  Floats sums[COUNT][2] = {};
  accumulate<COUNT>(sums, x, weights, p.matrix->inputs, ahead);
  for (int i = 0; i < COUNT; ++i) finish_row(p, row + i, panel, sums[i][0], sums[i][1]);
}

// Call function<COUNT>() for a count known only now.
template <int COUNT, class Function>
FOLO_INLINE void with_count(int count, Function&& function) {
  if constexpr (COUNT > 0) {
    if (count == COUNT) return function(std::integral_constant<int, COUNT>{});
    with_count<COUNT - 1>(count, function);
  }
}

}  // namespace folo
