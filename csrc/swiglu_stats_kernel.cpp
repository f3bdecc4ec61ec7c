// The inner loops of swiglu_stats on a CPU, compiled once per instruction set (RELNEURON_ISA) from
// this one source. swiglu_stats.cpp calls it for each thread's columns. Include nothing here that
// has inline functions of its own: the linker would keep one copy for all instruction sets, maybe
// one that the processor cannot run.
#include "swiglu_stats.h"

#include "simd.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// ---- Element types. A block of 2 * n_lanes neighbouring columns is held as two vectors of float32,
// its planes. `load_block` is exact; `pack` takes values that `round` has made exact, and gives the
// elements in their natural order. `round` rounds to nearest even; NaN stays NaN: one that comes
// from 16-bit inputs has zeros in its lower half.

constexpr int block_width = 2 * n_lanes;

struct Block {
  F32 plane[2];
};

struct Float32 {
  using Storage = float;
  static constexpr bool is_half = false;
  static RELNEURON_INLINE Block load_block(const float* from) {
    return {load<F32>(from), load<F32>(from + n_lanes)};
  }
  static RELNEURON_INLINE F32 round(F32 x) { return x; }
  static RELNEURON_INLINE void pack(Block x, U32 (&packed)[2]) {
    for (int i = 0; i < 2; ++i) packed[i] = bits_of(x.plane[i]);
  }
  static RELNEURON_INLINE void keep(uint32_t bits, U32 (&packed)[2]) {
    packed[0] = where_bits(bits, packed[0]);
    packed[1] = where_bits(bits >> n_lanes, packed[1]);
  }
  // Plane 0 is the first half of the columns, plane 1 the second.
  static RELNEURON_INLINE Block from_natural(const float* from) { return load_block(from); }
  static RELNEURON_INLINE void to_natural(float* to, Block x) {
    store(to, x.plane[0]);
    store(to + n_lanes, x.plane[1]);
  }
  static constexpr int column(int plane, int lane) { return plane * n_lanes + lane; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr bool is_half = true;
  // Plane 0 is the even columns, plane 1 the odd ones: both halves of a 32-bit word are one
  // operation away from float32.
  static RELNEURON_INLINE Block load_block(const uint16_t* from) {
    const U32 pairs = load<U32>(from);
    return {float_of(pairs << 16), float_of(pairs & 0xffff0000u)};
  }
  static RELNEURON_INLINE void load_indices(const uint16_t* from, U32 (&index)[2]) {
    const U32 pairs = load<U32>(from);
    index[0] = pairs & 0xffffu;
    index[1] = pairs >> 16;
  }
  static RELNEURON_INLINE F32 round(F32 x) {
    const U32 up = bits_of(x) + 0x8000u;
    const U32 even = up & 0xfffe0000u;
    return float_of(((up & 0xffffu) == 0 ? even : up) & 0xffff0000u);
  }
  static RELNEURON_INLINE void pack(Block x, U32 (&packed)[1]) {
    packed[0] = (bits_of(x.plane[0]) >> 16) | (bits_of(x.plane[1]) & 0xffff0000u);
  }
  static RELNEURON_INLINE void keep(uint32_t bits, U32 (&packed)[1]) {
    packed[0] = where_bits_16(bits, packed[0]);
  }
  static RELNEURON_INLINE Block from_natural(const float* from) {
    Block x;
    for (int lane = 0; lane < n_lanes; ++lane) {
      x.plane[0][lane] = from[2 * lane];
      x.plane[1][lane] = from[2 * lane + 1];
    }
    return x;
  }
  static RELNEURON_INLINE void to_natural(float* to, Block x) {
    for (int lane = 0; lane < n_lanes; ++lane) {
      to[2 * lane] = x.plane[0][lane];
      to[2 * lane + 1] = x.plane[1][lane];
    }
  }
  static constexpr int column(int plane, int lane) { return 2 * lane + plane; }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr bool is_half = true;
  static RELNEURON_INLINE F32 widen(const uint16_t* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(load<__m128i>(from));
#else
    return widen_bits(load_wide(from));
#endif
  }
  static RELNEURON_INLINE F32 widen_bits(U32 x) {
    const U32 rest = x & 0x7fffu;
    // Below 0x400 the number is subnormal: rest * 2^-24, exact in float32.
    const F32 whole = __builtin_convertvector(reinterpret_cast<I32>(rest), F32);
    const U32 subnormal = bits_of(whole * 0x1p-24f);
    // Otherwise move the exponent from bias 15 to 127; infinity and NaN to the top exponent.
    const U32 top = reinterpret_cast<U32>(rest >= 0x7c00u) & (112u << 23);
    const U32 normal = (rest << 13) + (112u << 23) + top;
    return float_of(((x & 0x8000u) << 16) | (rest < 0x400u ? subnormal : normal));
  }
  static RELNEURON_INLINE U32 narrow_bits(F32 x) {
    const U32 bits = bits_of(x);
    const U32 rest = bits & 0x7fffffffu;
    // Below 2^-14 the result is a multiple of 2^-24, the spacing of float32 at 0.5.
    const U32 subnormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    const U32 normal = (rest + 0xfffu + ((rest >> 13) & 1u) - (112u << 23)) >> 13;
    U32 half = rest < 0x38800000u ? subnormal : normal;
    half = rest >= 0x47800000u ? splat(0x7c00u) : half;  // 65520 rounds up to 2^16 itself
    half = rest > 0x7f800000u ? splat(0x7e00u) : half;
    return ((bits >> 16) & 0x8000u) | half;
  }
  static RELNEURON_INLINE Block load_block(const uint16_t* from) {
    return {widen(from), widen(from + n_lanes)};
  }
  static RELNEURON_INLINE void load_indices(const uint16_t* from, U32 (&index)[2]) {
    index[0] = load_wide(from);
    index[1] = load_wide(from + n_lanes);
  }
  static RELNEURON_INLINE F32 round(F32 x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    return widen_bits(narrow_bits(x));
#endif
  }
  static RELNEURON_INLINE void pack(Block x, U32 (&packed)[1]) {
    U16 halves[2];
    for (int plane = 0; plane < 2; ++plane) {
#if defined(__AVX512F__)
      halves[plane] = reinterpret_cast<U16>(
          _mm512_cvtps_ph(x.plane[plane], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
      halves[plane] = reinterpret_cast<U16>(
          _mm256_cvtps_ph(x.plane[plane], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
      halves[plane] = __builtin_convertvector(narrow_bits(x.plane[plane]), U16);
#endif
    }
    packed[0] = load<U32>(halves);
  }
  static RELNEURON_INLINE void keep(uint32_t bits, U32 (&packed)[1]) {
    packed[0] = where_bits_16(bits, packed[0]);
  }
  static RELNEURON_INLINE Block from_natural(const float* from) {
    return Float32::load_block(from);
  }
  static RELNEURON_INLINE void to_natural(float* to, Block x) { Float32::to_natural(to, x); }
  static constexpr int column(int plane, int lane) { return plane * n_lanes + lane; }
};

// ---- The activation: one fixed sequence of float32 operations, the same in
// relneuron/ops/swiglu_stats_reference.py (which derives the constants and states the errors).

RELNEURON_INLINE F32 exp_f32(F32 x) {
  x = larger(splat(-104.0f), x);
  x = x > 89.0f ? splat(89.0f) : x;
  const F32 n = floor_of(x * 1.44269502f + 0.5f);
  F32 r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  F32 q = r * 0.001381448f + 0.00836877991f;
  q = q * r + 0.0416683927f;
  q = q * r + 0.166665196f;
  q = q * r + 0.49999994f;
  return times_power_of_2((q * (r * r) + r) + 1.0f, n);
}

RELNEURON_INLINE F32 gelu_f32(F32 x) {
  const F32 square = x * x;
  const F32 magnitude = float_of(bits_of(x) & 0x7fffffffu);
  const F32 t = 1.0f / ((magnitude * 0.707106769f) * 0.5f + 1.0f);
  F32 p = t * -0.161039799f + 0.379661053f;
  p = p * t + -0.0744687095f;
  p = p * t + -0.361406326f;
  p = p * t + 0.0677839294f;
  p = p * t + 0.030283194f;
  p = p * t + 0.385154188f;
  p = p * t + 0.998969734f;
  p = p * t + -1.26546896f;
  const F32 tail = (exp_f32(p - square * 0.5f) * t) * 0.5f;
  F32 q = square * -7.5445364e-06f + 0.000113185983f;
  q = q * square + -0.00118603115f;
  q = q * square + 0.00997319352f;
  q = q * square + -0.0664903373f;
  q = q * square + 0.398942292f;
  const F32 middle = x * q + 0.5f;
  const F32 right = x > 1.0f ? 1.0f - tail : middle;
  return x * (x < -1.0f ? tail : right);
}

template <Activation activation>
RELNEURON_INLINE F32 activate(F32 x) {
  if (activation == Activation::silu) {
    return x / (exp_f32(-x) + 1.0f);
  }
  if (activation == Activation::gelu_tanh) {
    const F32 y = (x + (x * x * x) * 0.0447149985f) * 0.797884583f;
    return x / (exp_f32(y * -2.0f) + 1.0f);
  }
  if (activation == Activation::gelu) {
    return gelu_f32(x);
  }
  return x < 0.0f ? F32{} : x;
}

// ---- What is kept in cache for a range of columns: one record per block, so that all of it is one
// stream of memory. Lane l of plane p of a block is its column Element::column(p, l).

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

// Tokens of a group that are added in float32 before float64 takes over. A part's rounding error is
// at most 15 x 2^-24 of the sum of its absolute values.
constexpr int part_rows = 16;

// Bytes for the statistics that a core should have in its first-level cache beside the rows.
constexpr int64_t cache_bytes = 64 << 10;
// Bounds of the columns taken at a time: short pieces of rows stream badly, and the next row's piece
// should fit in the first-level cache, too.
constexpr int64_t width_min = 1024, width_max = 4096;

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

template <int n_rows>
RELNEURON_INLINE void add_moments(Moments& m, const Block (&rows)[n_rows], bool is_part_full) {
  Block sum = Float32::load_block(m.part_sum);
  Block sum_sq = Float32::load_block(m.part_sum_sq);
  Block max = Float32::load_block(m.max);
  for (const Block& row : rows) {
    for (int plane = 0; plane < 2; ++plane) {
      const F32 x = row.plane[plane];
      sum.plane[plane] += x;
      sum_sq.plane[plane] += x * x;
      max.plane[plane] = larger(x, max.plane[plane]);
    }
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

// ---- Slots to and from the statistics. The moments of a slot begin as those of its group, so that
// every sum is taken in the order of the rows, whatever the segments are.

template <typename Element, typename Visit>
RELNEURON_INLINE void for_each_column(int64_t width, Visit visit) {
  for (int64_t at = 0; at < width; at += block_width) {
    for (int plane = 0; plane < 2; ++plane) {
      for (int lane = 0; lane < n_lanes; ++lane) {
        const int64_t column = at + Element::column(plane, lane);
        if (column < width) visit(column, at, plane, lane);
      }
    }
  }
}

template <typename Element>
void add_slot_counts(const SwigluStatsArgs& args, const Slot& slot, int64_t first, int64_t width) {
  for_each_column<Element>(width, [&](int64_t column, int64_t at, int plane, int lane) {
    const uint32_t pair = slot.counts(at).pair[lane];
    args.count[first + column] += plane ? pair >> 16 : pair & 0xffffu;
  });
}

template <typename Element>
void load_moments(const SwigluStatsArgs& args, const Slot& slot, int64_t first, int64_t width) {
  for_each_column<Element>(width, [&](int64_t column, int64_t at, int plane, int lane) {
    Moments& m = slot.moments(at);
    const int place = plane * n_lanes + lane;
    m.sum[place] = args.sum[first + column];
    m.sum_sq[place] = args.sum_sq[first + column];
    m.max[place] = args.max[first + column];
  });
}

template <typename Element>
void store_moments(const SwigluStatsArgs& args, const Slot& slot, int64_t first, int64_t width) {
  for (int64_t at = 0; at < width; at += block_width) {
    flush_part(slot.moments(at).part_sum, slot.moments(at).sum);
    flush_part(slot.moments(at).part_sum_sq, slot.moments(at).sum_sq);
  }
  for_each_column<Element>(width, [&](int64_t column, int64_t at, int plane, int lane) {
    const Moments& m = slot.moments(at);
    const int place = plane * n_lanes + lane;
    args.sum[first + column] = m.sum[place];
    args.sum_sq[first + column] = m.sum_sq[place];
    args.max[first + column] = m.max[place] + 0.0f;  // turns -0 into +0
    args.n_nonfinite[first + column] += m.n_nonfinite[place];
  });
}

// ---- Responses of the prompt at hand, in planes; loaded and written back when the prompt changes.

template <typename Element>
void move_response(float* row, float* planes, int64_t width, bool write) {
  int64_t at = 0;
  for (; at + block_width <= width; at += block_width) {
    if (write) {
      Element::to_natural(row + at, Float32::load_block(planes + at));
    } else {
      Float32::to_natural(planes + at, Element::from_natural(row + at));
    }
  }
  if (at == width) return;
  float rest[block_width] = {};
  const size_t rest_bytes = 4 * static_cast<size_t>(width - at);
  if (write) {
    Element::to_natural(rest, Float32::load_block(planes + at));
    memcpy(row + at, rest, rest_bytes);
  } else {
    memcpy(rest, row + at, rest_bytes);
    Float32::to_natural(planes + at, Element::from_natural(rest));
  }
}

// ---- Neighbouring rows of one range of columns, their tokens in the same group and prompt.

constexpr int n_rows_max = 4;

template <typename Storage>
struct Rows {
  const Storage* gate[n_rows_max];
  const Storage* up[n_rows_max];
  Storage* out[n_rows_max];
  const uint32_t* keep[n_rows_max];  // of the token's condition, from the first column of F on
};

struct Task {
  Slot slots[n_sites_max];        // by site, of the tokens' group
  bool is_counted[n_sites_max];   // by site
  float* responses[n_sites_max];  // by site, in planes of the range; null = none
  bool has_moments, has_keep, stream;
  bool is_part_full;              // after these rows
  float threshold;
  const float* act_table;
};

// `at` counts columns within the range, `f` within F; the rows begin at `at`.
template <typename Element, Activation activation, int n_rows>
RELNEURON_INLINE void do_block(const Task& task, const Rows<typename Element::Storage>& rows,
                               int64_t at, int64_t f) {
  Block act[n_rows], product[n_rows];
  for (int r = 0; r < n_rows; ++r) {
    if constexpr (activation == Activation::residual) {
      act[r] = Element::load_block(rows.gate[r] + at);
    } else if constexpr (Element::is_half) {
      U32 index[2];
      Element::load_indices(rows.gate[r] + at, index);
      for (int i = 0; i < 2; ++i) act[r].plane[i] = look_up(task.act_table, index[i]);
    } else {
      const Block gate = Element::load_block(rows.gate[r] + at);
      for (int i = 0; i < 2; ++i) act[r].plane[i] = activate<activation>(gate.plane[i]);
    }
    const Block up = Element::load_block(rows.up[r] + at);
    for (int i = 0; i < 2; ++i) {
      const F32 x = act[r].plane[i], y = up.plane[i];
      product[r].plane[i] = Element::round(activation == Activation::residual ? y + x : x * y);
    }
  }

  const auto record = [&](Site site, const Block (&value)[n_rows]) RELNEURON_LAMBDA {
    if (task.is_counted[site]) {
      add_counts(task.slots[site].counts(at), value, splat(task.threshold));
      if (task.has_moments) {
        add_moments(task.slots[site].moments(at), value, task.is_part_full);
      }
    }
    if (task.responses[site]) add_responses(task.responses[site] + at, value);
  };
  const auto record_input = [&](Site site, const typename Element::Storage* const* from)
      RELNEURON_LAMBDA {
    if (!task.is_counted[site] && !task.responses[site]) return;
    Block value[n_rows];
    for (int r = 0; r < n_rows; ++r) value[r] = Element::load_block(from[r] + at);
    record(site, value);
  };
  if constexpr (activation == Activation::residual) {
    record(site_gate, act);
  } else {
    record_input(site_gate, rows.gate);
    record_input(site_up, rows.up);
    record(site_act, act);
    record(site_product, product);
  }

  for (int r = 0; r < n_rows; ++r) {
    U32 packed[block_width * sizeof(typename Element::Storage) / sizeof(U32)];
    Element::pack(product[r], packed);
    if (task.has_keep) {
      const uint32_t bits = rows.keep[r][f / 32] >> (f % 32);
      if constexpr (activation == Activation::residual) {
        // Where the neuron is dropped the residual alone is left.
        U32 rest[sizeof packed / sizeof(U32)];
        memcpy(rest, rows.up[r] + at, sizeof rest);
        Element::keep(bits, packed);
        Element::keep(~bits, rest);
        for (size_t i = 0; i < sizeof packed / sizeof(U32); ++i) packed[i] |= rest[i];
      } else {
        Element::keep(bits, packed);
      }
    }
    for (size_t i = 0; i < sizeof packed / sizeof(U32); ++i) {
      void* const to = reinterpret_cast<U32*>(rows.out[r] + at) + i;
      if (task.stream) {
        stream(to, packed[i]);
      } else {
        store(to, packed[i]);
      }
    }
  }
}

// The rows after these, to be fetched meanwhile, are `next_gate` and `next_up` elements away.
template <typename Element, Activation activation, int n_rows>
void do_rows(const Task& task, const Rows<typename Element::Storage>& rows, int64_t f,
             int64_t width, int64_t next_gate, int64_t next_up) {
  using Storage = typename Element::Storage;
  int64_t at = 0;
  for (; at + block_width <= width; at += block_width) {
    for (int r = 0; r < n_rows; ++r) {
      const char* const gate = reinterpret_cast<const char*>(rows.gate[r] + at + next_gate);
      const char* const up = reinterpret_cast<const char*>(rows.up[r] + at + next_up);
      for (size_t line = 0; line < block_width * sizeof(Storage); line += 64) {
        __builtin_prefetch(gate + line, 0, 3);
        __builtin_prefetch(up + line, 0, 3);
      }
    }
    do_block<Element, activation, n_rows>(task, rows, at, f + at);
  }
  if (at == width) return;
  // The last columns in blocks of their own, filled up with zeros.
  alignas(64) Storage rest[3][n_rows][block_width] = {};
  const size_t rest_bytes = static_cast<size_t>(width - at) * sizeof(Storage);
  Rows<Storage> rest_rows = rows;
  for (int r = 0; r < n_rows; ++r) {
    memcpy(rest[0][r], rows.gate[r] + at, rest_bytes);
    memcpy(rest[1][r], rows.up[r] + at, rest_bytes);
    rest_rows.gate[r] = rest[0][r] - at;
    rest_rows.up[r] = rest[1][r] - at;
    rest_rows.out[r] = rest[2][r] - at;
  }
  do_block<Element, activation, n_rows>(task, rest_rows, at, f + at);
  for (int r = 0; r < n_rows; ++r) memcpy(rows.out[r] + at, rest[2][r], rest_bytes);
}

template <typename Element, Activation activation>
void run_columns(const SwigluStatsArgs& args, const SwigluStatsPlan& plan, int64_t f_begin,
                 int64_t f_end, unsigned char* scratch) {
  using Storage = typename Element::Storage;
  const Layout layout(args);
  const int64_t keep_stride = (args.F + 31) / 32;
  unsigned char* const slot_memory = scratch + layout.response_bytes * args.n_responses;
  const auto slot_of = [&](int64_t slot, int64_t s) {
    return Slot{slot_memory + (slot * args.n_sites + s) * layout.slot_bytes, layout.record_bytes};
  };
  const auto response_of = [&](int64_t s) {
    return reinterpret_cast<float*>(scratch + s * layout.response_bytes);
  };
  Task task = {};
  task.has_moments = args.sum != nullptr;
  task.has_keep = args.keep != nullptr;
  task.stream = plan.stream;
  memcpy(&task.threshold, &args.threshold_bits, sizeof task.threshold);
  task.act_table = plan.act_table;
  const auto prompt_of = [&](int64_t t) -> int64_t {
    return args.prompt_ids ? args.prompt_ids[t] : -1;
  };

  for (int64_t f = f_begin; f < f_end; f += layout.width) {
    const int64_t width = f_end - f < layout.width ? f_end - f : layout.width;
    int64_t prompt = -1;
    const auto change_prompt = [&](int64_t next) {
      for (int s = 0; s < args.n_responses; ++s) {
        float* const column = args.responses[s] + f;
        float* const sums = response_of(s);
        if (prompt >= 0) {
          move_response<Element>(column + prompt * args.strides_rn[s], sums, width, true);
        }
        if (next >= 0) {
          move_response<Element>(column + next * args.strides_rn[s], sums, width, false);
        }
        task.responses[args.response_sites[s]] = next >= 0 ? sums : nullptr;
      }
      prompt = next;
    };
    for (const Segment& segment : plan.segments) {
      const auto for_each_slot = [&](auto visit) {
        for (size_t slot = 0; slot < segment.groups.size(); ++slot) {
          for (int s = 0; s < args.n_sites; ++s) {
            const int64_t row = s * args.G + segment.groups[slot];
            visit(slot_of(static_cast<int64_t>(slot), s), row * args.F + f);
          }
        }
      };
      for_each_slot([&](const Slot& slot, int64_t first) {
        memset(slot.records, 0, static_cast<size_t>(layout.slot_bytes));
        if (args.sum) load_moments<Element>(args, slot, first, width);
      });
      int n_part_rows[n_slots_max] = {};  // tokens in each slot's part
      for (int64_t t = segment.t_begin; t < segment.t_end;) {
        const int64_t slot = plan.slots[t];
        for (int s = 0; s < args.n_sites; ++s) {
          task.is_counted[args.sites[s]] = slot >= 0;
          if (slot >= 0) task.slots[args.sites[s]] = slot_of(slot, s);
        }
        if (prompt_of(t) != prompt) change_prompt(prompt_of(t));
        int n_rows = 1;
        while (n_rows < n_rows_max && t + n_rows < segment.t_end && plan.slots[t + n_rows] == slot &&
               prompt_of(t + n_rows) == prompt) {
          ++n_rows;
        }
        n_rows = n_rows < 2 ? 1 : n_rows < n_rows_max ? 2 : n_rows_max;
        if (slot >= 0) {
          n_part_rows[slot] += n_rows;
          task.is_part_full = n_part_rows[slot] > part_rows - n_rows_max;
          if (task.is_part_full) n_part_rows[slot] = 0;
        }
        Rows<Storage> rows;
        for (int r = 0; r < n_rows; ++r) {
          const int64_t row = t + r;
          rows.gate[r] = static_cast<const Storage*>(args.gate) + row * args.stride_gt + f;
          rows.up[r] = static_cast<const Storage*>(args.up) + row * args.stride_ut + f;
          rows.out[r] = static_cast<Storage*>(args.out) + row * args.stride_ht + f;
          const int64_t condition = args.condition_ids ? args.condition_ids[row] : 0;
          if (args.keep) rows.keep[r] = args.keep + condition * keep_stride;
        }
        t += n_rows;
        const int64_t n_next = t + n_rows <= args.T ? n_rows : 0;
        const auto run = n_rows == 1   ? do_rows<Element, activation, 1>
                         : n_rows == 2 ? do_rows<Element, activation, 2>
                                       : do_rows<Element, activation, n_rows_max>;
        run(task, rows, f, width, n_next * args.stride_gt, n_next * args.stride_ut);
      }
      for_each_slot([&](const Slot& slot, int64_t first) {
        add_slot_counts<Element>(args, slot, first, width);
        if (args.sum) store_moments<Element>(args, slot, first, width);
      });
    }
    change_prompt(-1);
  }
#if defined(__AVX2__)
  _mm_sfence();  // the streamed rows are visible before the thread reports that it is done
#endif
}

// 16-bit types look the activation up, so one function serves all of them.
template <typename Element>
auto pick_half(Activation activation) {
  return activation == Activation::residual ? run_columns<Element, Activation::residual>
                                            : run_columns<Element, Activation::silu>;
}

auto pick(DType dtype, Activation activation) {
  if (dtype == DType::bfloat16) return pick_half<BFloat16>(activation);
  if (dtype == DType::float16) return pick_half<Float16>(activation);
  switch (activation) {
    case Activation::silu:
      return run_columns<Float32, Activation::silu>;
    case Activation::gelu:
      return run_columns<Float32, Activation::gelu>;
    case Activation::gelu_tanh:
      return run_columns<Float32, Activation::gelu_tanh>;
    case Activation::residual:
      return run_columns<Float32, Activation::residual>;
    case Activation::relu:
      break;
  }
  return run_columns<Float32, Activation::relu>;
}

void columns(const SwigluStatsArgs& args, const SwigluStatsPlan& plan, int64_t f_begin,
             int64_t f_end, unsigned char* scratch) {
  pick(args.dtype, args.activation)(args, plan, f_begin, f_end, scratch);
}

int64_t scratch_bytes(const SwigluStatsArgs& args, const SwigluStatsPlan& plan) {
  const Layout layout(args);
  return layout.response_bytes * args.n_responses +
         layout.slot_bytes * args.n_sites * plan.n_slots;
}

template <typename Element, Activation activation>
void fill(float* table) {
  for (int first = 0; first < 65536; first += block_width) {
    uint16_t pattern[block_width];
    for (int i = 0; i < block_width; ++i) pattern[i] = static_cast<uint16_t>(first + i);
    Block x = Element::load_block(pattern);
    for (F32& plane : x.plane) plane = Element::round(activate<activation>(plane));
    Element::to_natural(table + first, x);
  }
}

template <typename Element>
void fill_for(Activation activation, float* table) {
  if (activation == Activation::silu) fill<Element, Activation::silu>(table);
  if (activation == Activation::gelu) fill<Element, Activation::gelu>(table);
  if (activation == Activation::gelu_tanh) fill<Element, Activation::gelu_tanh>(table);
  if (activation == Activation::relu) fill<Element, Activation::relu>(table);
}

void fill_act_table(DType dtype, Activation activation, float* table) {
  if (dtype == DType::bfloat16) fill_for<BFloat16>(activation, table);
  if (dtype == DType::float16) fill_for<Float16>(activation, table);
}

}  // namespace

const SwigluStatsKernel swiglu_stats_kernel = {columns, scratch_bytes, fill_act_table};

}  // namespace RELNEURON_ISA
}  // namespace relneuron
