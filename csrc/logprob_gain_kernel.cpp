// The inner loops of logprob_gain on a CPU, compiled once per instruction set (RELNEURON_ISA) from this
// one source; logprob_gain.cpp calls them. Use nothing here from headers that have inline functions:
// the linker would keep one copy for all instruction sets, maybe one that the processor cannot run.
//
// `block` makes the inner products of some neurons with a tile of the vocabulary, which stay in the
// cache, and sums over them whatever is asked, for every sentence.
#include "logprob_gain.h"

#include "elements.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// The inner products are made in panels of so many neurons by two vectors of tokens: the sums of one
// panel fill the registers.
#if defined(__AVX512F__)
constexpr int panel_rows = 12;
#else
constexpr int panel_rows = 6;
#endif
constexpr int panel_tokens = 2 * n_lanes;
constexpr int64_t depth = 256;  // elements of the inner products at a time: a panel stays in L1
constexpr int64_t terms = 128;  // of them so many make one sum: longer ones round away more

// Logits that move by less than these take a polynomial for exp(y) - 1; up to large_move exp(y) fits a
// float32, beyond that the largest exponent is taken out first.
constexpr float tiny_move = 0.0625f, small_move = 0.25f, large_move = 30.0f;

RELNEURON_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

RELNEURON_INLINE F32 magnitude(F32 x) { return float_of(bits_of(x) & 0x7fffffffu); }

RELNEURON_INLINE double sum_lanes(F32 x) {
  const F64 pairs = widen<0>(x) + widen<1>(x);
  double sum = 0;
  for (int lane = 0; lane < n_lanes / 2; ++lane) sum += pairs[lane];
  return sum;
}

// The largest lane; NaN if there is one.
RELNEURON_INLINE float largest_lane(F32 x) {
  float result = x[0];
  for (int lane = 1; lane < n_lanes; ++lane) {
    if (!(x[lane] <= result) && result == result) result = x[lane];
  }
  return result;
}

// exp(x) for x <= 88, within 2 units of 2^-24; below -87 it stays at exp(-87), 1e-38.
RELNEURON_INLINE F32 exp_of(F32 x) {
  x = larger(splat(-87.0f), x);
  const F32 n = floor_of(multiply_add(x, splat(1.44269502f), splat(0.5f)));
  F32 r = multiply_add(n, splat(-0.693359375f), x);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  F32 q = multiply_add(r, splat(1.0f / 720), splat(1.0f / 120));
  q = multiply_add(q, r, splat(1.0f / 24));
  q = multiply_add(q, r, splat(1.0f / 6));
  q = multiply_add(q, r, splat(0.5f));
  q = multiply_add(q * r, r, r) + 1.0f;
  return times_power_of_2(q, n);
}

// (exp(y) - 1) / y by its series, for |y| <= tiny_move or small_move.
template <bool is_tiny>
RELNEURON_INLINE F32 slope(F32 y) {
  F32 q = splat(1.0f / 24);
  if (!is_tiny) {
    q = multiply_add(y, splat(1.0f / 720), splat(1.0f / 120));
    q = multiply_add(q, y, splat(1.0f / 24));
  }
  q = multiply_add(q, y, splat(1.0f / 6));
  q = multiply_add(q, y, splat(0.5f));
  return multiply_add(q, y, splat(1.0f));
}

// ---- Packing

RELNEURON_INLINE float to_float(const void* from, int64_t at, GainType type) {
  if (type == GainType::float32) return static_cast<const float*>(from)[at];
  const uint16_t bits = static_cast<const uint16_t*>(from)[at];
  if (type == GainType::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float result;
    memcpy(&result, &wide, sizeof result);
    return result;
  }
  return Float16::widen_bits(splat(static_cast<uint32_t>(bits)))[0];
}

// A panel of neurons: element d of all of them side by side.
void pack_values(const LogprobGainArgs& args, const LogprobGainPlan& plan, int64_t panel) {
  float* to = plan.values + panel * panel_rows * args.D;
  const int64_t first = panel * panel_rows;
  for (int64_t d = 0; d < args.D; ++d) {
    for (int64_t row = 0; row < panel_rows; ++row) {
      float value = 0.0f;
      if (first + row < plan.n_rows) {
        const int64_t k = args.rows[plan.first_row + first + row];
        value = to_float(args.values, k * args.stride_vk + d * args.stride_vd, args.values_dtype);
      }
      to[d * panel_rows + row] = value;
    }
  }
}

RELNEURON_INLINE F32 load_floats(const void* from, int64_t at, GainType type) {
  if (type == GainType::float32) return load<F32>(static_cast<const float*>(from) + at);
  const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
  return type == GainType::bfloat16 ? float_of(load_wide(halves) << 16) : Float16::widen(halves);
}

// A panel of tokens, likewise; zeros past the vocabulary.
void pack_unembed(const LogprobGainArgs& args, const Tile& tile, int64_t panel) {
  float* to = tile.unembed + panel * panel_tokens * args.D;
  const int64_t first = panel * panel_tokens;
  for (int64_t begin = 0; begin < args.D; begin += n_lanes) {
    const int64_t n = args.D - begin < n_lanes ? args.D - begin : n_lanes;
    for (int64_t token = 0; token < panel_tokens; ++token) {
      F32 piece = {};
      if (first + token < tile.n_tokens) {
        const int64_t at = (tile.first_token + first + token) * args.stride_uv + begin;
        if (n == n_lanes) {
          piece = load_floats(args.unembed, at, args.unembed_dtype);
        } else {
          for (int64_t i = 0; i < n; ++i) piece[i] = to_float(args.unembed, at + i, args.unembed_dtype);
        }
      }
      for (int64_t i = 0; i < n; ++i) to[(begin + i) * panel_tokens + token] = piece[i];
    }
  }
}

// What the tile needs of a sentence.
void pack_sentence(const LogprobGainArgs& args, const Tile& tile, int64_t e) {
  const int64_t from = e * args.V + tile.first_token, to = e * tile_tokens;
  float span = 0.0f;
  for (int64_t v = 0; v < tile_tokens; ++v) {
    const bool is_token = v < tile.n_tokens;
    tile.logp[to + v] = is_token ? args.logp[from + v] : -__builtin_inff();
    if (args.tilt) {
      const float z = is_token ? args.z[from + v] : 0.0f;
      tile.z[to + v] = z;
      span = span > __builtin_fabsf(z) ? span : __builtin_fabsf(z);
    }
  }
  double weight = 0;
  for (int64_t v = 0; v < tile_tokens; v += n_lanes) {
    const F32 logp = load<F32>(tile.logp + to + v);
    const F32 p = logp > -87.0f ? exp_of(logp) : F32{};
    store(tile.p + to + v, p);
    weight += sum_lanes(p);
  }
  tile.weight[e] = weight;
  tile.z_span[e] = span;
}

// ---- Inner products

// Adds the products of one panel of neurons and one of tokens to `products`, rows tile_tokens apart.
RELNEURON_INLINE void multiply_panels(const float* values, const float* tokens, int64_t n,
                                      bool is_first, float* products) {
  for (int64_t begin = 0; begin < n; begin += terms) {
    const int64_t end = n - begin < terms ? n : begin + terms;
    F32 sums[panel_rows][2] = {};
    for (int64_t d = begin; d < end; ++d) {
      const F32 left = load<F32>(tokens + d * panel_tokens);
      const F32 right = load<F32>(tokens + d * panel_tokens + n_lanes);
#pragma GCC unroll 12
      for (int row = 0; row < panel_rows; ++row) {
        const F32 value = splat(values[d * panel_rows + row]);
        sums[row][0] = multiply_add(value, left, sums[row][0]);
        sums[row][1] = multiply_add(value, right, sums[row][1]);
      }
    }
    for (int row = 0; row < panel_rows; ++row) {
      for (int i = 0; i < 2; ++i) {
        float* to = products + row * tile_tokens + i * n_lanes;
        store(to, is_first && begin == 0 ? sums[row][i] : load<F32>(to) + sums[row][i]);
      }
    }
  }
}

void inner_products(const LogprobGainArgs& args, const LogprobGainPlan& plan, const Tile& tile,
                    int64_t first, float* products) {
  const int64_t left = plan.n_rows - first < block_rows ? plan.n_rows - first : block_rows;
  const int64_t n_panels = (left + panel_rows - 1) / panel_rows;
  for (int64_t d = 0; d < args.D; d += depth) {
    const int64_t n = args.D - d < depth ? args.D - d : depth;
    for (int64_t token = 0; token < tile.n_tokens; token += panel_tokens) {
      const float* tokens = tile.unembed + token * args.D + d * panel_tokens;
      for (int64_t panel = 0; panel < n_panels; ++panel) {
        const int64_t row = first + panel * panel_rows;
        const float* values = plan.values + row * args.D + d * panel_rows;
        multiply_panels(values, tokens, n, d == 0,
                        products + panel * panel_rows * tile_tokens + token);
      }
    }
  }
}

// ---- Sums over a tile

// What a pair's logits move by, at n_lanes tokens.
template <bool has_tilt>
RELNEURON_INLINE F32 moved(const float* b, const float* z, float t, float tilt) {
  const F32 y = splat(t) * load<F32>(b);
  return has_tilt ? multiply_add(splat(tilt), load<F32>(z), y) : y;
}

// Sum of f(vector number) over the tile's `n` vectors, n a multiple of four or the last ones.
template <typename Term>
RELNEURON_INLINE double sum_over(int64_t n, Term term) {
  F32 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = term(i + j, sums[j]);
  }
  for (; i < n; ++i) sums[0] = term(i, sums[0]);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <bool has_tilt, bool is_tiny>
double small_sum(const float* b, const float* p, const float* z, float t, float tilt, int64_t n) {
  return sum_over(n, [&](int64_t i, F32 sum) RELNEURON_LAMBDA {
    const int64_t at = i * n_lanes;
    const F32 y = moved<has_tilt>(b + at, z + at, t, tilt);
    return multiply_add(load<F32>(p + at) * y, slope<is_tiny>(y), sum);
  });
}

template <bool has_tilt>
void add_large(const float* b, const float* p, const float* logp, const float* z, float t,
               float tilt, float move, int64_t n, PairSum& sum) {
  double shift = 0, part;
  if (move <= large_move) {
    part = sum_over(n, [&](int64_t i, F32 so_far) RELNEURON_LAMBDA {
      const int64_t at = i * n_lanes;
      const F32 y = moved<has_tilt>(b + at, z + at, t, tilt);
      return multiply_add(load<F32>(p + at), exp_of(y), so_far);
    });
  } else {
    F32 most = splat(-__builtin_inff());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i * n_lanes;
      most = larger(moved<has_tilt>(b + at, z + at, t, tilt) + load<F32>(logp + at), most);
    }
    const float largest = largest_lane(most);
    shift = largest;
    part = sum_over(n, [&](int64_t i, F32 so_far) RELNEURON_LAMBDA {
      const int64_t at = i * n_lanes;
      const F32 y = moved<has_tilt>(b + at, z + at, t, tilt) + load<F32>(logp + at);
      return so_far + exp_of(y - largest);
    });
  }
  if (sum.has_large && shift > sum.shift) {
    sum.large *= __builtin_exp(sum.shift - shift);
    sum.shift = shift;
  } else if (!sum.has_large) {
    sum.shift = shift;
  }
  sum.large += part * __builtin_exp(shift - sum.shift);
  sum.has_large = true;
}

template <bool has_tilt>
void add_pairs(const LogprobGainArgs& args, const LogprobGainPlan& plan, const Tile& tile,
               int64_t k, const float* b, float span, int64_t n) {
  for (int64_t i = args.row_start[k]; i < args.row_start[k + 1]; ++i) {
    const int64_t e = args.sentence[i];
    const float t = args.t[i], tilt = has_tilt ? args.tilt[i] : 0.0f;
    float move = __builtin_fabsf(t) * span;
    if (has_tilt) move += __builtin_fabsf(tilt) * tile.z_span[e];
    const float* p = tile.p + e * tile_tokens;
    const float* z = has_tilt ? tile.z + e * tile_tokens : b;
    PairSum& sum = plan.sums[i];
    if (move <= small_move) {
      if (move > 0.0f) {
        sum.small += move <= tiny_move ? small_sum<has_tilt, true>(b, p, z, t, tilt, n)
                                       : small_sum<has_tilt, false>(b, p, z, t, tilt, n);
      }
      sum.weight += tile.weight[e];
    } else {
      add_large<has_tilt>(b, p, tile.logp + e * tile_tokens, z, t, tilt, move, n, sum);
    }
  }
}

// Sums of p b^2 and p b^3 of one neuron for four sentences, or those that are left.
void add_moments(const LogprobGainArgs& args, const Tile& tile, int64_t k, const float* b,
                 int64_t n) {
  constexpr int64_t at_once = 4;
  for (int64_t first = 0; first < args.E; first += at_once) {
    const int64_t left = args.E - first < at_once ? args.E - first : at_once;
    const float* p[at_once];
    for (int64_t e = 0; e < at_once; ++e) {
      p[e] = tile.p + (first + (e < left ? e : 0)) * tile_tokens;
    }
    F32 second[at_once] = {}, third[at_once] = {};
    for (int64_t i = 0; i < n; ++i) {
      const F32 value = load<F32>(b + i * n_lanes);
      const F32 square = value * value, cube = square * value;
#pragma GCC unroll 4
      for (int64_t e = 0; e < at_once; ++e) {
        const F32 weight = load<F32>(p[e] + i * n_lanes);
        second[e] = multiply_add(weight, square, second[e]);
        third[e] = multiply_add(weight, cube, third[e]);
      }
    }
    for (int64_t e = 0; e < left; ++e) {
      args.second[k * args.E + first + e] += sum_lanes(second[e]);
      args.third[k * args.E + first + e] += sum_lanes(third[e]);
    }
  }
}

void block(const LogprobGainArgs& args, const LogprobGainPlan& plan, const Tile& tile,
           int64_t first, float* products) {
  inner_products(args, plan, tile, first, products);
  const int64_t n = (tile.n_tokens + n_lanes - 1) / n_lanes;
  for (int64_t row = 0; row < block_rows && first + row < plan.n_rows; ++row) {
    const int64_t k = plan.first_row + first + row;
    const float* b = products + row * tile_tokens;
    F32 most = {};
    for (int64_t i = 0; i < n; ++i) most = larger(magnitude(load<F32>(b + i * n_lanes)), most);
    const float span = largest_lane(most);
    args.largest[k] = args.largest[k] > span ? args.largest[k] : span;
    if (args.second) {
      add_moments(args, tile, k, b, n);
    } else if (args.tilt) {
      add_pairs<true>(args, plan, tile, k, b, span, n);
    } else {
      add_pairs<false>(args, plan, tile, k, b, span, n);
    }
  }
}

}  // namespace

const LogprobGainKernel logprob_gain_kernel = {
    panel_rows, panel_tokens, pack_values, pack_unembed, pack_sentence, block,
};

}  // namespace RELNEURON_ISA
}  // namespace relneuron
