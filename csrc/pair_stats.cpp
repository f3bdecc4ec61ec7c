// pair_stats on a CPU: puts the tokens of each group together and splits the columns over threads; the
// loops are in pair_stats_kernel.cpp. Nothing is written per token, so the rows may be read in any
// order, and a group's stand in the order of the tokens: its sums depend on neither threads nor what
// other groups are in the call.
#include "pair_stats.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "runtime.h"

namespace relneuron {
namespace {

constexpr const PairStatsKernel* kernels[] = RELNEURON_KERNELS(pair_stats_kernel);

// What the plan points to.
struct Rows {
  std::vector<int64_t> rows;
  std::vector<Chunk> chunks;
};

void add_chunks(int64_t begin, int64_t end, int64_t group, std::vector<Chunk>& chunks) {
  for (; begin < end; begin += chunk_rows) {
    chunks.push_back({begin, std::min(chunk_rows, end - begin), group});
  }
}

// Sorts the counted tokens by group, and counts them.
Rows plan_rows(const SwigluStatsArgs& args, PairStatsPlan& plan) {
  Rows all;
  if (!args.group_ids) {
    args.tokens[0] += args.T;
    add_chunks(0, args.T, 0, all.chunks);
  } else {
    std::vector<int64_t> ends(static_cast<size_t>(args.G) + 1);  // of the group before
    for (int64_t t = 0; t < args.T; ++t) ends[static_cast<size_t>(args.group_ids[t] + 1)] += 1;
    ends[0] = 0;  // of the tokens in no group
    for (int64_t group = 0; group < args.G; ++group) {
      int64_t& end = ends[static_cast<size_t>(group) + 1];
      const int64_t begin = ends[static_cast<size_t>(group)];
      args.tokens[group] += end;
      end += begin;
      add_chunks(begin, end, group, all.chunks);
    }
    all.rows.resize(static_cast<size_t>(ends.back()));
    for (int64_t t = 0; t < args.T; ++t) {
      if (args.group_ids[t] < 0) continue;
      int64_t& place = ends[static_cast<size_t>(args.group_ids[t])];
      all.rows[static_cast<size_t>(place++)] = t;
    }
    plan.rows = all.rows.data();
  }
  plan.chunks = all.chunks.data();
  plan.n_chunks = static_cast<int64_t>(all.chunks.size());
  return all;
}

}  // namespace

void pair_stats(const SwigluStatsArgs& args, const char* isa, int n_threads) {
  const PairStatsKernel& kernel = *kernels[find_isa("pair_stats", isa)];
  PairStatsPlan plan;
  const Rows rows = plan_rows(args, plan);
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
