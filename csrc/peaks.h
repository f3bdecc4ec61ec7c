// The CPU kernels of peaks, merge_peaks and histogram; the spec of the ops are the docstrings of
// relneuron/ops/peaks/op.py. The site's values are read as swiglu_stats reads them.
#pragma once

#include <cstdint>

#include "swiglu_stats.h"

namespace relneuron {

// Of `site` it takes gate, up, T, F, dtype and activation; sites[0] is the site, and group_ids (T,) in
// [-1, G) are the segments or groups.
struct PeaksArgs {
  SwigluStatsArgs site;
  float* values = nullptr;       // (G, F)
  int32_t* positions = nullptr;  // (G, F), -1 = none
  int64_t first_row = 0;
};

struct HistogramArgs {
  SwigluStatsArgs site;
  int64_t* counts = nullptr;  // (G, F, B)
  const int32_t* exponent = nullptr;  // (F,)
  const int32_t* first = nullptr;     // (F,)
  int64_t B = 0;
};

struct MergePeaksArgs {
  const float* values = nullptr;       // (S, F)
  const int32_t* positions = nullptr;  // (S, F)
  const int64_t* numbers = nullptr;    // (S,)
  const int32_t* group_ids = nullptr;  // (S,), null = all in group 0
  float* best_value = nullptr;         // (G, F, K)
  int64_t* best_number = nullptr;      // (G, F, K)
  int32_t* best_position = nullptr;    // (G, F, K)
  int64_t S = 0, F = 0, K = 0;
};

// As `swiglu_stats`; merge_peaks has no vectors, so no instruction set.
void peaks(const PeaksArgs& args, const char* isa, int n_threads);
void histogram(const HistogramArgs& args, const char* isa, int n_threads);
void merge_peaks(const MergePeaksArgs& args, int n_threads);

// ---- Between peaks.cpp and the kernels of each instruction set.

// Plain pointers, because no standard header may be used where it is compiled for an instruction set.
struct PeaksPlan {
  const int64_t* rows = nullptr;     // the tokens, group after group; null = all
  const int64_t* begins = nullptr;   // (G + 1,): of each group in `rows`
  const float* act_table = nullptr;  // (65536,): act of each 16-bit gate; null in float32
};

struct PeaksKernel {
  // The columns [f_begin, f_end) of all groups.
  void (*peaks)(const PeaksArgs& args, const PeaksPlan& plan, int64_t f_begin, int64_t f_end);
  void (*histogram)(const HistogramArgs& args, const PeaksPlan& plan, int64_t f_begin,
                    int64_t f_end);
};
namespace portable {
extern const PeaksKernel peaks_kernel;
}
namespace avx2 {
extern const PeaksKernel peaks_kernel;
}
namespace avx512 {
extern const PeaksKernel peaks_kernel;
}

}  // namespace relneuron
