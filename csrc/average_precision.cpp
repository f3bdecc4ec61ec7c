// average_precision on a CPU: prepares the labels of all relations once, picks the instruction set and
// splits the columns over threads; the loops are in average_precision_kernel.cpp.
#include "average_precision.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "runtime.h"

namespace relneuron {
namespace {

constexpr const AveragePrecisionKernel* kernels[] = RELNEURON_KERNELS(average_precision_kernel);

// Columns that a thread copies next to each other at a time: 32 neighbouring float32 are two cache
// lines, which processors fetch together; fewer if the columns are long.
constexpr int64_t block_columns_max = 32;
constexpr int64_t block_elements_max = 1 << 22;
// About what a core does in 10 microseconds, the order of what it costs to wake a thread.
constexpr int64_t min_elements_per_thread = 1 << 12;
// What the label words or weights of all groups may take to be read in any order from the second cache;
// above it a batch of columns shares each group.
constexpr int64_t label_bytes_in_cache = 1 << 19;

// Each relation is sorted by itself while that is at most so many times the rows: sorting all rows once
// takes about twice as long per row, since their numbers have to come along.
constexpr int64_t direct_rows_max = 2;

int sort_u32(void* words, ptrdiff_t n, void*) {
  std::sort(static_cast<uint32_t*>(words), static_cast<uint32_t*>(words) + n);
  return 0;
}

int sort_u64(void* words, ptrdiff_t n, void*) {
  std::sort(static_cast<uint64_t*>(words), static_cast<uint64_t*>(words) + n);
  return 0;
}

// What the plan points to.
struct Labels {
  std::vector<uint32_t> words;
  std::vector<WeightRow> rows;
  std::vector<uint64_t> reciprocals;
  std::vector<uint64_t> n_positive;
  std::vector<int64_t> n_members;
};

Labels prepare_labels(const AveragePrecisionArgs& args, AveragePrecisionPlan& plan) {
  Labels all;
  const int64_t n_groups = (args.R + relations_per_group - 1) / relations_per_group;
  if (args.weights) {
    all.rows.resize(static_cast<size_t>(n_groups * args.N));
  } else {
    all.words.resize(static_cast<size_t>(n_groups * label_stride(args.N)));
  }
  all.n_positive.resize(static_cast<size_t>(args.R));
  uint64_t n_max = 0;
  int64_t n_sorted_directly = 0;
  for (int64_t relation = 0; relation < args.R; ++relation) {
    const int64_t group = relation / relations_per_group;
    const int bit = static_cast<int>(relation % relations_per_group);
    const int8_t* labels = args.labels + relation * args.N;
    uint64_t n_members = 0, n_positive = 0;
    if (args.weights) {
      const uint8_t* weights = args.weights + relation * args.N;
      WeightRow* rows = all.rows.data() + group * args.N;
      for (int64_t i = 0; i < args.N; ++i) {
        rows[i].weight[bit] = labels[i] >= 0 ? weights[i] : 0;
        rows[i].positive[bit] = labels[i] == 1 ? weights[i] : 0;
        n_members += rows[i].weight[bit];
        n_positive += rows[i].positive[bit];
      }
    } else {
      uint32_t* words = all.words.data() + group * label_stride(args.N);
      const uint32_t member = 1u << (relations_per_group + bit), positive = 1u << bit;
      for (int64_t i = 0; i < args.N; ++i) {
        words[i] |= (labels[i] >= 0 ? member : 0) | (labels[i] == 1 ? positive : 0);
        n_members += labels[i] >= 0;
        n_positive += labels[i] == 1;
      }
    }
    n_max = std::max(n_max, n_members);
    n_sorted_directly += static_cast<int64_t>(n_members);
    all.n_positive[static_cast<size_t>(relation)] = n_positive;
    all.n_members.push_back(static_cast<int64_t>(n_members));
  }
  all.reciprocals.resize(static_cast<size_t>(n_max + 1));
  for (uint64_t n = 1; n <= n_max; ++n) {
    all.reciprocals[static_cast<size_t>(n)] = ((uint64_t{1} << 62) + n / 2) / n;
  }
  plan.label_words = all.words.data();
  plan.weight_rows = args.weights ? all.rows.data() : nullptr;
  plan.reciprocals = all.reciprocals.data();
  plan.n_positive = all.n_positive.data();
  plan.n_members = all.n_members.data();
  plan.n_groups = n_groups;
  plan.is_direct = !args.weights && n_sorted_directly <= direct_rows_max * args.N;
  return all;
}

}  // namespace

bool average_precision(const AveragePrecisionArgs& given, const char* isa, int n_threads) {
  AveragePrecisionArgs args = given;
  if (!args.sort_u32) args.sort_u32 = sort_u32;
  if (!args.sort_u64) args.sort_u64 = sort_u64;
  const AveragePrecisionKernel& kernel = *kernels[find_isa("average_precision", isa)];
  AveragePrecisionPlan plan;
  const Labels labels = prepare_labels(args, plan);

  const int64_t worthwhile = args.N * args.M * plan.n_groups / min_elements_per_thread;
  const int64_t threads =
      std::max<int64_t>(1, std::min({static_cast<int64_t>(n_threads), args.M, worthwhile}));
  const int64_t most_columns =
      std::max<int64_t>(1, std::min(block_columns_max, block_elements_max / args.N));
  plan.block_columns = std::min(most_columns, (args.M + threads - 1) / threads);
  const int64_t label_bytes =
      plan.n_groups * args.N * static_cast<int64_t>(args.weights ? sizeof(WeightRow) : 4);
  plan.batch_columns = label_bytes > label_bytes_in_cache && !plan.is_direct ? plan.block_columns : 1;
  const int64_t n_blocks = (args.M + plan.block_columns - 1) / plan.block_columns;
  const int64_t scratch_bytes = kernel.scratch_bytes(args, plan);
  const Scratch scratch = make_scratch(scratch_bytes * threads);

  std::atomic<int64_t> next_block{0}, next_thread{0};
  std::atomic<bool> is_finite{true};
  auto run_blocks = [&] {
    const DefaultFloatMode mode;
    unsigned char* own = scratch.get() + next_thread++ * scratch_bytes;
    for (int64_t block; is_finite && (block = next_block++) < n_blocks;) {
      const int64_t m_begin = block * plan.block_columns;
      const int64_t m_end = std::min(args.M, m_begin + plan.block_columns);
      if (!kernel.columns(args, plan, m_begin, m_end, own)) is_finite = false;
    }
  };
  run_parallel(run_blocks, threads);
  return is_finite;
}

}  // namespace relneuron
