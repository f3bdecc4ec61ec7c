// The activations of swiglu_stats and their slopes, in float32 or float64 vectors: of its gradient.
// swiglu_gradient_kernel.cpp includes it. Unlike the statistics, the gradient has no fixed sequence of
// operations: it is held to the accuracy rule.
#pragma once

#include "simd.h"
#include "swiglu_stats.h"
#include "swiglu_stats_activation.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

RELNEURON_INLINE F64 magnitude_of(F64 x) {
  return reinterpret_cast<F64>(reinterpret_cast<U64>(x) & ~(uint64_t{1} << 63));
}

// To 10 digits: the series up to r^8 of |r| <= ln(2) / 2. Adding 1.5 * 2^52 rounds to an integer, which
// then stands in the lowest bits.
RELNEURON_INLINE F64 exp_of(F64 x) {
  x = x < -700.0 ? F64{} - 700.0 : (x > 700.0 ? F64{} + 700.0 : x);
  const F64 shifted = x * 1.4426950408889634 + 0x1.8p52;
  const F64 r = x - (shifted - 0x1.8p52) * 0.6931471805599453;
  F64 sum = r * (1.0 / 40320) + 1.0 / 5040;
  sum = sum * r + 1.0 / 720;
  sum = sum * r + 1.0 / 120;
  sum = sum * r + 1.0 / 24;
  sum = sum * r + 1.0 / 6;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  return sum * reinterpret_cast<F64>((reinterpret_cast<U64>(shifted) + 1023) << 52);
}
RELNEURON_INLINE F32 exp_of(F32 x) { return exp_f32(x); }

// gelu_cumulative of swiglu_stats_activation.h to 9 digits: the same two formulas with polynomials that
// interpolate log(erfcx(z) / t) for 0.7 <= z <= 10.3 (1.7e-9) and (Phi(x) - 1/2) / x for |x| <= 1
// (3.9e-12) at Chebyshev's nodes.
RELNEURON_INLINE F64 gelu_cumulative(F64 x) {
  constexpr double outer[] = {-1.26553738196, 1.00073874246,  0.365602678981, 0.151681871278,
                              -0.399576169195, 0.797626358793, -1.92996278131, 2.23278014632,
                              -1.21101222716,  0.257689531461};
  constexpr double inner[] = {0.398942280397,    -0.0664903796593,  0.00997355046978, -0.00118728874395,
                              0.000115320745528, -9.27440105692e-06, 5.37264238373e-07};
  const F64 square = x * x;
  const F64 t = 1.0 / (magnitude_of(x) * 0.35355339059327379 + 1.0);
  F64 p = t * outer[9] + outer[8];
  for (int i = 7; i >= 0; --i) p = p * t + outer[i];
  const F64 tail = exp_of(p - square * 0.5) * t * 0.5;
  F64 q = square * inner[6] + inner[5];
  for (int i = 4; i >= 0; --i) q = q * square + inner[i];
  const F64 middle = x * q + 0.5;
  return x < -1.0 ? tail : (x > 1.0 ? 1.0 - tail : middle);
}

// A constant as a number of the vector's type.
template <typename Vector>
struct LaneOf {
  using Type = double;
};
template <>
struct LaneOf<F32> {
  using Type = float;
};
template <typename Vector>
constexpr auto number(double x) {
  return static_cast<typename LaneOf<Vector>::Type>(x);
}

// activation(x) and its slope there. NaN gives NaN in both, but relu's slope is 1, as torch has it.
template <typename Vector>
struct Curve {
  Vector value, slope;
};

// x sigmoid(s), where s has the sign of x and the slope ds. With p = sigmoid(-|s|) the sigmoid is p or
// 1 - p, and has the slope p (1 - p): so no small number is a difference of large ones.
template <typename Vector>
RELNEURON_INLINE Curve<Vector> times_sigmoid_curve(Vector x, Vector s, Vector ds) {
  constexpr auto one = number<Vector>(1.0);
  const Vector e = exp_of(-magnitude_of(s));
  const Vector p = e / (e + one);
  const Vector rest = one - p, part = x * p;
  return {x > Vector{} ? x - part : part, (x > Vector{} ? rest : p) + part * rest * ds};
}

// As s of times_sigmoid_curve, 2 sqrt(2/pi) (x + 0.044715 x^3).
template <typename Vector>
RELNEURON_INLINE Curve<Vector> gelu_tanh_curve(Vector x) {
  constexpr auto linear = number<Vector>(1.5957691216057308);
  constexpr auto cubic = number<Vector>(0.071354816272600248);
  // Beyond 12 the sigmoid is 0 or 1, and the cube of a large x is infinite.
  constexpr auto high = number<Vector>(12.0);
  const Vector size = magnitude_of(x);
  const Vector near = size > high ? Vector{} : x, square = near * near;
  const Curve<Vector> found = times_sigmoid_curve<Vector>(
      near, near * (square * cubic + linear), square * (cubic * number<Vector>(3.0)) + linear);
  const Vector step = x > Vector{} ? Vector{} + number<Vector>(1.0) : Vector{};
  return {size > high ? x * step : found.value, size > high ? step : found.slope};
}

// x Phi(x) has the slope Phi(x) + x phi(x).
template <typename Vector>
RELNEURON_INLINE Curve<Vector> gelu_curve(Vector x) {
  const Vector cumulative = gelu_cumulative(x);
  const Vector density =
      exp_of(x * x * number<Vector>(-0.5)) * number<Vector>(0.3989422804014327);
  return {x * cumulative, cumulative + x * density};
}

// With e = exp(-2 |x|): |tanh(x)| = (1 - e) / (1 + e), near 0 by its series; the slope is
// 4 e / (1 + e)^2.
template <typename Vector>
RELNEURON_INLINE Curve<Vector> tanh_curve(Vector x) {
  constexpr auto one = number<Vector>(1.0);
  const Vector size = magnitude_of(x);
  const Vector e = exp_of(size * number<Vector>(-2.0));
  const Vector inverse = one / (e + one), square = x * x;
  const Vector near =
      x * (one + square * (number<Vector>(-1.0 / 3) +
                           square * (number<Vector>(2.0 / 15) - square * number<Vector>(17.0 / 315))));
  const Vector far = (one - e) * inverse;
  const Vector value = size < number<Vector>(0.0625) ? near : (x < Vector{} ? -far : far);
  return {value, number<Vector>(4.0) * e * inverse * inverse};
}

template <Activation activation, typename Vector>
RELNEURON_INLINE Curve<Vector> curve(Vector x) {
  constexpr auto quick = number<Vector>(1.702);
  if constexpr (activation == Activation::silu) {
    return times_sigmoid_curve<Vector>(x, x, Vector{} + number<Vector>(1.0));
  } else if constexpr (activation == Activation::quick_gelu) {
    return times_sigmoid_curve<Vector>(x, x * quick, Vector{} + quick);
  } else if constexpr (activation == Activation::gelu_tanh) {
    return gelu_tanh_curve(x);
  } else if constexpr (activation == Activation::gelu) {
    return gelu_curve(x);
  } else if constexpr (activation == Activation::tanh) {
    return tanh_curve(x);
  } else {
    const Vector positive = x < Vector{} ? Vector{} : x;
    if constexpr (activation == Activation::relu) {
      return {positive, Vector{} + number<Vector>(1.0)};
    } else {
      return {positive * positive, x + x};
    }
  }
}

// dh up slope, where the slope first keeps what is finite from overflowing; relu and relu2 pass nothing
// on below 0, whatever dh and up are.
template <Activation activation, typename Vector>
RELNEURON_INLINE Vector sloped(Vector dh, Vector up, Vector x, Vector slope) {
  const Vector product = dh * slope * up;
  if constexpr (activation == Activation::relu || activation == Activation::relu2) {
    return x <= Vector{} ? Vector{} : product;
  } else {
    return product;
  }
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
