// What swiglu_stats keeps in cache for a range of columns: counts, moments and responses, and how
// rows are added to them. swiglu_stats_kernel.cpp includes it.
#pragma once

#include "elements.h"
#include "swiglu_stats.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// One record per block, so that all of it is one stream of memory. Lane l of plane p of a block is its column Element::column(p, l).

struct Counts {
  uint32_t pair[n_lanes];  // lower 16 bits: plane 0, upper: plane 1
};

struct Moments {
  float part_sum[block_width];  // of the last rows, plane after plane, as the rest
  float part_sum_sq[block_width];
  float max[block_width];
  uint32_t n_nonfinite[block_width];
  double sum[block_width];
  double sum_sq[block_width];
};

// Sums of one to four tokens that are added in float32 before float64 takes over: 18 roundings of at
// most 2^-24 of the part's sum of absolute values.
constexpr int part_sums = 16;

// Bytes for the statistics of a range of columns, so that they stay in the second-level cache, and
// bounds of its width: short pieces of rows stream badly (at 512 columns a count takes 1.5 times as
// long as at 4096).
constexpr int64_t cache_bytes = 256 << 10;
constexpr int64_t width_min = 2048, width_max = 8192;

struct Layout {
  int64_t width;           // columns at a time, a multiple of column_step
  int64_t record_bytes;    // of one block at one site in one slot: Counts, maybe Moments
  int64_t slot_bytes;      // of one site in one slot
  int64_t response_bytes;  // of one site

  explicit Layout(const SwigluStatsArgs& args) {
    record_bytes = sizeof(Counts) + (args.sum ? sizeof(Moments) : 0);
    const int64_t per_column = record_bytes / block_width * args.n_sites + 4 * args.n_responses;
    width = per_column ? cache_bytes / per_column : width_max;
    width = width < width_min ? width_min : width > width_max ? width_max : width;
    width -= width % column_step;
    slot_bytes = width / block_width * record_bytes;
    response_bytes = 4 * width;
  }
};

// One site of one slot.
struct Slot {
  unsigned char* records = nullptr;
  int64_t record_bytes = 0;

  RELNEURON_INLINE Counts& counts(int64_t at) const {
    return *reinterpret_cast<Counts*>(records + at / block_width * record_bytes);
  }
  RELNEURON_INLINE Moments& moments(int64_t at) const {
    return *reinterpret_cast<Moments*>(&counts(at) + 1);
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

// One column of which some value is NaN, infinite, or too large for its square: in float64.
template <int n_rows>
void add_column_carefully(Moments& m, const Block (&rows)[n_rows], int plane, int lane) {
  const int i = plane * n_lanes + lane;
  for (const Block& x : rows) {
    const float value = x.plane[plane][lane];
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
    m.n_nonfinite[i] += is_finite ? 0 : 1;
    m.max[i] = is_finite && value > m.max[i] ? value : m.max[i];
    const double wide = is_finite ? value : 0.0;
    m.sum[i] += wide;
    m.sum_sq[i] += wide * wide;
  }
}

template <int n_rows>
__attribute__((noinline, cold)) void add_moments_carefully(Moments& m, const Block (&rows)[n_rows],
                                                           Block sum, Block sum_sq, Block max) {
  for (int plane = 0; plane < 2; ++plane) {
    for (int lane = 0; lane < n_lanes; ++lane) {
      if (nonfinite(sum_sq.plane[plane])[lane]) {
        add_column_carefully(m, rows, plane, lane);
      } else {
        m.part_sum[plane * n_lanes + lane] = sum.plane[plane][lane];
        m.part_sum_sq[plane * n_lanes + lane] = sum_sq.plane[plane][lane];
        m.max[plane * n_lanes + lane] = max.plane[plane][lane];
      }
    }
  }
}

// x[0] + ... + x[n - 1] in pairs of pairs: it rounds less than one after the other.
template <int n>
RELNEURON_INLINE F32 sum_pairs(const F32 (&x)[n]) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    F32 half[n / 2];
    for (int i = 0; i < n / 2; ++i) half[i] = x[2 * i] + x[2 * i + 1];
    return sum_pairs(half);
  }
}

template <int n_rows>
RELNEURON_INLINE void add_moments(Moments& m, const Block (&rows)[n_rows], bool is_part_full) {
  Block sum = Float32::load_block(m.part_sum);
  Block sum_sq = Float32::load_block(m.part_sum_sq);
  Block max = Float32::load_block(m.max);
  for (int plane = 0; plane < 2; ++plane) {
    F32 x[n_rows], square[n_rows];
    for (int r = 0; r < n_rows; ++r) {
      x[r] = rows[r].plane[plane];
      square[r] = x[r] * x[r];
      max.plane[plane] = larger(x[r], max.plane[plane]);
    }
    sum.plane[plane] += sum_pairs(x);
    sum_sq.plane[plane] += sum_pairs(square);
  }
  if (__builtin_expect(any_nonfinite(sum_sq.plane[0]) || any_nonfinite(sum_sq.plane[1]), 0)) {
    Block copy[n_rows];
    for (int r = 0; r < n_rows; ++r) copy[r] = rows[r];
    add_moments_carefully(m, copy, sum, sum_sq, max);
  } else {
    Float32::to_natural(m.part_sum, sum);
    Float32::to_natural(m.part_sum_sq, sum_sq);
    Float32::to_natural(m.max, max);
  }
  if (is_part_full) {
    flush_part(m.part_sum, m.sum);
    flush_part(m.part_sum_sq, m.sum_sq);
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
