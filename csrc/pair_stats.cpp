// pair_stats on a CPU: puts the tokens of each group together and splits the columns over threads; the
// loops are in pair_stats_kernel.cpp. Nothing is written per token, so the rows may be read in any
// order, and a group's stand in the order of the tokens: its sums depend on neither threads nor what
// other groups are in the call.
#include "pair_stats.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "rows_by_group.h"
#include "runtime.h"

namespace relneuron {
namespace {

constexpr const PairStatsKernel* kernels[] = RELNEURON_KERNELS(pair_stats_kernel);

std::vector<Chunk> plan_chunks(const SwigluStatsArgs& args, const RowsByGroup& rows) {
  std::vector<Chunk> chunks;
  for (int64_t group = 0; group < args.G; ++group) {
    int64_t begin = rows.begins[static_cast<size_t>(group)];
    const int64_t end = rows.begins[static_cast<size_t>(group) + 1];
    args.tokens[group] += end - begin;
    for (; begin < end; begin += chunk_rows) {
      chunks.push_back({begin, std::min(chunk_rows, end - begin), group});
    }
  }
  return chunks;
}

}  // namespace

void pair_stats(const SwigluStatsArgs& args, const char* isa, int n_threads) {
  const PairStatsKernel& kernel = *kernels[find_isa("pair_stats", isa)];
  const RowsByGroup rows(args.group_ids, args.T, args.G);
  const std::vector<Chunk> chunks = plan_chunks(args, rows);
  PairStatsPlan plan;
  plan.rows = args.group_ids ? rows.rows.data() : nullptr;
  plan.chunks = chunks.data();
  plan.n_chunks = static_cast<int64_t>(chunks.size());
  const Parts parts(args, n_threads);
  std::atomic<int64_t> next_part{0};
  auto run_parts = [&] {
    const DefaultFloatMode mode;
    for (int64_t part; (part = next_part++) < parts.n;) {
      kernel.columns(args, plan, parts.begin(part), parts.begin(part + 1));
    }
  };
  run_parallel(run_parts, parts.n);
}

}  // namespace relneuron
