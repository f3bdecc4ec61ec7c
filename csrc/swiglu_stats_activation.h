// The activation of swiglu_stats in float32, as the statistics record it: swiglu_stats_kernel.cpp
// includes it.
#pragma once

#include "simd.h"
#include "swiglu_stats.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

RELNEURON_INLINE F32 magnitude_of(F32 x) { return float_of(bits_of(x) & 0x7fffffffu); }

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

// The normal distribution's Phi, of which gelu(x) is x times as much.
RELNEURON_INLINE F32 gelu_cumulative(F32 x) {
  const F32 square = x * x;
  const F32 t = 1.0f / ((magnitude_of(x) * 0.707106769f) * 0.5f + 1.0f);
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
  return x < -1.0f ? tail : right;
}

// x sigmoid(s) where s has the sign of x.
RELNEURON_INLINE F32 times_sigmoid(F32 x, F32 s) {
  const F32 e = exp_f32(-magnitude_of(s));
  const F32 part = x * (e / (e + 1.0f));
  return x > 12.0f ? x : (x > 0.0f ? x - part : part);
}

RELNEURON_INLINE F32 tanh_f32(F32 x) {
  const F32 size = magnitude_of(x);
  const F32 square = size * size;
  F32 p = square * -0.000358452089f + 0.0023013649f;
  p = p * square + -0.00794610661f;
  p = p * square + 0.0214866586f;
  p = p * square + -0.0538798012f;
  p = p * square + 0.133323446f;
  p = p * square + -0.333332956f;
  const F32 near = size + size * (square * p);
  const F32 e = exp_f32(size * -2.0f);
  const F32 far = 1.0f - (e * 2.0f) / (e + 1.0f);
  return float_of(bits_of(size > 1.0f ? far : near) | (bits_of(x) & 0x80000000u));
}

template <Activation activation>
RELNEURON_INLINE F32 activate(F32 x) {
  if (activation == Activation::silu) return x / (exp_f32(-x) + 1.0f);
  if (activation == Activation::gelu) return x * gelu_cumulative(x);
  if (activation == Activation::gelu_tanh) {
    return times_sigmoid(x, x * ((x * x) * 0.0713548139f + 1.59576917f));
  }
  if (activation == Activation::quick_gelu) return times_sigmoid(x, x * 1.70200002f);
  if (activation == Activation::tanh) return tanh_f32(x);
  const F32 positive = x < 0.0f ? F32{} : x;
  return activation == Activation::relu2 ? positive * positive : positive;
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
