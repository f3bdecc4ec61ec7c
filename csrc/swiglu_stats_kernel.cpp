// The inner loops of swiglu_stats on a CPU, compiled once per instruction set (RELNEURON_ISA) from
// this one source by the compiler's auto-vectoriser. swiglu_stats.cpp calls it for each thread's
// columns. Include nothing here that has inline functions of its own: the linker would keep one
// copy for all instruction sets, maybe one that the processor cannot run.
#include "swiglu_stats.h"

#include <string.h>

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// Columns handled at a time: the float buffers of a row, 4 x 2 KiB, stay in the first-level cache.
constexpr int chunk_width = 512;

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- Element types: `load` is exact, `store` rounds to nearest even, NaN becomes a quiet NaN. They
// are branch-free integer arithmetic, so that they give the same bits everywhere and vectorise.

struct Float32 {
  using Storage = float;
  static float load(Storage x) { return x; }
  static Storage store(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float load(Storage x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static Storage store(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<Storage>(x == x ? rounded : 0x7fc0u);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static float load(Storage x) {
    const uint32_t sign = (static_cast<uint32_t>(x) & 0x8000u) << 16;
    const uint32_t rest = x & 0x7fffu;
    // Below 0x400 the number is subnormal: rest * 2^-24, exact in float32.
    const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
    // Otherwise move the exponent from bias 15 to 127; infinity and NaN to the top exponent.
    const uint32_t normal = (rest << 13) + (112u << 23) + (rest >= 0x7c00u ? 112u << 23 : 0u);
    return as_float(sign | (rest < 0x400u ? subnormal : normal));
  }
  static Storage store(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t rest = bits & 0x7fffffffu;
    // Below 2^-14 the result is a multiple of 2^-24, the spacing of float32 at 0.5.
    const uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (rest + 0xfffu + ((rest >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t half = rest < 0x38800000u ? subnormal : normal;
    half = rest >= 0x47800000u ? 0x7c00u : half;  // 2^16 and above; 65520 rounds up to it itself
    half = rest > 0x7f800000u ? 0x7e00u : half;
    return static_cast<Storage>(sign | half);
  }
};

// ---- The activation: one fixed sequence of float32 operations, the same in
// relneuron/ops/swiglu_stats_reference.py (which derives the constants and states the errors).

inline float exp_f32(float x) {
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float y = x * 1.44269502f + 0.5f;
  // floor(y); 0 for NaN, whose conversion to an integer is undefined.
  const int32_t truncated = static_cast<int32_t>(y == y ? y : 0.0f);
  const int32_t n = truncated - (static_cast<float>(truncated) > y ? 1 : 0);
  const float n_float = static_cast<float>(n);
  float r = x - n_float * 0.693359375f;
  r = r - n_float * -2.12194440e-4f;
  float q = r * 0.001381448f + 0.00836877991f;
  q = q * r + 0.0416683927f;
  q = q * r + 0.166665196f;
  q = q * r + 0.49999994f;
  const float result = (q * (r * r) + r) + 1.0f;
  const int32_t half = n >> 1;
  return result * as_float(static_cast<uint32_t>(half + 127) << 23) *
         as_float(static_cast<uint32_t>(n - half + 127) << 23);
}

inline float gelu_f32(float x) {
  const float square = x * x;
  const float t = 1.0f / ((as_float(as_bits(x) & 0x7fffffffu) * 0.707106769f) * 0.5f + 1.0f);
  float p = t * -0.161039799f + 0.379661053f;
  p = p * t + -0.0744687095f;
  p = p * t + -0.361406326f;
  p = p * t + 0.0677839294f;
  p = p * t + 0.030283194f;
  p = p * t + 0.385154188f;
  p = p * t + 0.998969734f;
  p = p * t + -1.26546896f;
  const float tail = (exp_f32(p - square * 0.5f) * t) * 0.5f;
  float q = square * -7.5445364e-06f + 0.000113185983f;
  q = q * square + -0.00118603115f;
  q = q * square + 0.00997319352f;
  q = q * square + -0.0664903373f;
  q = q * square + 0.398942292f;
  const float middle = x * q + 0.5f;
  const float right = x > 1.0f ? 1.0f - tail : middle;
  return x * (x < -1.0f ? tail : right);
}

template <Activation activation>
inline float activate(float x) {
  if (activation == Activation::silu) {
    return x / (exp_f32(-x) + 1.0f);
  }
  if (activation == Activation::gelu_tanh) {
    const float y = (x + (x * x * x) * 0.0447149985f) * 0.797884583f;
    return x / (exp_f32(y * -2.0f) + 1.0f);
  }
  if (activation == Activation::gelu) {
    return gelu_f32(x);
  }
  return x < 0.0f ? 0.0f : x;
}

// ---- One row of one chunk, `width` columns.

struct Row {
  float value[n_sites_max][chunk_width];  // by site, each rounded to the element type
};

template <typename Element, Activation activation>
void load_row(const typename Element::Storage* gate, const typename Element::Storage* up,
              int width, Row& row) {
  float* const g = row.value[site_gate];
  float* const u = row.value[site_up];
  float* const a = row.value[site_act];
  float* const p = row.value[site_product];
  for (int j = 0; j < width; ++j) g[j] = Element::load(gate[j]);
  for (int j = 0; j < width; ++j) u[j] = Element::load(up[j]);
  for (int j = 0; j < width; ++j) a[j] = Element::load(Element::store(activate<activation>(g[j])));
  for (int j = 0; j < width; ++j) p[j] = Element::load(Element::store(a[j] * u[j]));
}

void add_counts(const float* value, float threshold, int width, int64_t* __restrict__ count) {
  for (int j = 0; j < width; ++j) count[j] += value[j] > threshold ? 1 : 0;
}

void add_moments(const float* value, int width, double* __restrict__ sum,
                 double* __restrict__ sum_sq, float* __restrict__ max,
                 int64_t* __restrict__ n_nonfinite) {
  for (int j = 0; j < width; ++j) {
    const bool is_finite = (as_bits(value[j]) & 0x7f800000u) != 0x7f800000u;
    const float finite = is_finite ? value[j] : 0.0f;
    const double wide = finite;
    n_nonfinite[j] += is_finite ? 0 : 1;
    sum[j] += wide;
    sum_sq[j] += wide * wide;
    // Adding +0 turns -0 into +0.
    const float candidate = is_finite ? value[j] + 0.0f : max[j];
    max[j] = candidate > max[j] ? candidate : max[j];
  }
}

void add_response(const float* value, int width, float* __restrict__ response) {
  for (int j = 0; j < width; ++j) response[j] += value[j];
}

// The bits of `keep` from column f0 (a multiple of 32) on, as all-ones or all-zeros words.
void expand_mask(const uint32_t* keep_row, int64_t f0, int width, uint32_t* __restrict__ mask) {
  const uint32_t* words = keep_row + f0 / 32;
  for (int j = 0; j < width; ++j) mask[j] = 0u - ((words[j / 32] >> (j % 32)) & 1u);
}

template <typename Element, Activation activation>
void run_columns(const SwigluStatsArgs& args, int64_t f_begin, int64_t f_end) {
  using Storage = typename Element::Storage;
  const int64_t site_size = args.G * args.F;
  const int64_t keep_stride = (args.F + 31) / 32;
  const float threshold = as_float(args.threshold_bits);
  Row row;
  uint32_t mask[chunk_width];
  for (int64_t f0 = f_begin; f0 < f_end; f0 += chunk_width) {
    const int width = static_cast<int>(f_end - f0 < chunk_width ? f_end - f0 : chunk_width);
    int64_t mask_condition = -1;
    for (int64_t t = 0; t < args.T; ++t) {
      const Storage* gate = static_cast<const Storage*>(args.gate) + t * args.stride_gt + f0;
      const Storage* up = static_cast<const Storage*>(args.up) + t * args.stride_ut + f0;
      load_row<Element, activation>(gate, up, width, row);

      const int64_t group = args.group_ids ? args.group_ids[t] : 0;
      if (args.count && group >= 0) {
        for (int s = 0; s < args.n_sites; ++s) {
          const float* value = row.value[args.sites[s]];
          const int64_t at = s * site_size + group * args.F + f0;
          add_counts(value, threshold, width, args.count + at);
          if (args.sum) {
            add_moments(value, width, args.sum + at, args.sum_sq + at, args.max + at,
                        args.n_nonfinite + at);
          }
        }
      }
      const int64_t prompt = args.prompt_ids ? args.prompt_ids[t] : -1;
      if (prompt >= 0) {
        for (int s = 0; s < args.n_responses; ++s) {
          add_response(row.value[args.response_sites[s]], width,
                       args.responses[s] + prompt * args.strides_rn[s] + f0);
        }
      }

      Storage* h = static_cast<Storage*>(args.out) + t * args.stride_ht + f0;
      const float* product = row.value[site_product];
      if (args.keep) {
        const int64_t condition = args.condition_ids ? args.condition_ids[t] : 0;
        if (condition != mask_condition) {
          expand_mask(args.keep + condition * keep_stride, f0, width, mask);
          mask_condition = condition;
        }
        for (int j = 0; j < width; ++j) {
          h[j] = Element::store(as_float(as_bits(product[j]) & mask[j]));
        }
      } else {
        for (int j = 0; j < width; ++j) h[j] = Element::store(product[j]);
      }
    }
  }
}

template <typename Element>
SwigluStatsColumns* pick_activation(Activation activation) {
  switch (activation) {
    case Activation::silu:
      return run_columns<Element, Activation::silu>;
    case Activation::gelu:
      return run_columns<Element, Activation::gelu>;
    case Activation::gelu_tanh:
      return run_columns<Element, Activation::gelu_tanh>;
    case Activation::relu:
      break;
  }
  return run_columns<Element, Activation::relu>;
}

}  // namespace

void swiglu_stats_columns(const SwigluStatsArgs& args, int64_t f_begin, int64_t f_end) {
  SwigluStatsColumns* run = nullptr;
  switch (args.dtype) {
    case DType::float32:
      run = pick_activation<Float32>(args.activation);
      break;
    case DType::bfloat16:
      run = pick_activation<BFloat16>(args.activation);
      break;
    case DType::float16:
      run = pick_activation<Float16>(args.activation);
      break;
  }
  if (run) run(args, f_begin, f_end);
}

}  // namespace RELNEURON_ISA
}  // namespace relneuron
