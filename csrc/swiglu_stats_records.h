// What swiglu_stats keeps in cache for a range of columns: counts, moments and responses, and how
// rows are added to them. swiglu_stats_kernel.cpp includes it.
#pragma once

#include "elements.h"
#include "swiglu_stats.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// One record per block, so that what every row changes is one stream of memory. Lane l of plane p of a block is its column Element::column(p, l).

struct Counts {
  uint32_t pair[n_lanes];  // lower 16 bits: plane 0, upper: plane 1
};

struct Moments {
  float part_sum[block_width];  // of the last rows, plane after plane, as the rest
  float part_sum_sq[block_width];
  float max[block_width];
};

// Changed now and then, so apart from the rest.
struct Totals {
  double sum[block_width];
  double sum_sq[block_width];
  uint32_t n_nonfinite[block_width];
};

// Sums of one to four tokens that are added in float32 before float64 takes over: 19 roundings of at
// most 2^-24 of the part's sum of absolute values.
constexpr int part_sums = 16;

// Bytes for the statistics of a range of columns, so that they stay in the second-level cache, and
// bounds of its width: short pieces of rows stream badly (at 512 columns a count takes 1.5 times as
// long as at 5504).
constexpr int64_t cache_bytes = 256 << 10;
constexpr int64_t width_min = 2048, width_max = 8192;

struct Layout {
  int64_t width;           // columns at a time, a multiple of column_step
  int64_t record_bytes;    // of one block at one site in one slot: Counts, maybe Moments
  int64_t slot_bytes;      // of one site in one slot
  int64_t response_bytes;  // of one site

  // For n_columns, divided evenly.
  Layout(const SwigluStatsArgs& args, int64_t n_columns) {
    const int64_t most = most_columns(args);
    const int64_t n_steps = (n_columns + column_step - 1) / column_step;
    const int64_t n_ranges = (n_steps * column_step + most - 1) / most;
    set_width(args, n_ranges ? (n_steps + n_ranges - 1) / n_ranges * column_step : column_step);
  }

  // Of all layouts for n_columns or fewer, no range is wider.
  static Layout widest(const SwigluStatsArgs& args, int64_t n_columns) {
    Layout layout(args, 0);
    const int64_t most = most_columns(args);
    const int64_t padded = (n_columns + column_step - 1) / column_step * column_step;
    layout.set_width(args, padded < most ? padded : most);
    return layout;
  }

 private:
  static int64_t block_bytes(const SwigluStatsArgs& args) {
    return sizeof(Counts) + (args.sum ? sizeof(Moments) + sizeof(Totals) : 0);
  }

  static int64_t most_columns(const SwigluStatsArgs& args) {
    const int64_t per_column =
        block_bytes(args) / block_width * args.n_sites + 4 * args.n_responses;
    const int64_t most = per_column ? cache_bytes / per_column : width_max;
    const int64_t bounded = most < width_min ? width_min : most > width_max ? width_max : most;
    return bounded / column_step * column_step;
  }

  void set_width(const SwigluStatsArgs& args, int64_t columns) {
    width = columns;
    record_bytes = sizeof(Counts) + (args.sum ? sizeof(Moments) : 0);
    slot_bytes = width / block_width * block_bytes(args);
    response_bytes = 4 * width;
  }
};

// One site of one slot: the records of all blocks, then their totals.
struct Slot {
  unsigned char* records = nullptr;
  unsigned char* totals_begin = nullptr;
  int64_t record_bytes = 0;

  RELNEURON_INLINE Counts& counts(int64_t at) const {
    return *reinterpret_cast<Counts*>(records + at / block_width * record_bytes);
  }
  RELNEURON_INLINE Moments& moments(int64_t at) const {
    return *reinterpret_cast<Moments*>(&counts(at) + 1);
  }
  RELNEURON_INLINE Totals& totals(int64_t at) const {
    return reinterpret_cast<Totals*>(totals_begin)[at / block_width];
  }
};

// The values of n_rows tokens are added in their order. Several at a time, because every statistic
// is loaded and stored once for all of them.

template <int n_rows>
RELNEURON_INLINE void add_counts(Counts& counts, const Block (&rows)[n_rows], F32 threshold) {
  U32 count = load<U32>(counts.pair);
  for (const Block& x : rows) {
    count = add_where_greater(count, x.plane[0], threshold, 1u);
    count = add_where_greater(count, x.plane[1], threshold, 1u << 16);
  }
  store(counts.pair, count);
}

RELNEURON_INLINE void flush_part(float* part, double* sum) {
  for (int at = 0; at < block_width; at += n_lanes) {
    const F32 x = load<F32>(part + at);
    constexpr int half = n_lanes / 2;
    store(sum + at, load<F64>(sum + at) + widen<0>(x));
    store(sum + at + half, load<F64>(sum + at + half) + widen<1>(x));
    store(part + at, F32{});
  }
}

// `add_moments` column by column, for rows of which some value is NaN, infinite, or too large for its
// square. The columns that have none get what they would have got; the others go to float64.
template <int n_rows>
__attribute__((noinline, cold)) void add_moments_carefully(Moments& m, Totals& totals,
                                                           const Block (&rows)[n_rows]) {
  for (int i = 0; i < block_width; ++i) {
    const auto value = [&](int r) { return rows[r].plane[i / n_lanes][i % n_lanes]; };
    float sum = value(0), sum_sq = sum * sum, max = sum > m.max[i] ? sum : m.max[i];
    for (int r = 1; r < n_rows; ++r) {
      sum += value(r);
      sum_sq = __builtin_fmaf(value(r), value(r), sum_sq);
      max = value(r) > max ? value(r) : max;
    }
    sum_sq += m.part_sum_sq[i];
    if (is_finite(sum_sq)) {
      m.part_sum[i] += sum;
      m.part_sum_sq[i] = sum_sq;
      m.max[i] = max;
      continue;
    }
    for (int r = 0; r < n_rows; ++r) {
      if (!is_finite(value(r))) {
        totals.n_nonfinite[i] += 1;
        continue;
      }
      const double wide = value(r);
      totals.sum[i] += wide;
      totals.sum_sq[i] += wide * wide;
      m.max[i] = value(r) > m.max[i] ? value(r) : m.max[i];
    }
  }
}

template <int n_rows>
RELNEURON_INLINE void add_moments(Moments& m, Totals& totals, const Block (&rows)[n_rows],
                                  bool is_part_full) {
  F32 sum[2], sum_sq[2], max[2];
  for (int plane = 0; plane < 2; ++plane) {
    const int at = plane * n_lanes;
    // The rows among themselves first: it rounds less.
    sum[plane] = rows[0].plane[plane];
    sum_sq[plane] = sum[plane] * sum[plane];
    max[plane] = larger(sum[plane], load<F32>(m.max + at));
    for (int r = 1; r < n_rows; ++r) {
      const F32 x = rows[r].plane[plane];
      sum[plane] += x;
      sum_sq[plane] = add_square(sum_sq[plane], x);
      max[plane] = larger(x, max[plane]);
    }
    sum[plane] = load<F32>(m.part_sum + at) + sum[plane];
    sum_sq[plane] += load<F32>(m.part_sum_sq + at);
  }
  if (__builtin_expect(any_nonfinite(sum_sq[0]) || any_nonfinite(sum_sq[1]), 0)) {
    Block copy[n_rows];
    for (int r = 0; r < n_rows; ++r) copy[r] = rows[r];
    add_moments_carefully(m, totals, copy);
  } else {
    for (int plane = 0; plane < 2; ++plane) {
      const int at = plane * n_lanes;
      store(m.part_sum + at, sum[plane]);
      store(m.part_sum_sq + at, sum_sq[plane]);
      store(m.max + at, max[plane]);
    }
  }
  if (is_part_full) {
    flush_part(m.part_sum, totals.sum);
    flush_part(m.part_sum_sq, totals.sum_sq);
  }
}

template <int n_rows>
RELNEURON_INLINE void add_responses(float* sums, const Block (&rows)[n_rows]) {
  for (int plane = 0; plane < 2; ++plane) {
    F32 sum = load<F32>(sums + plane * n_lanes);
    for (const Block& x : rows) sum += x.plane[plane];
    store(sums + plane * n_lanes, sum);
  }
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
