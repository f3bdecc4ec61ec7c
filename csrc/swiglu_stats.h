// The CPU kernel of swiglu_stats: its arguments and entry points. The spec of the op is the
// docstring of relneuron/ops/swiglu_stats/op.py; bindings.cpp calls `swiglu_stats`, which runs
// `swiglu_stats_columns` of one instruction set on each thread's columns.
#pragma once

#include <cstdint>

namespace relneuron {

// The numbers are the positions in the tuples of the same names in Python.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
// `residual` is the op residual_stats: h = up + gate where kept; its one site is the gate's.
// `difference` is the op pair_stats, which has kernels of its own, see pair_stats.h.
enum class Activation : int {
  silu, gelu, gelu_tanh, relu, relu2, quick_gelu, tanh, residual, difference
};
constexpr int n_activations = 8;  // without difference
enum Site : int { site_gate = 0, site_up = 1, site_act = 2, site_product = 3, n_sites_max = 4 };

// A null pointer says that the argument was not given. Strides count elements.
struct SwigluStatsArgs {
  void* out = nullptr;         // (T, F), rows stride_ht apart; null = only statistics
  const void* gate = nullptr;  // (T, F), rows stride_gt apart
  const void* up = nullptr;    // (T, F), rows stride_ut apart; null = h is act, no site needs up
  int64_t stride_ht = 0, stride_gt = 0, stride_ut = 0;
  int64_t T = 0, F = 0;
  DType dtype = DType::float32;
  Activation activation = Activation::silu;

  int n_sites = 0;  // statistics: S recorded sites, in the order of `sites`
  int sites[n_sites_max] = {};
  int64_t G = 0;
  uint32_t threshold_bits = 0;         // of a float32: active is value > threshold
  int64_t* count = nullptr;            // (S, G, F)
  int64_t* tokens = nullptr;           // (G,)
  double* sum = nullptr;               // (S, G, F), null without moments, as the next three
  double* sum_sq = nullptr;            // (S, G, F)
  float* max = nullptr;                // (S, G, F)
  int64_t* n_nonfinite = nullptr;      // (S, G, F)
  const int32_t* group_ids = nullptr;  // (T,), null = all in group 0

  int n_responses = 0;
  int response_sites[n_sites_max] = {};
  float* responses[n_sites_max] = {};  // each (N, F), rows strides_rn apart
  int64_t strides_rn[n_sites_max] = {};
  const int32_t* prompt_ids = nullptr;  // (T,)

  const uint32_t* keep = nullptr;          // (C, ceil(F / 32))
  const int32_t* condition_ids = nullptr;  // (T,), null = row 0
};

// How the columns of a call are split over threads.
struct Parts {
  int64_t n, n_steps, F;

  Parts(const SwigluStatsArgs& args, int n_threads);
  int64_t begin(int64_t part) const;  // of part n: the end
};

// act of every 16-bit gate, made at the first call that needs it: 256 KiB each.
const float* act_table(DType dtype, Activation activation);

// Runs the op. `isa` names one of isa_levels(), or is empty for the best. The result is the same
// bit for bit for every isa and n_threads. Throws std::invalid_argument on an unknown isa.
void swiglu_stats(const SwigluStatsArgs& args, const char* isa, int n_threads);

// ---- Between swiglu_stats.cpp and the kernel of each instruction set.

// Rows [t_begin, t_end) whose tokens belong to a few groups: their statistics are added up in
// cache, in one slot per group, and written back when the rows are done; with few rows a group slots
// would cost more than they save.
struct Segment {
  int64_t t_begin, t_end;
  int64_t slot_begin, slot_end;  // of its groups in SwigluStatsPlan::groups
  bool is_direct;                // few rows a group: hits go to the counts at once, without slots
};

// Plain pointers, because no standard header may be used where it is compiled for an instruction set.
struct SwigluStatsPlan {
  const Segment* segments = nullptr;  // all rows, in order
  int64_t n_segments = 0;
  const int32_t* groups = nullptr;    // of the slots of all segments
  const int32_t* slots = nullptr;     // (T,): the slot of each token within its segment, -1 = none
  int64_t n_slots = 0;                // the most of any segment
  const float* act_table = nullptr;   // (65536,): act of each 16-bit gate; null in float32
  bool stream = false;                // store h past the caches
};

// The most rows of a segment: a slot counts in 16 bits. And the most slots; there are fewer where
// they are large.
constexpr int64_t segment_rows_max = 65535;
constexpr int n_slots_max = 64;
// Columns that an instruction set takes at a time divide this; parts of threads begin at multiples.
constexpr int64_t column_step = 64;

struct SwigluStatsKernel {
  // The columns [f_begin, f_end) of all rows. `scratch` has scratch_bytes for as many columns at
  // least, aligned to 64.
  void (*columns)(const SwigluStatsArgs& args, const SwigluStatsPlan& plan, int64_t f_begin,
                  int64_t f_end, unsigned char* scratch);
  int64_t (*scratch_bytes)(const SwigluStatsArgs& args, const SwigluStatsPlan& plan,
                           int64_t n_columns);
  // act of every 16-bit pattern as a float32; the dtype is not float32.
  void (*fill_act_table)(DType dtype, Activation activation, float* table);
};
namespace portable {
extern const SwigluStatsKernel swiglu_stats_kernel;
}
namespace avx2 {
extern const SwigluStatsKernel swiglu_stats_kernel;
}
namespace avx512 {
extern const SwigluStatsKernel swiglu_stats_kernel;
}

}  // namespace relneuron
