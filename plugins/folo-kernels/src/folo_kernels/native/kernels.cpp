// What Python calls (see folo_kernels/library.py): plain C functions over the structures of the headers.
#include "decoder.hpp"
#include "packing.hpp"

using namespace folo;

#pragma GCC visibility push(default)
extern "C" {

int32_t folo_lanes() { return LANES; }

int64_t folo_panel_bytes(int32_t inputs, int32_t format) { return panel_bytes(inputs, format); }

void folo_set_team(void* entry, void* granted, int32_t threads, const int32_t* cpus, int32_t num_cpus) {
  TeamSettings& settings = team_settings();
  settings.entry = reinterpret_cast<ParallelEntry>(entry);
  settings.granted = reinterpret_cast<int (*)()>(granted);
  settings.threads = std::clamp(threads, 1, MAX_THREADS);
  settings.num_cpus = std::clamp(num_cpus, 0, MAX_THREADS);
  std::copy(cpus, cpus + settings.num_cpus, settings.cpus);
}

void folo_pack(const Source* source, const Matrix* matrix, void* panels, float* bias) {
  run_team([&](Team& team, int) { pack(team, *source, *matrix, static_cast<unsigned char*>(panels), bias); });
}

void folo_unpack(const Matrix* matrix, float* plain) {
  run_team([&](Team& team, int) { unpack(team, *matrix, plain); });
}

void folo_multiply(const Product* product) {
  run_team([&](Team& team, int) { multiply(team, *product); });
}

void folo_write(const Store* store, const Step* step, const float* keys, const float* values) {
  for (int token = 0; token < step->num_tokens; ++token) {
    for (int head = 0; head < store->kv_heads; ++head) {
      const int64_t row = int64_t(token) * store->kv_heads + head;
      write_slot(*store, step->slots[token], head, keys + row * store->key_size, values + row * store->value_size);
    }
  }
}

void folo_attend(const Store* store, const Step* step, const Attention* call) {
  run_team([&](Team& team, int) { attend(team, *store, *step, *call); });
}

void folo_normalise(const float* x, const float* weight, int32_t rows, int32_t size, float epsilon, float* y) {
  for (int64_t row = 0; row < rows; ++row) normalise(x + row * size, weight, size, epsilon, y + row * size, false);
}

int64_t folo_workspace_floats(const Decoder* decoder, int32_t num_tokens) {
  return workspace_floats(*decoder, num_tokens);
}

void folo_decode(Decoder* decoder, const DecoderStep* step, const Step* batch) { decode(*decoder, *step, *batch); }

}  // extern "C"
#pragma GCC visibility pop
