// The CPU kernel of pair_stats, the op that counts two tensors and their difference: of a call of
// swiglu_stats with Activation::difference, which has its arguments, swiglu_stats.cpp runs this.
#pragma once

#include <cstdint>

#include "swiglu_stats.h"

namespace relneuron {

// Runs the op: a is gate, b is up, and the difference is at site_act. As `swiglu_stats`.
void pair_stats(const SwigluStatsArgs& args, const char* isa, int n_threads);

// ---- Between pair_stats.cpp and the kernel of each instruction set.

// The most tokens whose values are added up in float32 before float64 takes over: four sums of four
// tokens, 7 roundings of at most 2^-24 of the sum of absolute values. Rows of one column are a
// multiple of many cache lines apart, so more of them push each other out of the first-level cache:
// of 4096 x 11008 in float32, chunks of 64 took 1.3 times as long.
constexpr int64_t chunk_rows = 16;

// Tokens of one group, in their order.
struct Chunk {
  int64_t begin, n_rows;  // in PairStatsPlan::rows
  int64_t group;
};

// Plain pointers, because no standard header may be used where it is compiled for an instruction set.
struct PairStatsPlan {
  const int64_t* rows = nullptr;  // the tokens that are counted, group after group; null = all
  const Chunk* chunks = nullptr;
  int64_t n_chunks = 0;
};

struct PairStatsKernel {
  // The columns [f_begin, f_end) of all chunks.
  void (*columns)(const SwigluStatsArgs& args, const PairStatsPlan& plan, int64_t f_begin,
                  int64_t f_end);
};
namespace portable {
extern const PairStatsKernel pair_stats_kernel;
}
namespace avx2 {
extern const PairStatsKernel pair_stats_kernel;
}
namespace avx512 {
extern const PairStatsKernel pair_stats_kernel;
}

}  // namespace relneuron
