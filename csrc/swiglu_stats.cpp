// swiglu_stats on a CPU: picks the instruction set and splits the columns over threads; the loops
// are in swiglu_stats_kernel.cpp. Threads split columns, never rows, so every sum is taken in the
// order of the rows and the result does not depend on the number of threads.
#include "swiglu_stats.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "pair_stats.h"
#include "runtime.h"

namespace relneuron {
namespace {

constexpr const SwigluStatsKernel* kernels[] = RELNEURON_KERNELS(swiglu_stats_kernel);

// About what a core does in 10 microseconds, the order of what it costs to wake a thread.
constexpr int64_t min_elements_per_thread = 1 << 15;

// Of all slots of a thread.
constexpr int64_t slots_bytes_max = 4 << 20;

// Counting a row at once takes about as long as half of a slot's share: to clear it and to add it to
// the counts.
constexpr int64_t direct_rows_per_group = 2;

// What the plan points to.
struct Groups {
  std::vector<Segment> segments;
  std::vector<int32_t> groups;
  std::vector<int32_t> slots;
};

// Plans the segments and slots, and counts the tokens of each group.
Groups plan_groups(const SwigluStatsArgs& args, int64_t most_slots, SwigluStatsPlan& plan) {
  Groups all;
  all.slots.assign(static_cast<size_t>(args.T), -1);
  std::vector<int32_t> slot_of_group(static_cast<size_t>(args.G), -1);
  Segment segment = {};
  const auto n_slots = [&] { return static_cast<int64_t>(all.groups.size()) - segment.slot_begin; };
  const auto finish = [&](int64_t t_end) {
    plan.n_slots = std::max(plan.n_slots, n_slots());
    for (size_t i = static_cast<size_t>(segment.slot_begin); i < all.groups.size(); ++i) {
      slot_of_group[static_cast<size_t>(all.groups[i])] = -1;
    }
    segment.t_end = t_end;
    segment.slot_end = static_cast<int64_t>(all.groups.size());
    segment.is_direct =
        !args.sum && segment.t_end - segment.t_begin <= direct_rows_per_group * n_slots();
    all.segments.push_back(segment);
    segment = {t_end, t_end, segment.slot_end, segment.slot_end, false};
  };
  for (int64_t t = 0; t < args.T; ++t) {
    const int32_t group = args.group_ids ? args.group_ids[t] : 0;
    const bool is_counted = args.tokens && group >= 0;
    const bool is_new = is_counted && slot_of_group[static_cast<size_t>(group)] < 0;
    if (t - segment.t_begin == segment_rows_max || (is_new && n_slots() == most_slots)) finish(t);
    if (!is_counted) continue;
    int32_t& slot = slot_of_group[static_cast<size_t>(group)];
    if (slot < 0) {
      slot = static_cast<int32_t>(n_slots());
      all.groups.push_back(group);
    }
    all.slots[static_cast<size_t>(t)] = slot;
    args.tokens[group] += 1;
  }
  finish(args.T);
  plan.segments = all.segments.data();
  plan.n_segments = static_cast<int64_t>(all.segments.size());
  plan.groups = all.groups.data();
  plan.slots = all.slots.data();
  return all;
}

// A matrix h of this size is stored past the caches: whoever reads it next would hardly find it
// there, and its lines need not be read before they are written.
constexpr int64_t stream_bytes_min = 64 << 20;

bool should_stream(const SwigluStatsArgs& args) {
  const int64_t element_bytes = args.dtype == DType::float32 ? 4 : 2;
  const bool is_aligned = args.out != nullptr && reinterpret_cast<uintptr_t>(args.out) % 64 == 0 &&
                          args.stride_ht * element_bytes % 64 == 0;
  return is_aligned && args.T * args.F * element_bytes >= stream_bytes_min;
}

// Counting act > 0 alone needs no act: it is gate > 0, or gate above the pattern given here, where
// what is above 0 can round to it: half of 2^-149 for silu, the square of 2^-75 for relu2.
SwigluStatsArgs without_act(SwigluStatsArgs args) {
  const bool is_known = args.activation != Activation::gelu;
  if (args.out == nullptr && args.dtype == DType::float32 && is_known && args.n_sites == 1 &&
      args.sites[0] == site_act && args.threshold_bits == 0 && args.sum == nullptr &&
      args.n_responses == 0) {
    args.sites[0] = site_gate;
    if (args.activation == Activation::silu) args.threshold_bits = 1;
    if (args.activation == Activation::relu2) args.threshold_bits = 52u << 23;
  }
  return args;
}

}  // namespace

const float* act_table(DType dtype, Activation activation) {
  struct Table {
    std::once_flag once;
    std::unique_ptr<float[]> values;
  };
  static Table tables[2][n_activations];
  Table& table = tables[dtype == DType::float16][static_cast<int>(activation)];
  std::call_once(table.once, [&] {
    const DefaultFloatMode mode;
    std::unique_ptr<float[]> values(new float[65536]);
    portable::swiglu_stats_kernel.fill_act_table(dtype, activation, values.get());
    table.values = std::move(values);
  });
  return table.values.get();
}

Parts::Parts(const SwigluStatsArgs& args, int n_threads)
    : n_steps((args.F + column_step - 1) / column_step), F(args.F) {
  const int64_t worthwhile = std::max<int64_t>(1, args.T * args.F / min_elements_per_thread);
  n = std::max<int64_t>(1, std::min({static_cast<int64_t>(n_threads), n_steps, worthwhile}));
}

int64_t Parts::begin(int64_t part) const {
  return std::min(F, n_steps * part / n * column_step);
}

void swiglu_stats(const SwigluStatsArgs& given, const char* isa, int n_threads) {
  if (given.activation == Activation::difference) return pair_stats(given, isa, n_threads);
  const SwigluStatsArgs args = without_act(given);
  const SwigluStatsKernel& kernel = *kernels[find_isa("swiglu_stats", isa)];
  const Parts parts(args, n_threads);
  const int64_t part_columns = (parts.n_steps + parts.n - 1) / parts.n * column_step;

  SwigluStatsPlan plan;
  plan.n_slots = 1;
  // Of all columns, so that the segments, which sums depend on, do not depend on the threads.
  const int64_t slot_bytes = std::max<int64_t>(1, kernel.scratch_bytes(args, plan, args.F));
  const int64_t most_slots =
      std::max<int64_t>(8, std::min<int64_t>(n_slots_max, slots_bytes_max / slot_bytes));
  const Groups groups = plan_groups(args, most_slots, plan);
  if (args.dtype != DType::float32 && args.activation != Activation::residual) {
    plan.act_table = act_table(args.dtype, args.activation);
  }
  plan.stream = should_stream(args);

  const int64_t scratch_bytes =
      (kernel.scratch_bytes(args, plan, part_columns) + 63) / 64 * 64;
  const Scratch scratch = make_scratch(scratch_bytes * parts.n);
  std::atomic<int64_t> next_part{0};
  auto run_parts = [&] {
    const DefaultFloatMode mode;
    for (int64_t part; (part = next_part++) < parts.n;) {
      kernel.columns(args, plan, parts.begin(part), parts.begin(part + 1),
                     scratch.get() + part * scratch_bytes);
    }
  };
  run_parallel(run_parts, parts.n);
}

}  // namespace relneuron
