// The activation of swiglu_stats in float32, as the statistics record it: swiglu_stats_kernel.cpp
// includes it.
#pragma once

#include "simd.h"
#include "swiglu_stats.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// The activation: one fixed sequence of float32 operations, the same in
// relneuron/ops/swiglu_stats/reference.py (which derives the constants and states the errors).

// Below -104 it is 0, above 89 infinity, so one bound serves for both. n * 355/512 is exact. NaN gives
// anything, as a NaN in the gate reaches the result on another way.
RELNEURON_INLINE F32 exp_f32(F32 x) {
  x = bounded(x, 104.0f);
  const F32 n = floor_of(x * 1.44269502f + 0.5f);
  F32 r = minus_exact_product(x, n, 0.693359375f);
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

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
