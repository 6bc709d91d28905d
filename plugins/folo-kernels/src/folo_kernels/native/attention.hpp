// Attention over KV blocks where they lie: nothing is gathered, padded or repeated.
//
// A block holds, for each key head, its tokens' keys feature by feature ([size, tokens]) and their values token by token
// ([tokens, size]): both are panels that the queries of all heads of a group are multiplied with as they are. Scores
// of a stretch of keys are turned into weights while they are in the cache, with a running maximum and sum (Milakov and
// Gimelshein, arXiv:1805.02867; the tiling is FlashAttention's, arXiv:2205.14135).
#pragma once

#include "product.hpp"

namespace folo {

constexpr int STRETCH = 128;   // keys per tile, at most
constexpr int TILE_ROWS = 48;  // query rows (tokens x heads of a group) per tile, at most

struct Store {
  float* keys;    // [blocks, kv_heads, key_size, block_room]
  float* values;  // [blocks, kv_heads, block_size, value_room]
  int32_t kv_heads, key_size, value_size;
  int32_t block_size, block_room;  // tokens of a block, and the same rounded up to whole vectors
  int32_t value_room;
};

struct Step {
  int32_t num_tokens, num_seqs, table_width, num_tiles;
  const int32_t* query_start;   // [num_seqs + 1]
  const int32_t* seq_lens;      // [num_seqs]
  const int32_t* block_tables;  // [num_seqs, table_width]
  const int64_t* slots;         // [num_tokens]
  const int32_t* tiles;         // [num_tiles, 3]: sequence, first and last packed token
};

struct Attention {
  const float* query;  // rows of [heads, key_size]
  int64_t query_stride;
  float* out;  // rows of [heads, value_size]
  int64_t out_stride;
  int32_t heads;
  int32_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
};

FOLO_INLINE float* key_block(const Store& s, int64_t block, int head) {
  return s.keys + (block * s.kv_heads + head) * s.key_size * s.block_room;
}
FOLO_INLINE float* value_block(const Store& s, int64_t block, int head) {
  return s.values + (block * s.kv_heads + head) * s.block_size * s.value_room;
}

inline void write_slot(const Store& s, int64_t slot, int head, const float* key, const float* value) {
  const int64_t block = slot / s.block_size;
  const int place = int(slot % s.block_size);
  float* keys = key_block(s, block, head) + place;
  for (int i = 0; i < s.key_size; ++i) keys[int64_t(i) * s.block_room] = key[i];
  std::memcpy(value_block(s, block, head) + int64_t(place) * s.value_room, value, s.value_size * sizeof(float));
}

// What one tile works on.
struct Tile {
  const Store& store;
  const Attention& call;
  const int32_t* table;
  int head;         // key head
  int group;        // query heads that share it
  int rows;         // tokens * group
  int first_token;  // packed
  int position;     // of the first token in its sequence
  int stride;       // of the scores: places of a stretch
  float* scores;    // [rows, stride]
  float* sums;      // [rows, value_room]
  float* top;       // [rows]: running maximum
  float* weight;    // [rows]: running sum of weights
  const float* const* queries;  // [rows]
};

// Scores of COUNT rows with VECTORS vectors of keys. A few rows keep too few sums under way to fill the pipelines, so
// their even and odd features are summed apart.
template <int COUNT, int VECTORS>
void score_rows(const Tile& t, int row, const float* keys, float* to) {
  constexpr int APART = COUNT * VECTORS * 2 <= ROWS * 2 ? 2 : 1;
  const float* const* q = t.queries + row;
  const int room = t.store.block_room, size = t.store.key_size;
  Floats sums[APART][COUNT][VECTORS] = {};
  for (int d = 0; d + APART <= size; d += APART) {
    for (int a = 0; a < APART; ++a, keys += room) {
      for (int v = 0; v < VECTORS; ++v) {
        const Floats key = load(keys + v * LANES);
        for (int i = 0; i < COUNT; ++i) sums[a][i][v] += q[i][d + a] * key;
      }
    }
  }
  if (size % APART != 0) {
    for (int v = 0; v < VECTORS; ++v) {
      for (int i = 0; i < COUNT; ++i) sums[0][i][v] += q[i][size - 1] * load(keys + v * LANES);
    }
  }
  for (int i = 0; i < COUNT; ++i) {
    for (int v = 0; v < VECTORS; ++v) {
      const Floats total = APART == 2 ? sums[0][i][v] + sums[APART - 1][i][v] : sums[0][i][v];
      store(to + (row + i) * t.stride + v * LANES, total * t.call.scale);
    }
  }
}

// Scores of all rows with the first `width` keys of a block.
inline void score_block(const Tile& t, const float* keys, int width, float* to) {
  for (int lane = 0; lane < width; lane += PANEL) {
    for (int row = 0; row < t.rows; row += ROWS) {
      with_count<ROWS>(std::min(ROWS, t.rows - row), [&](auto count) {
        if (width - lane > LANES) {
          score_rows<count.value, 2>(t, row, keys + lane, to + lane);
        } else {
          score_rows<count.value, 1>(t, row, keys + lane, to + lane);
        }
      });
    }
  }
}

inline void cap_scores(float* scores, int count, float softcap) {
  for (int i = 0; i < count; i += LANES) store(scores + i, softcap * hyperbolic_tangent(load(scores + i) / softcap));
}

// Overwrite scores of keys that the row does not see: of the future, outside the window, in no slot. They are not added
// to, because a slot left behind by another sequence may hold anything. Returns whether any key is seen.
inline bool hide_keys(const Tile& t, float* scores, int position, int begin, int end) {
  bool any = false;
  for (int first = begin; first < end; first += t.store.block_size, scores += t.store.block_room) {
    const int count = std::min(t.store.block_size, end - first);
    const int seen = std::clamp(position + 1 - first, 0, count);
    const int hidden = t.call.window > 0 ? std::clamp(position - t.call.window + 1 - first, 0, seen) : 0;
    std::fill(scores, scores + hidden, -INFINITY);
    std::fill(scores + seen, scores + t.store.block_room, -INFINITY);
    any |= seen > hidden;
  }
  return any;
}

// Replace scores by e^(score - top), and return their sum.
inline float exponentiate(float* scores, int room, float top) {
  Floats total{};
  for (int i = 0; i < room; i += LANES) {
    const Floats score = load(scores + i);
    const Floats weight = score == fill(-INFINITY) ? Floats{} : exponential(score - top);
    store(scores + i, weight);
    total += weight;
  }
  return sum(total);
}

// Turn a row's scores of keys begin..end into weights; `room` places were scored. Returns whether any key is seen.
inline bool weigh_row(const Tile& t, int row, int begin, int end, int room) {
  float* scores = t.scores + row * t.stride;
  if (t.call.softcap > 0) cap_scores(scores, room, t.call.softcap);
  if (!hide_keys(t, scores, t.position + row / t.group, begin, end)) {
    std::fill(scores, scores + room, 0.0f);
    return false;
  }
  Floats highest = fill(-INFINITY);
  for (int i = 0; i < room; i += LANES) highest = larger(load(scores + i), highest);
  const float top = std::max(t.top[row], largest(highest));
  const float shrink = t.top[row] == -INFINITY ? 0.0f : exponential(fill(t.top[row] - top))[0];
  t.weight[row] = t.weight[row] * shrink + exponentiate(scores, room, top);
  t.top[row] = top;
  float* sums = t.sums + row * t.store.value_room;
  for (int i = 0; i < t.store.value_room && shrink != 1.0f; i += LANES) store(sums + i, load(sums + i) * shrink);
  return true;
}

// Add COUNT rows' weighted values of `count` keys to VECTORS vectors of their sums.
template <int COUNT, int VECTORS>
void gather_rows(const Tile& t, int row, int column, int block, int count) {
  Floats sums[COUNT][VECTORS];
  float* to = t.sums + row * t.store.value_room + column;
  for (int i = 0; i < COUNT; ++i) {
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = load(to + i * t.store.value_room + v * LANES);
  }
  const float* weights = t.scores + row * t.stride;
  for (; count > 0; ++block, count -= t.store.block_size, weights += t.store.block_room) {
    const float* values = value_block(t.store, t.table[block], t.head) + column;
    const int keys = std::min(count, t.store.block_size);
    for (int k = 0; k < keys; ++k, values += t.store.value_room) {
      for (int v = 0; v < VECTORS; ++v) {
        const Floats value = load(values + v * LANES);
        for (int i = 0; i < COUNT; ++i) sums[i][v] += weights[i * t.stride + k] * value;
      }
    }
  }
  for (int i = 0; i < COUNT; ++i) {
    for (int v = 0; v < VECTORS; ++v) store(to + i * t.store.value_room + v * LANES, sums[i][v]);
  }
}

// Likewise all columns, as many at once as there are registers for.
template <int COUNT>
void gather_columns(const Tile& t, int row, int block, int count) {
  constexpr int MOST = COUNT * 4 <= ROWS * 2 ? 4 : 2;
  int column = 0;
  for (; column + MOST * LANES <= t.store.value_room; column += MOST * LANES) {
    gather_rows<COUNT, MOST>(t, row, column, block, count);
  }
  for (; column < t.store.value_room; column += LANES) gather_rows<COUNT, 1>(t, row, column, block, count);
}

inline void fetch(const float* from, int64_t floats) {
  const char* line = reinterpret_cast<const char*>(from);
  for (const char* end = line + floats * 4; line < end; line += 64) __builtin_prefetch(line, 0, 3);
}

// Ask for a block's values, which are needed once all of the stretch's keys are scored, and for the next block's keys.
inline void fetch_ahead(const Tile& t, int block, int next_key, int last) {
  const Store& s = t.store;
  fetch(value_block(s, t.table[block], t.head), int64_t(s.block_size) * s.value_room);
  if (next_key < last) fetch(key_block(s, t.table[block + 1], t.head), int64_t(s.key_size) * s.block_room);
}

// Keys first..last of the sequence's `seen`; `first` begins a block.
inline void attend_stretch(const Tile& t, int first, int last, int seen) {
  const int size = t.store.block_size;
  int room = 0;
  for (int key = first; key < last; key += size, room += t.store.block_room) {
    const int width = round_up(std::min(size, last - key), LANES);
    fetch_ahead(t, key / size, key + size, seen);
    score_block(t, key_block(t.store, t.table[key / size], t.head), width, t.scores + room);
  }
  bool any = false;
  for (int row = 0; row < t.rows; ++row) any |= weigh_row(t, row, first, last, room);
  if (!any) return;
  for (int row = 0; row < t.rows; row += ROWS) {
    with_count<ROWS>(std::min(ROWS, t.rows - row), [&](auto count) {
      gather_columns<count.value>(t, row, first / size, last - first);
    });
  }
}

inline void finish_tile(const Tile& t) {
  const Store& s = t.store;
  for (int row = 0; row < t.rows; ++row) {
    const int head = t.head * t.group + row % t.group;
    float* out = t.call.out + (t.first_token + row / t.group) * t.call.out_stride + int64_t(head) * s.value_size;
    const float scale = 1.0f / t.weight[row];
    for (int i = 0; i < s.value_size; ++i) out[i] = t.sums[row * s.value_room + i] * scale;
  }
}

// `place`: a sequence, and its first and last packed token here.
inline void attend_tile(const Store& s, const Step& step, const Attention& call, const int32_t* place, int head) {
  const int sequence = place[0], first = place[1], last = place[2], group = call.heads / s.kv_heads;
  const int position = step.seq_lens[sequence] - (step.query_start[sequence + 1] - first);
  const int rows = (last - first) * group, stretch = std::max(1, STRETCH / s.block_room);
  const int stride = stretch * s.block_room;
  Scratch& own = scratch();
  float* memory = own.grown(own.scores, size_t(rows) * (stride + s.value_room + 2));
  float *sums = memory + rows * stride, *top = sums + rows * s.value_room, *weight = top + rows;
  std::fill(sums, top, 0.0f);
  std::fill(top, weight, -INFINITY);
  std::fill(weight, weight + rows, 0.0f);
  const float** queries = own.grown(own.queries, rows);
  for (int row = 0; row < rows; ++row) {
    queries[row] = call.query + (first + row / group) * call.query_stride + int64_t(head * group + row % group) * s.key_size;
  }
  const int32_t* table = step.block_tables + int64_t(sequence) * step.table_width;
  const Tile t{s, call, table, head, group, rows, first, position, stride, memory, sums, top, weight, queries};
  const int seen = position + (last - first), size = s.block_size;
  const int begin = call.window > 0 ? std::max(0, position - call.window + 1) / size * size : 0;
  for (int key = begin; key < seen; key += stretch * size) {
    attend_stretch(t, key, std::min(key + stretch * size, seen), seen);
  }
  finish_tile(t);
}

// One phase of a team.
inline void attend(Team& team, const Store& s, const Step& step, const Attention& call) {
  const int64_t items = int64_t(step.num_tiles) * s.kv_heads;
  for (int64_t item = team.take(1); item < items; item = team.take(1)) {
    attend_tile(s, step, call, step.tiles + item / s.kv_heads * 3, int(item % s.kv_heads));
  }
}

}  // namespace folo
