// The inner loops of pair_stats on a CPU, compiled once per instruction set as swiglu_stats_kernel.cpp
// is. A chunk of tokens is added up in registers, block of columns after block of columns, and joins
// the statistics of its group: nothing else is written.
#include "pair_stats.h"

#include "elements.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

constexpr int n_sites = 3;  // a, b and the difference, by their numbers

// Columns at a time, so that their statistics of a group (84 bytes each) stay in the second-level
// cache from chunk to chunk.
constexpr int64_t range_width = 2048;
// Columns from those at hand to those that are fetched.
constexpr int64_t ahead = 4 * block_width;

// The rows of a chunk, from the first column of a range on.
template <typename Storage>
struct Pair {
  const Storage* a[chunk_rows];
  const Storage* b[chunk_rows];
};

// One site in a vector of columns, over the rows of a chunk.
struct Sums {
  U32 count = {};
  F32 sum = {}, sum_sq = {}, max = splat(-__builtin_inff());
};

// The statistics of one site, from the first column of a block on.
struct Cells {
  int64_t* count = nullptr;  // null: the site is not recorded
  double* sum = nullptr;
  double* sum_sq = nullptr;
  float* max = nullptr;
  int64_t* n_nonfinite = nullptr;
};

// The values of n_rows tokens; they are added among themselves first, which rounds less.
template <bool has_moments, int n_rows>
RELNEURON_INLINE void add(Sums& sums, const F32 (&x)[n_rows], F32 threshold) {
  for (const F32& value : x) sums.count = add_where_greater(sums.count, value, threshold, 1u);
  if constexpr (!has_moments) return;
  F32 sum = x[0], sum_sq = x[0] * x[0];
  for (int r = 1; r < n_rows; ++r) {
    sum += x[r];
    sum_sq = add_square(sum_sq, x[r]);
  }
  for (const F32& value : x) sums.max = larger(value, sums.max);
  sums.sum += sum;
  sums.sum_sq += sum_sq;
}

template <typename Element, int plane, bool has_moments, bool only_difference, int n_rows>
RELNEURON_INLINE void add_rows(Sums (&sums)[n_sites], const Pair<typename Element::Storage>& rows,
                               int64_t r, int64_t at, F32 threshold) {
  F32 a[n_rows], b[n_rows], difference[n_rows];
  for (int i = 0; i < n_rows; ++i) {
    a[i] = Element::load_block(rows.a[r + i] + at).plane[plane];
    b[i] = Element::load_block(rows.b[r + i] + at).plane[plane];
    difference[i] = a[i] - b[i];
  }
  add<has_moments>(sums[site_act], difference, threshold);
  if constexpr (only_difference) return;
  add<has_moments>(sums[site_gate], a, threshold);
  add<has_moments>(sums[site_up], b, threshold);
}

// The rows of a chunk in one plane of a block; `next` are the rows to fetch meanwhile, from `next_at`.
template <typename Element, int plane, bool has_moments, bool only_difference>
RELNEURON_INLINE void add_plane(Sums (&sums)[n_sites], const Pair<typename Element::Storage>& rows,
                                int64_t n_rows, int64_t at, float threshold,
                                const Pair<typename Element::Storage>& next, int64_t next_at) {
  constexpr int64_t block_bytes = block_width * sizeof(typename Element::Storage);
  const auto fetch = [&](const typename Element::Storage* row) RELNEURON_LAMBDA {
    const char* const from = reinterpret_cast<const char*>(row + next_at);
    for (int64_t line = 0; line < block_bytes; line += 64) __builtin_prefetch(from + line, 0, 3);
  };
  Sums own[n_sites];
  int64_t r = 0;
  for (; r + 4 <= n_rows; r += 4) {
    for (int i = 0; plane == 0 && i < 4; ++i) {
      fetch(next.a[r + i]);
      fetch(next.b[r + i]);
    }
    add_rows<Element, plane, has_moments, only_difference, 4>(own, rows, r, at, splat(threshold));
  }
  if (r + 2 <= n_rows) {
    add_rows<Element, plane, has_moments, only_difference, 2>(own, rows, r, at, splat(threshold));
    r += 2;
  }
  if (r < n_rows) {
    add_rows<Element, plane, has_moments, only_difference, 1>(own, rows, r, at, splat(threshold));
  }
  for (int site = 0; site < n_sites; ++site) sums[site] = own[site];
}

RELNEURON_INLINE void add_wide(double* to, const float* from) {
  for (int at = 0; at < block_width; at += n_lanes) {
    const F32 x = load<F32>(from + at);
    constexpr int half = n_lanes / 2;
    store(to + at, load<F64>(to + at) + widen<0>(x));
    store(to + at + half, load<F64>(to + at + half) + widen<1>(x));
  }
}

// One plane of a site of which some value is NaN, infinite, or too large for its square. The columns
// that have none get what they would have got; the others go to float64.
template <typename Element>
__attribute__((noinline, cold)) void add_carefully(const Cells& cells, int plane,
                                                   const float (*values)[n_lanes], int64_t n_rows) {
  for (int lane = 0; lane < n_lanes; ++lane) {
    const int column = Element::column(plane, lane);
    float sum = 0, sum_sq = 0, max = cells.max[column];
    for (int64_t r = 0; r < n_rows;) {
      const int64_t n = n_rows - r < 2 ? 1 : n_rows - r < 4 ? 2 : 4;
      float part = values[r][lane], part_sq = part * part;
      for (int64_t i = 1; i < n; ++i) {
        const float x = values[r + i][lane];
        part += x;
        part_sq = __builtin_fmaf(x, x, part_sq);
      }
      sum += part;
      sum_sq += part_sq;
      r += n;
    }
    const bool is_plain = is_finite(sum_sq);
    double wide = is_plain ? sum : 0.0, wide_sq = is_plain ? sum_sq : 0.0;
    for (int64_t r = 0; r < n_rows; ++r) {
      const float x = values[r][lane];
      if (!is_finite(x)) {
        cells.n_nonfinite[column] += 1;
        continue;
      }
      max = x > max ? x : max;
      if (is_plain) continue;
      const double exact = x;
      wide += exact;
      wide_sq += exact * exact;
    }
    cells.sum[column] += wide;
    cells.sum_sq[column] += wide_sq;
    cells.max[column] = max + 0.0f;
  }
}

template <typename Element>
RELNEURON_INLINE void flush_moments(const Cells& cells, const Sums& first, const Sums& second) {
  float natural[block_width];
  Element::to_natural(natural, {first.sum, second.sum});
  add_wide(cells.sum, natural);
  Element::to_natural(natural, {first.sum_sq, second.sum_sq});
  add_wide(cells.sum_sq, natural);
  Element::to_natural(natural, {first.max, second.max});
  for (int at = 0; at < block_width; at += n_lanes) {
    // Adding +0 turns -0 into +0.
    const F32 max = larger(load<F32>(natural + at), load<F32>(cells.max + at)) + 0.0f;
    store(cells.max + at, max);
  }
}

// One block of columns of a chunk; `next` are the rows to fetch meanwhile, from `next_at` on.
template <typename Element, bool has_moments, bool only_difference>
RELNEURON_INLINE void do_block(const Pair<typename Element::Storage>& rows, int64_t n_rows,
                               int64_t at, const Cells (&cells)[n_sites], float threshold,
                               const Pair<typename Element::Storage>& next, int64_t next_at) {
  Sums sums[2][n_sites];
  add_plane<Element, 0, has_moments, only_difference>(sums[0], rows, n_rows, at, threshold, next,
                                                      next_at);
  add_plane<Element, 1, has_moments, only_difference>(sums[1], rows, n_rows, at, threshold, next,
                                                      next_at);
  for (int site = 0; site < n_sites; ++site) {
    if (!cells[site].count) continue;
    const Sums &first = sums[0][site], &second = sums[1][site];
    add_hits<Element>(cells[site].count, first.count, second.count);
    if constexpr (!has_moments) continue;
    if (__builtin_expect(any_nonfinite(first.sum_sq) || any_nonfinite(second.sum_sq), 0)) {
      for (int plane = 0; plane < 2; ++plane) {
        float values[chunk_rows][n_lanes];
        for (int64_t r = 0; r < n_rows; ++r) {
          const F32 a = Element::load_block(rows.a[r] + at).plane[plane];
          const F32 b = Element::load_block(rows.b[r] + at).plane[plane];
          store(values[r], site == site_gate ? a : site == site_up ? b : a - b);
        }
        add_carefully<Element>(cells[site], plane, values, n_rows);
      }
    } else {
      flush_moments<Element>(cells[site], first, second);
    }
  }
}

// The last columns in a block of their own, filled up with zeros.
template <typename Element, bool has_moments, bool only_difference>
__attribute__((noinline)) void do_rest(const Pair<typename Element::Storage>& rows, int64_t n_rows,
                                       int64_t at, int64_t n_columns,
                                       const Cells (&cells)[n_sites], float threshold) {
  using Storage = typename Element::Storage;
  Storage values[2][chunk_rows][block_width] = {};
  Pair<Storage> rest;
  for (int64_t r = 0; r < n_rows; ++r) {
    const size_t n_bytes = static_cast<size_t>(n_columns) * sizeof(Storage);
    memcpy(values[0][r], rows.a[r] + at, n_bytes);
    memcpy(values[1][r], rows.b[r] + at, n_bytes);
    rest.a[r] = values[0][r];
    rest.b[r] = values[1][r];
  }
  struct {
    int64_t count[block_width], n_nonfinite[block_width];
    double sum[block_width], sum_sq[block_width];
    float max[block_width];
  } own[n_sites] = {};
  Cells to[n_sites];
  for (int site = 0; site < n_sites; ++site) {
    if (!cells[site].count) continue;
    to[site] = {own[site].count, own[site].sum, own[site].sum_sq, own[site].max,
                own[site].n_nonfinite};
    for (int64_t i = 0; has_moments && i < n_columns; ++i) {
      own[site].sum[i] = cells[site].sum[i];
      own[site].sum_sq[i] = cells[site].sum_sq[i];
      own[site].max[i] = cells[site].max[i];
    }
  }
  do_block<Element, has_moments, only_difference>(rest, n_rows, 0, to, threshold, rest, 0);
  for (int site = 0; site < n_sites; ++site) {
    for (int64_t i = 0; cells[site].count && i < n_columns; ++i) {
      cells[site].count[i] += own[site].count[i];
      if constexpr (!has_moments) continue;
      cells[site].sum[i] = own[site].sum[i];
      cells[site].sum_sq[i] = own[site].sum_sq[i];
      cells[site].max[i] = own[site].max[i];
      cells[site].n_nonfinite[i] += own[site].n_nonfinite[i];
    }
  }
}

template <typename Element, bool has_moments, bool only_difference>
void run_columns(const SwigluStatsArgs& args, const PairStatsPlan& plan, int64_t f_begin,
                 int64_t f_end) {
  using Storage = typename Element::Storage;
  float threshold;
  memcpy(&threshold, &args.threshold_bits, sizeof threshold);
  const auto take_rows = [&](const Chunk& chunk, int64_t f, Pair<Storage>& rows) {
    for (int64_t r = 0; r < chunk_rows; ++r) {
      const int64_t place = chunk.begin + (r < chunk.n_rows ? r : chunk.n_rows - 1);
      const int64_t t = plan.rows ? plan.rows[place] : place;
      rows.a[r] = static_cast<const Storage*>(args.gate) + t * args.stride_gt + f;
      rows.b[r] = static_cast<const Storage*>(args.up) + t * args.stride_ut + f;
    }
  };
  const int64_t n_columns = f_end - f_begin;
  const int64_t n_ranges = (n_columns + range_width - 1) / range_width;
  const int64_t n_blocks = (n_columns + block_width - 1) / block_width;
  for (int64_t range = 0; range < n_ranges; ++range) {
    const int64_t f = f_begin + n_blocks * range / n_ranges * block_width;
    const int64_t f_next = f_begin + n_blocks * (range + 1) / n_ranges * block_width;
    const int64_t width = (f_next < f_end ? f_next : f_end) - f;
    Pair<Storage> pairs[2];
    if (plan.n_chunks) take_rows(plan.chunks[0], f, pairs[0]);
    for (int64_t i = 0; i < plan.n_chunks; ++i) {
      const Chunk& chunk = plan.chunks[i];
      const Pair<Storage>& rows = pairs[i % 2];
      Pair<Storage>& next = pairs[(i + 1) % 2];
      take_rows(plan.chunks[i + 1 < plan.n_chunks ? i + 1 : i], f, next);
      Cells cells[n_sites];
      const auto cells_at = [&](int64_t at) RELNEURON_LAMBDA {
        for (int s = 0; s < args.n_sites; ++s) {
          const int64_t first = (s * args.G + chunk.group) * args.F + f + at;
          Cells& own = cells[args.sites[s]];
          own.count = args.count + first;
          if constexpr (!has_moments) continue;
          own.sum = args.sum + first;
          own.sum_sq = args.sum_sq + first;
          own.max = args.max + first;
          own.n_nonfinite = args.n_nonfinite + first;
        }
      };
      int64_t at = 0;
      for (; at + block_width <= width; at += block_width) {
        cells_at(at);
        const bool is_here = at + ahead < width;
        do_block<Element, has_moments, only_difference>(rows, chunk.n_rows, at, cells, threshold,
                                                        is_here ? rows : next,
                                                        at + ahead - (is_here ? 0 : width));
      }
      if (at < width) {
        cells_at(at);
        do_rest<Element, has_moments, only_difference>(rows, chunk.n_rows, at, width - at, cells,
                                                       threshold);
      }
    }
  }
}

template <typename Element>
void columns_of(const SwigluStatsArgs& args, const PairStatsPlan& plan, int64_t f_begin,
                int64_t f_end) {
  const bool only_difference = args.n_sites == 1 && args.sites[0] == site_act;
  constexpr decltype(&run_columns<Element, true, true>) table[2][2] = {
      {run_columns<Element, false, false>, run_columns<Element, false, true>},
      {run_columns<Element, true, false>, run_columns<Element, true, true>}};
  table[args.sum != nullptr][only_difference](args, plan, f_begin, f_end);
}

void columns(const SwigluStatsArgs& args, const PairStatsPlan& plan, int64_t f_begin,
             int64_t f_end) {
  constexpr decltype(&columns_of<Float32>) table[] = {columns_of<Float32>, columns_of<BFloat16>,
                                                      columns_of<Float16>};
  table[static_cast<int>(args.dtype)](args, plan, f_begin, f_end);
}

}  // namespace

const PairStatsKernel pair_stats_kernel = {columns};

}  // namespace RELNEURON_ISA
}  // namespace relneuron
