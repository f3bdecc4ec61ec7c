// The inner loops of peaks and histogram on a CPU, compiled once per instruction set as
// swiglu_stats_kernel.cpp is. Rows are taken a few at a time, block of columns after block of columns:
// what is known of the columns of a range stays in cache until the segment's rows are done.
#include "peaks.h"

#include "elements.h"
#include "swiglu_stats_activation.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// As in pair_stats: more rows of one column push each other out of the first-level cache.
constexpr int64_t chunk_rows = 16;
// Columns at a time, with 16 bytes each of what is known of them.
constexpr int64_t range_width = 1024;
// Columns from those at hand to those that are fetched.
constexpr int64_t ahead = 4 * block_width;

// ---- The site's values

// Rows of a chunk, from the first column of a range on; `up` as `gate` where the site needs none.
template <typename Storage>
struct Rows {
  const Storage* gate[chunk_rows];
  const Storage* up[chunk_rows];
  int64_t t[chunk_rows];
  int64_t n;
};

// A block of the site's values of one row. The site up is the site gate of another tensor.
template <typename Element, Site site, Activation activation>
RELNEURON_INLINE Block site_values(const Rows<typename Element::Storage>& rows, int64_t r, int64_t at,
                                   const float* act_table) {
  Block x = Element::load_block(rows.gate[r] + at);
  if constexpr (site == site_gate) return x;
  if constexpr (Element::is_half) {
    U32 index[2];
    Element::load_indices(rows.gate[r] + at, index);
    for (int i = 0; i < 2; ++i) x.plane[i] = look_up(act_table, index[i]);
  } else {
    for (F32& plane : x.plane) plane = activate<activation>(plane);
  }
  if constexpr (site == site_act) return x;
  const Block up = Element::load_block(rows.up[r] + at);
  for (int i = 0; i < 2; ++i) {
    x.plane[i] = Element::exact(Element::round(x.plane[i] * up.plane[i]));
  }
  return x;
}

template <typename Storage>
Rows<Storage> take_rows(const SwigluStatsArgs& args, const PeaksPlan& plan, int64_t begin,
                        int64_t end, int64_t f) {
  const bool is_up = args.sites[0] == site_up;
  const auto* const gate = static_cast<const Storage*>(is_up ? args.up : args.gate);
  const auto* const up = static_cast<const Storage*>(args.up ? args.up : args.gate);
  const int64_t stride_gt = is_up ? args.stride_ut : args.stride_gt;
  const int64_t stride_ut = args.up ? args.stride_ut : args.stride_gt;
  Rows<Storage> rows;
  rows.n = end - begin < chunk_rows ? end - begin : chunk_rows;
  for (int64_t r = 0; r < rows.n; ++r) {
    const int64_t t = plan.rows ? plan.rows[begin + r] : begin + r;
    rows.gate[r] = gate + t * stride_gt + f;
    rows.up[r] = up + t * stride_ut + f;
    rows.t[r] = t;
  }
  return rows;
}

// The last columns of a range in a block of their own, filled up with zeros.
template <typename Storage>
struct Rest {
  Storage values[2][chunk_rows][block_width] = {};

  Rows<Storage> copy(const Rows<Storage>& from, int64_t at, int64_t n_columns) {
    Rows<Storage> rows = from;
    for (int64_t r = 0; r < from.n; ++r) {
      const size_t n_bytes = static_cast<size_t>(n_columns) * sizeof(Storage);
      memcpy(values[0][r], from.gate[r] + at, n_bytes);
      memcpy(values[1][r], from.up[r] + at, n_bytes);
      rows.gate[r] = values[0][r] - at;
      rows.up[r] = values[1][r] - at;
    }
    return rows;
  }
};

// Visits the blocks of a chunk of rows: visit(rows, at, n_columns). The rows that come next are
// fetched meanwhile, if there are any.
template <bool has_up, typename Storage, typename Visit>
RELNEURON_INLINE void for_each_block(const Rows<Storage>& rows, const Rows<Storage>& next,
                                     int64_t width, Visit visit) {
  int64_t at = 0;
  for (; at + block_width <= width; at += block_width) {
    const bool is_here = at + ahead < width;
    const Rows<Storage>& from = is_here ? rows : next;
    const int64_t place = at + ahead - (is_here ? 0 : width);
    for (int64_t r = 0; r < from.n; ++r) {
      for (size_t line = 0; line < block_width * sizeof(Storage); line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(from.gate[r] + place) + line, 0, 3);
        if (has_up) {
          __builtin_prefetch(reinterpret_cast<const char*>(from.up[r] + place) + line, 0, 3);
        }
      }
    }
    visit(rows, at, block_width);
  }
  if (at == width) return;
  Rest<Storage> rest;
  visit(rest.copy(rows, at, width - at), at, width - at);
}

// ---- peaks

// What is known of a vector of columns in the rows of a segment so far.
struct Known {
  F32 best = splat(-__builtin_inff());
  U32 row = splat(~0u);  // of the first one with that value, all bits set = none
  // Of a search among gates: the largest one below the best, and the smallest of all.
  F32 second = splat(-__builtin_inff()), smallest = splat(__builtin_inff());
};

// Of a range of columns, in planes; a block's vectors stand together.
struct Memory {
  Known known[range_width / n_lanes];
};

RELNEURON_INLINE void add(Known& known, F32 x, U32 row) {
  keep_larger(known.best, known.row, x, row);
}

// NaN is in none of the four. Equal gates are common in 16 bits alone; elsewhere the second one may be
// as large as the best, which then is not decided.
template <bool is_half>
RELNEURON_INLINE void add_gate(Known& known, F32 x, U32 row) {
  F32 lesser = smaller(known.best, x);
  if constexpr (is_half) lesser = x == known.best ? splat(-__builtin_inff()) : lesser;
  known.second = larger(lesser, known.second);
  known.smallest = smaller(x, known.smallest);
  keep_larger(known.best, known.row, x, row);
}

template <typename Element, Activation activation>
RELNEURON_INLINE Block act_of(const Block& gate, const float* act_table) {
  Block act;
  if constexpr (Element::is_half) {
    U32 packed[1];
    Element::pack(gate, packed);
    uint16_t gates[block_width];
    store(gates, packed[0]);
    U32 index[2];
    Element::load_indices(gates, index);
    for (int i = 0; i < 2; ++i) act.plane[i] = look_up(act_table, index[i]);
  } else {
    for (int i = 0; i < 2; ++i) act.plane[i] = activate<activation>(gate.plane[i]);
  }
  return act;
}

// Whether the best gates have the largest acts of all, which then take their places. act falls, then
// rises, so between the second and the smallest gate it is nowhere above the larger one of their acts.
// In 16 bits, where every act is known, that is so of the rounded acts, too. In float32 the best one
// must be larger by more than any computed act is off: relative 2^-12 (reference.py states 2^-16), and
// 2^-120 where it may be subnormal.
template <typename Element, Activation activation>
RELNEURON_INLINE bool are_decided(Known* known, const float* act_table) {
  const auto acts = [&](F32 Known::* gate) RELNEURON_LAMBDA {
    return act_of<Element, activation>({known[0].*gate, known[1].*gate}, act_table);
  };
  const Block best = acts(&Known::best), second = acts(&Known::second);
  Block other = acts(&Known::smallest);
  uint64_t are_sure = ~uint64_t{0};
  for (int i = 0; i < 2; ++i) {
    F32 x = other.plane[i];
    x = x == x ? x : F32{};  // of -inf, from which act begins at -0
    x = larger(x, second.plane[i]);  // NaN where there is no second one
    if constexpr (!Element::is_half) x = x + magnitude_of(x) * 0x1p-12f + 0x1p-120f;
    are_sure &= top_bits(best.plane[i] > x);
    known[i].best = best.plane[i];
  }
  return are_sure == (uint64_t{1} << n_lanes) - 1;
}

template <typename Element, Site site, Activation activation>
constexpr bool searches_gates = site == site_act && (Element::is_half ||
    (activation != Activation::relu && activation != Activation::relu2));

// The first row of -inf in the columns where no value is larger.
template <typename Element, Site site, Activation activation>
__attribute__((noinline, cold)) void find_minus_infinity(const SwigluStatsArgs& args,
                                                         const PeaksPlan& plan, int64_t begin,
                                                         int64_t end, int64_t f, int64_t at,
                                                         int64_t n_columns, Known* known) {
  using Storage = typename Element::Storage;
  for (int64_t first = end - (end - begin - 1) % chunk_rows - 1; first >= begin;
       first -= chunk_rows) {
    Rest<Storage> rest;
    const Rows<Storage> rows =
        rest.copy(take_rows<Storage>(args, plan, first, end, f), at, n_columns);
    for (int64_t r = rows.n - 1; r >= 0; --r) {
      const Block x = site_values<Element, site, activation>(rows, r, at, plan.act_table);
      for (int i = 0; i < 2; ++i) {
        const auto is_first = (known[i].best == -__builtin_inff()) & (x.plane[i] == -__builtin_inff());
        known[i].row = is_first ? splat(static_cast<uint32_t>(rows.t[r])) : known[i].row;
      }
    }
  }
}

// A block of which the gates did not decide, from its values.
template <typename Element, Site site, Activation activation>
__attribute__((noinline)) void search_values(const SwigluStatsArgs& args, const PeaksPlan& plan,
                                             int64_t begin, int64_t end, int64_t f, int64_t at,
                                             int64_t n_columns, Known* known) {
  using Storage = typename Element::Storage;
  known[0] = known[1] = Known{};
  for (int64_t first = begin; first < end; first += chunk_rows) {
    Rest<Storage> rest;
    const Rows<Storage> from = take_rows<Storage>(args, plan, first, end, f);
    const Rows<Storage> rows = n_columns == block_width ? from : rest.copy(from, at, n_columns);
    for (int64_t r = 0; r < rows.n; ++r) {
      const Block x = site_values<Element, site, activation>(rows, r, at, plan.act_table);
      const U32 row = splat(static_cast<uint32_t>(rows.t[r]));
      for (int i = 0; i < 2; ++i) add(known[i], x.plane[i], row);
    }
  }
}

// Joins the peaks of a block to those of its segment, from column `cell` on.
template <typename Element>
RELNEURON_INLINE void join(const PeaksArgs& args, int64_t cell, int64_t n_columns,
                           const Known* known) {
  float value[block_width], row[block_width];
  float old_value[block_width];
  uint32_t old_position[block_width];
  const size_t n_bytes = 4 * static_cast<size_t>(n_columns);
  Element::to_natural(value, {known[0].best, known[1].best});
  Element::to_natural(row, {float_of(known[0].row), float_of(known[1].row)});
  memcpy(old_value, args.values + cell, n_bytes);
  memcpy(old_position, args.positions + cell, n_bytes);
  for (int at = 0; at < block_width; at += n_lanes) {
    const F32 x = load<F32>(value + at) + 0.0f;  // turns -0 into +0
    const F32 old = load<F32>(old_value + at);
    // All bits set, of no row, stay so; as a position without a sign it is behind all others.
    const U32 t = load<U32>(row + at), place = load<U32>(old_position + at);
    const U32 position = t == ~0u ? t : t + static_cast<uint32_t>(args.first_row);
    const I32 is_better = (x > old) | ((x == old) & (position < place));
    store(old_value + at, is_better ? x : old);
    store(old_position + at, is_better ? position : place);
  }
  memcpy(args.values + cell, old_value, n_bytes);
  memcpy(args.positions + cell, old_position, n_bytes);
}

template <typename Element, Site site, Activation activation>
void peaks_columns(const PeaksArgs& args, const PeaksPlan& plan, int64_t f_begin, int64_t f_end) {
  using Storage = typename Element::Storage;
  constexpr bool has_gates = searches_gates<Element, site, activation>;
  const SwigluStatsArgs& in = args.site;
  Memory memory;
  for (int64_t f = f_begin; f < f_end; f += range_width) {
    const int64_t width = f_end - f < range_width ? f_end - f : range_width;
    for (int64_t segment = 0; segment < in.G; ++segment) {
      const int64_t begin = plan.begins[segment], end = plan.begins[segment + 1];
      if (begin == end) continue;
      Rows<Storage> next = take_rows<Storage>(in, plan, begin, end, f);
      for (int64_t first = begin; first < end; first += chunk_rows) {
        const Rows<Storage> rows = next;
        const int64_t after = first + rows.n;
        next = take_rows<Storage>(in, plan, after < end ? after : begin, end, f);
        const auto add_block = [&](const Rows<Storage>& own, int64_t at, int64_t) RELNEURON_LAMBDA {
          Known* const known = memory.known + at / n_lanes;
          Known x[2];
          if (first > begin) {
            x[0] = known[0];
            x[1] = known[1];
          }
          for (int64_t r = 0; r < own.n; ++r) {
            const U32 row = splat(static_cast<uint32_t>(own.t[r]));
            constexpr Site read = has_gates ? site_gate : site;
            const Block value = site_values<Element, read, activation>(own, r, at, plan.act_table);
            for (int i = 0; i < 2; ++i) {
              if constexpr (has_gates) {
                add_gate<Element::is_half>(x[i], value.plane[i], row);
              } else {
                add(x[i], value.plane[i], row);
              }
            }
          }
          known[0] = x[0];
          known[1] = x[1];
        };
        for_each_block<site == site_product>(rows, next, width, add_block);
      }
      for (int64_t at = 0; at < width; at += block_width) {
        const int64_t n_columns = width - at < block_width ? width - at : block_width;
        Known* const known = memory.known + at / n_lanes;
        if constexpr (has_gates) {
          if (!are_decided<Element, activation>(known, plan.act_table)) {
            search_values<Element, site, activation>(in, plan, begin, end, f, at, n_columns, known);
          }
        }
        const auto is_open = [&](int i) { return top_bits(reinterpret_cast<I32>(known[i].row)); };
        if (__builtin_expect(is_open(0) || is_open(1), 0)) {
          find_minus_infinity<Element, site, activation>(in, plan, begin, end, f, at, n_columns,
                                                         known);
        }
        join<Element>(args, segment * in.F + f + at, n_columns, known);
      }
    }
  }
}

// ---- histogram

// Of a block of columns, in planes.
struct Bins {
  F32 scale[2];  // 2^-exponent
  F32 first[2];
};

template <typename Element>
Bins load_bins(const HistogramArgs& args, int64_t f, int64_t n_columns) {
  float scale[block_width] = {}, first[block_width] = {};
  for (int64_t i = 0; i < n_columns; ++i) {
    const uint32_t bits = static_cast<uint32_t>(127 - args.exponent[f + i]) << 23;
    memcpy(scale + i, &bits, sizeof bits);
    first[i] = static_cast<float>(args.first[f + i]);
  }
  const Block scales = Element::from_natural(scale), firsts = Element::from_natural(first);
  return {{scales.plane[0], scales.plane[1]}, {firsts.plane[0], firsts.plane[1]}};
}

// The bins of values, as integers in [0, B); of NaN any.
RELNEURON_INLINE U32 bin_of(F32 x, F32 scale, F32 first, float last) {
  // Bounded first, which changes no bin, so that `floor_of` takes it.
  F32 place = larger(x * scale, first - 1.0f);
  place = floor_of(smaller(place, first + (last + 1.0f)));
  // The product of a small negative number may have become -0.
  place = x < 0.0f ? smaller(place, splat(-1.0f)) : place;
  place = smaller(larger(place - first, F32{}), splat(last));
  return reinterpret_cast<U32>(__builtin_convertvector(place, I32));
}

// Bytes of the counts of a range of columns, in the second-level cache.
constexpr int64_t counts_bytes = 256 << 10;

template <typename Element, Site site, Activation activation>
void histogram_columns(const HistogramArgs& args, const PeaksPlan& plan, int64_t f_begin,
                       int64_t f_end) {
  using Storage = typename Element::Storage;
  const SwigluStatsArgs& in = args.site;
  const float last = static_cast<float>(args.B - 1);
  const int64_t n_fit = counts_bytes / (8 * args.B * block_width) * block_width;
  const int64_t n_columns = n_fit < block_width ? block_width
                            : n_fit < range_width ? n_fit : range_width;
  Bins bins[range_width / block_width];
  for (int64_t f = f_begin; f < f_end; f += n_columns) {
    const int64_t width = f_end - f < n_columns ? f_end - f : n_columns;
    for (int64_t at = 0; at < width; at += block_width) {
      const int64_t rest = width - at < block_width ? width - at : block_width;
      bins[at / block_width] = load_bins<Element>(args, f + at, rest);
    }
    for (int64_t group = 0; group < in.G; ++group) {
      const int64_t begin = plan.begins[group], end = plan.begins[group + 1];
      int64_t* const counts = args.counts + (group * in.F + f) * args.B;
      if (begin == end) continue;
      Rows<Storage> next = take_rows<Storage>(in, plan, begin, end, f);
      for (int64_t first = begin; first < end; first += chunk_rows) {
        const Rows<Storage> rows = next;
        const int64_t after = first + rows.n;
        next = take_rows<Storage>(in, plan, after < end ? after : begin, end, f);
        const auto count = [&](const Rows<Storage>& own, int64_t at, int64_t n) RELNEURON_LAMBDA {
          const Bins& own_bins = bins[at / block_width];
          int64_t* const cells = counts + at * args.B;
          for (int64_t r = 0; r < own.n; ++r) {
            const Block x = site_values<Element, site, activation>(own, r, at, plan.act_table);
            uint32_t bin[2][n_lanes];
            uint64_t is_nan[2];
            for (int i = 0; i < 2; ++i) {
              store(bin[i], bin_of(x.plane[i], own_bins.scale[i], own_bins.first[i], last));
              is_nan[i] = top_bits(x.plane[i] != x.plane[i]);
            }
            const bool is_plain = n == block_width && !(is_nan[0] | is_nan[1]);
            for (int plane = 0; plane < 2; ++plane) {
              for (int lane = 0; lane < n_lanes; ++lane) {
                const int column = Element::column(plane, lane);
                if (!is_plain && (column >= n || (is_nan[plane] >> lane & 1))) continue;
                cells[column * args.B + bin[plane][lane]] += 1;
              }
            }
          }
        };
        for_each_block<site == site_product>(rows, next, width, count);
      }
    }
  }
}

// ---- Which of the loops it is

template <typename Element, Site site, Activation activation>
struct PeaksLoop {
  static constexpr auto function = peaks_columns<Element, site, activation>;
};
template <typename Element, Site site, Activation activation>
struct HistogramLoop {
  static constexpr auto function = histogram_columns<Element, site, activation>;
};

// All activations, in the order of their numbers, so that a table has one entry for each.
template <Activation... each>
struct List {};
using Activations =
    List<Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu,
         Activation::relu2, Activation::quick_gelu, Activation::tanh>;

template <template <typename, Site, Activation> class Loop, Activation... each>
auto pick_float(List<each...>, Site site, Activation activation) {
  using Function = decltype(Loop<Float32, site_gate, Activation::silu>::function);
  constexpr Function act[] = {Loop<Float32, site_act, each>::function...};
  constexpr Function product[] = {Loop<Float32, site_product, each>::function...};
  if (site == site_act) return act[static_cast<int>(activation)];
  if (site == site_product) return product[static_cast<int>(activation)];
  return Function{Loop<Float32, site_gate, Activation::silu>::function};
}

// 16-bit types look the activation up, so the same loops serve all of them.
template <template <typename, Site, Activation> class Loop, typename Element>
auto pick_half(Site site) {
  if (site == site_act) return Loop<Element, site_act, Activation::silu>::function;
  if (site == site_product) return Loop<Element, site_product, Activation::silu>::function;
  return Loop<Element, site_gate, Activation::silu>::function;
}

template <template <typename, Site, Activation> class Loop, typename Args>
void columns(const Args& args, const PeaksPlan& plan, int64_t f_begin, int64_t f_end) {
  const auto site = static_cast<Site>(args.site.sites[0]);
  const auto run = args.site.dtype == DType::bfloat16  ? pick_half<Loop, BFloat16>(site)
                   : args.site.dtype == DType::float16 ? pick_half<Loop, Float16>(site)
                                                       : pick_float<Loop>(Activations{}, site,
                                                                          args.site.activation);
  run(args, plan, f_begin, f_end);
}

}  // namespace

const PeaksKernel peaks_kernel = {columns<PeaksLoop, PeaksArgs>,
                                  columns<HistogramLoop, HistogramArgs>};

}  // namespace RELNEURON_ISA
}  // namespace relneuron
