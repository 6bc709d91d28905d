// A stack of decoder layers over one packed step: norm, attention, gated feed-forward, as in Llama, Qwen and Gemma.
//
// The whole stack runs in one call, on one team of threads that meet at a barrier between phases.
#pragma once

#include <chrono>

#include "attention.hpp"

namespace folo {

struct Layer {
  const float *input_norm, *query_norm, *key_norm, *attention_norm;  // null where a layer has none
  const float *feed_norm, *output_norm;
  const Matrix *qkv, *out, *gate_up, *down;
  const Store* store;
  int32_t heads, window, gate;  // gate: SILU_GATE or GELU_TANH_GATE
  float epsilon, scale, softcap;
};

struct Rotary {
  const float *cosine, *sine;  // [num_tokens, size]
};

enum Stage : int32_t { NORM, QKV, WRITE, ATTEND, OUT, GATE_UP, DOWN, NUM_STAGES };

struct Decoder {
  const Layer* layers;
  int32_t num_layers, hidden_size;
  double seconds[NUM_STAGES];  // grows from step to step
};

struct DecoderStep {
  float* hidden;  // [num_tokens, hidden_size], changed in place
  const Rotary* rotary;  // one per layer
  int32_t rotary_size;
  float* workspace;  // workspace_floats() of them
};

inline int64_t widest(const Layer& l) {
  return std::max<int64_t>({l.qkv->outputs + int64_t(l.heads) * l.store->value_size, l.gate_up->outputs / 2,
                            l.out->outputs, l.down->outputs});
}

inline int64_t workspace_floats(const Decoder& d, int num_tokens) {
  int64_t width = 0;
  for (int i = 0; i < d.num_layers; ++i) width = std::max(width, widest(d.layers[i]));
  return (width + d.hidden_size) * num_tokens;
}

// x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich, arXiv:1910.07467), stored or added.
FOLO_INLINE void normalise(const float* x, const float* weight, int size, float epsilon, float* y, bool add) {
  Floats squares{};
  int i = 0;
  for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < size; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / size + epsilon);
  for (i = 0; i + LANES <= size; i += LANES) {
    const Floats value = load(x + i) * scale * load(weight + i);
    store(y + i, add ? load(y + i) + value : value);
  }
  for (; i < size; ++i) y[i] = (add ? y[i] : 0.0f) + x[i] * scale * weight[i];
}

// Turn the two halves of the first `size` features against each other (RoFormer, arXiv:2104.09864).
FOLO_INLINE void rotate(float* x, const float* cosine, const float* sine, int size) {
  const int half = size / 2;
  int i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Floats a = load(x + i), b = load(x + half + i);
    store(x + i, a * load(cosine + i) - b * load(sine + i));
    store(x + half + i, b * load(cosine + half + i) + a * load(sine + half + i));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosine[i] - b * sine[i];
    x[half + i] = b * cosine[half + i] + a * sine[half + i];
  }
}

// One thread's view of a step: every thread runs the same phases and shares their work.
class Worker {
 public:
  Worker(Team& team, int thread, Decoder& decoder, const DecoderStep& step, const Step& batch)
      : team_(team), is_first_(thread == 0), decoder_(decoder), step_(step), batch_(batch) {
    normed_ = step.workspace;
    wide_ = normed_ + int64_t(batch.num_tokens) * decoder.hidden_size;
  }

  void run() {
    mark_ = Clock::now();
    for (int i = 0; i < decoder_.num_layers; ++i) {
      attention(decoder_.layers[i], step_.rotary[i]);
      feed_forward(decoder_.layers[i]);
    }
  }

 private:
  using Clock = std::chrono::steady_clock;

  void attention(const Layer& l, const Rotary& rotary) {
    const int value_width = l.heads * l.store->value_size;
    float* attended = wide_ + int64_t(batch_.num_tokens) * l.qkv->outputs;
    norm_rows(l, step_.hidden, l.input_norm, normed_, false);
    product(QKV, normed_, decoder_.hidden_size, l.qkv, wide_, l.qkv->outputs, STORE);
    write_rows(l, rotary);
    const Attention call{wide_, l.qkv->outputs, attended, value_width, l.heads, l.window, l.scale, l.softcap};
    attend(team_, *l.store, batch_, call);
    end(ATTEND);
    residual(OUT, l, attended, value_width, l.out, l.attention_norm);
  }

  void feed_forward(const Layer& l) {
    const int width = l.gate_up->outputs / 2;
    norm_rows(l, step_.hidden, l.feed_norm, normed_, false);
    product(GATE_UP, normed_, decoder_.hidden_size, l.gate_up, wide_, width, l.gate);
    residual(DOWN, l, wide_, width, l.down, l.output_norm);
  }

  // hidden += x W^T, or the norm of it.
  void residual(Stage stage, const Layer& l, const float* x, int width, const Matrix* matrix, const float* norm) {
    if (norm == nullptr) return product(stage, x, width, matrix, step_.hidden, decoder_.hidden_size, ADD);
    product(stage, x, width, matrix, normed_, decoder_.hidden_size, STORE);
    norm_rows(l, normed_, norm, step_.hidden, true);
  }

  void product(Stage stage, const float* x, int x_stride, const Matrix* matrix, float* y, int y_stride, int epilogue) {
    multiply(team_, {x, x_stride, batch_.num_tokens, matrix, y, y_stride, epilogue});
    end(stage);
  }

  void norm_rows(const Layer& l, const float* x, const float* weight, float* y, bool add) {
    const int size = decoder_.hidden_size;
    for (int64_t row = team_.take(1); row < batch_.num_tokens; row = team_.take(1)) {
      normalise(x + row * size, weight, size, l.epsilon, y + row * size, add);
    }
    end(NORM);
  }

  // Norm and turn queries and keys, and write keys and values into their slots.
  void write_rows(const Layer& l, const Rotary& rotary) {
    const Store& s = *l.store;
    for (int64_t token = team_.take(1); token < batch_.num_tokens; token = team_.take(1)) {
      float* row = wide_ + token * l.qkv->outputs;
      const float* cosine = rotary.cosine + token * step_.rotary_size;
      const float* sine = rotary.sine + token * step_.rotary_size;
      for (int head = 0; head < l.heads + s.kv_heads; ++head) {
        float* x = row + head * s.key_size;
        const float* norm = head < l.heads ? l.query_norm : l.key_norm;
        if (norm != nullptr) normalise(x, norm, s.key_size, l.epsilon, x, false);
        rotate(x, cosine, sine, step_.rotary_size);
      }
      const float* keys = row + l.heads * s.key_size;
      const float* values = keys + s.kv_heads * s.key_size;
      for (int head = 0; head < s.kv_heads; ++head) {
        write_slot(s, batch_.slots[token], head, keys + head * s.key_size, values + head * s.value_size);
      }
    }
    end(WRITE);
  }

  void end(Stage stage) {
    team_.barrier();
    if (!is_first_) return;
    const Clock::time_point now = Clock::now();
    decoder_.seconds[stage] += std::chrono::duration<double>(now - mark_).count();
    mark_ = now;
  }

  Team& team_;
  const bool is_first_;
  Decoder& decoder_;
  const DecoderStep& step_;
  const Step& batch_;
  float *normed_, *wide_;
  Clock::time_point mark_;
};

inline void decode(Decoder& decoder, const DecoderStep& step, const Step& batch) {
  run_team([&](Team& team, int thread) { Worker(team, thread, decoder, step, batch).run(); });
}

}  // namespace folo
