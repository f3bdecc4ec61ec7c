// The CPU kernel of average_precision: its arguments and entry points. The spec of the op is the
// docstring of relneuron/ops/average_precision/op.py; bindings.cpp calls `average_precision`, which runs
// the kernel of one instruction set on each thread's columns.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace relneuron {

// The numbers are the positions in DTYPES of average_precision.py.
enum class ValueType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// Sorts n unsigned integers upwards; the last argument is not used (numpy's own signature).
using SortFunction = int (*)(void* words, ptrdiff_t n, void*);

// A null pointer says that the argument was not given. Strides count elements.
struct AveragePrecisionArgs {
  float* ap = nullptr;           // (R, M)
  const void* values = nullptr;  // (N, M)
  int64_t stride_vn = 0, stride_vm = 0;
  int64_t N = 0, M = 0;
  ValueType dtype = ValueType::float32;
  const int8_t* labels = nullptr;    // (R, N)
  const uint8_t* weights = nullptr;  // (R, N)
  int64_t R = 0;
  SortFunction sort_u32 = nullptr, sort_u64 = nullptr;
};

// Runs the op; false if a value is not finite. `isa` names one of isa_levels(), or is empty for the
// best. The result is the same bit for bit for every isa and n_threads. Throws std::invalid_argument
// on an unknown isa.
bool average_precision(const AveragePrecisionArgs& args, const char* isa, int n_threads);

// ---- Between average_precision.cpp and the kernel of each instruction set.

// Relations are counted by groups of this many.
constexpr int relations_per_group = 16;
// Rows are padded to whole words of this many bits.
constexpr int64_t word_rows = 64;

constexpr int64_t padded(int64_t n) { return (n + word_rows - 1) / word_rows * word_rows; }
// Label words of a group, up to and including row padded(N), which no relation has.
constexpr int64_t label_stride(int64_t n) { return padded(n) + 1; }

// Weights of one row for the relations of a group: all of them, and those where it is positive.
struct WeightRow {
  uint8_t weight[relations_per_group];
  uint8_t positive[relations_per_group];
};

struct AveragePrecisionPlan {
  // (groups, label_stride(N)): bit r = positive in relation r of the group, bit 16 + r = in its set;
  // 0 in rows from N on.
  const uint32_t* label_words = nullptr;
  const WeightRow* weight_rows = nullptr;   // (groups, N), null without weights
  const uint64_t* reciprocals = nullptr;    // I(n) of the spec, up to the largest sum of weights
  const uint64_t* n_positive = nullptr;     // (R,), sums of weights
  const int64_t* n_members = nullptr;       // (R,), likewise
  int64_t n_groups = 0;
  bool is_direct = false;     // sort each relation's members by themselves (batches of one column)
  int64_t block_columns = 0;  // the most columns of a call
  int64_t batch_columns = 0;  // columns that are sorted before they are counted, group by group
};

struct AveragePrecisionKernel {
  // The columns [m_begin, m_end); false if a value is not finite. `scratch` has scratch_bytes,
  // aligned to 64.
  bool (*columns)(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan,
                  int64_t m_begin, int64_t m_end, unsigned char* scratch);
  int64_t (*scratch_bytes)(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan);
};
namespace portable {
extern const AveragePrecisionKernel average_precision_kernel;
}
namespace avx2 {
extern const AveragePrecisionKernel average_precision_kernel;
}
namespace avx512 {
extern const AveragePrecisionKernel average_precision_kernel;
}

}  // namespace relneuron
