// The CPU kernel of logprob_gain: its arguments and entry point. The spec of the op is the docstring of
// relneuron/ops/logprob_gain/op.py; bindings.cpp calls `logprob_gain`, which runs the kernel of one
// instruction set tile by tile of the vocabulary.
#pragma once

#include <stdint.h>

namespace relneuron {

// The numbers are the positions in _DTYPES of logprob_gain_engine.py.
enum class GainType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// With b[k, v] = values[rows[k]] . unembed[v] and p = exp(logp), one of two things is computed:
//   log_sums[i] = log sum over v of p[e, v] exp(t[i] b[k, v] + tilt[i] z[e, v])  for the pairs i of
//       neuron k, row_start[k] <= i < row_start[k + 1], with e = sentence[i]
//   second[k, e], third[k, e] = sum over v of p[e, v] b[k, v]^2 and ^3
// A null pointer says that the argument was not given. Strides count elements.
struct LogprobGainArgs {
  const void* values = nullptr;
  int64_t stride_vk = 0, stride_vd = 0;
  GainType values_dtype = GainType::float32;
  const int64_t* rows = nullptr;  // (K,)
  int64_t K = 0, D = 0;
  const void* unembed = nullptr;  // (V, D)
  int64_t stride_uv = 0;          // rows are contiguous
  GainType unembed_dtype = GainType::float32;
  int64_t V = 0;
  const float* logp = nullptr;  // (E, V)
  int64_t E = 0;
  float* largest = nullptr;  // (K,): max over v of |b|

  const int64_t* row_start = nullptr;  // (K + 1,)
  const int32_t* sentence = nullptr;   // (n,) in [0, E)
  const float* t = nullptr;            // (n,)
  const float* tilt = nullptr;         // (n,)
  const float* z = nullptr;            // (E, V), with tilt
  double* log_sums = nullptr;          // (n,); NaN where float32 does not reach

  double* second = nullptr;  // (K, E)
  double* third = nullptr;
};

// Runs the op. `isa` names one of isa_levels(), or is empty for the best; for one isa the result is
// the same bit for bit for every n_threads. Throws std::invalid_argument on an unknown isa.
void logprob_gain(const LogprobGainArgs& args, const char* isa, int n_threads);

// ---- Between logprob_gain.cpp and the kernel of each instruction set.

constexpr int64_t tile_tokens = 512;  // of the vocabulary, looked at together
constexpr int64_t block_rows = 48;    // neurons that a thread takes at a time

// The sum of one pair so far, p exp(y) over tokens: 1-sided where all |y| are small.
struct PairSum {
  double small = 0;   // sum of p expm1(y) over the tiles where |y| is small
  double weight = 0;  // sum of p over those
  double large = 0;   // sum of p exp(y - shift) over the other tiles
  double shift = 0;
  bool has_large = false;
};

// A piece of the vocabulary, packed.
struct Tile {
  int64_t first_token = 0, n_tokens = 0;
  float* unembed = nullptr;  // (panels of tokens, D, tokens of a panel)
  float* p = nullptr;        // (E, tile_tokens), 0 past the vocabulary
  float* logp = nullptr;     // likewise, -inf there
  float* z = nullptr;        // likewise, 0 there; with tilt
  double* weight = nullptr;  // (E,): sum of p
  float* z_span = nullptr;   // (E,): max |z|
};

struct LogprobGainPlan {
  int64_t first_row = 0, n_rows = 0;  // the neurons whose vectors are packed
  float* values = nullptr;            // (panels of rows, D, rows of a panel)
  PairSum* sums = nullptr;            // (n,)
};

struct LogprobGainKernel {
  int64_t rows_per_panel, tokens_per_panel;
  void (*pack_values)(const LogprobGainArgs&, const LogprobGainPlan&, int64_t panel);
  void (*pack_unembed)(const LogprobGainArgs&, const Tile&, int64_t panel);
  void (*pack_sentence)(const LogprobGainArgs&, const Tile&, int64_t sentence);
  // The neurons [row, row + block_rows) of the plan with a tile; `scratch` has
  // block_rows * tile_tokens floats, aligned to 64.
  void (*block)(const LogprobGainArgs&, const LogprobGainPlan&, const Tile&, int64_t row,
                float* scratch);
};
namespace portable {
extern const LogprobGainKernel logprob_gain_kernel;
}
namespace avx2 {
extern const LogprobGainKernel logprob_gain_kernel;
}
namespace avx512 {
extern const LogprobGainKernel logprob_gain_kernel;
}

}  // namespace relneuron
