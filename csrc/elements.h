// The element types of the CPU kernels: float32, bfloat16 and float16, read and written as float32
// vectors. Included by kernel files only (see simd.h).
#pragma once

#include "simd.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// A block of 2 * n_lanes neighbouring columns is held as two vectors of float32, its planes.
// `load_block` is exact. `round` rounds to nearest even and may leave more bits below, which `exact`
// clears and `pack` ignores; NaN stays NaN, as one that comes from 16-bit inputs has zeros there.
// `pack` gives the elements in their natural order.

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
  static RELNEURON_INLINE F32 exact(F32 x) { return x; }
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
  static RELNEURON_INLINE F32 round(F32 x) { return float_of(round_upper_half(bits_of(x))); }
  static RELNEURON_INLINE F32 exact(F32 x) { return float_of(bits_of(x) & 0xffff0000u); }
  static RELNEURON_INLINE void pack(Block x, U32 (&packed)[1]) {
    packed[0] = (bits_of(x.plane[0]) >> 16) | (bits_of(x.plane[1]) & 0xffff0000u);
  }
  static RELNEURON_INLINE void keep(uint32_t bits, U32 (&packed)[1]) {
    packed[0] = where_bits_16(bits, packed[0]);
  }
  static RELNEURON_INLINE Block from_natural(const float* from) {
    Block x = Float32::load_block(from);
    deinterleave(x.plane[0], x.plane[1]);
    return x;
  }
  static RELNEURON_INLINE void to_natural(float* to, Block x) {
    interleave(x.plane[0], x.plane[1]);
    Float32::to_natural(to, x);
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
  static RELNEURON_INLINE F32 exact(F32 x) { return x; }
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

// Hits of a block in planes, added to the counts of its columns.
template <typename Element>
RELNEURON_INLINE void add_hits(int64_t* count, U32 plane0, U32 plane1) {
  float natural[block_width];
  Element::to_natural(natural, {float_of(plane0), float_of(plane1)});
  constexpr int half = n_lanes / 2;
  for (int at = 0; at < block_width; at += n_lanes) {
    const U32 hits = load<U32>(natural + at);
    store(count + at, load<U64>(count + at) + widen<0>(hits));
    store(count + at + half, load<U64>(count + at + half) + widen<1>(hits));
  }
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
