// Vectors of the instruction set that a kernel file is compiled for: 16 floats with AVX-512, 8 with
// AVX2, 4 otherwise (SSE2, NEON). They are GCC's vector types, so + - * / < & ?: work on them lane by
// lane; below is what has no operator. Kernel files (*_kernel.cpp) include it inside nothing, in
// namespace relneuron::RELNEURON_ISA, so that no inline function is shared between instruction sets.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int n_lanes = 16;
#elif defined(__AVX2__)
constexpr int n_lanes = 8;
#else
constexpr int n_lanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * n_lanes)));
typedef int32_t I32 __attribute__((vector_size(4 * n_lanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * n_lanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * n_lanes)));       // as many lanes
typedef uint16_t U16Pairs __attribute__((vector_size(4 * n_lanes)));  // twice as many
typedef double F64 __attribute__((vector_size(4 * n_lanes)));  // half as many lanes
typedef int64_t I64 __attribute__((vector_size(4 * n_lanes)));
typedef uint64_t U64 __attribute__((vector_size(4 * n_lanes)));

#define RELNEURON_INLINE inline __attribute__((always_inline))
#define RELNEURON_LAMBDA __attribute__((always_inline))

template <typename Vector>
RELNEURON_INLINE Vector load(const void* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <typename Vector>
RELNEURON_INLINE void store(void* to, Vector v) {
  memcpy(to, &v, sizeof v);
}

// Past the caches, to an address that is a multiple of the vector's size.
RELNEURON_INLINE void stream(void* to, U32 v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(v));
#else
  store(to, v);
#endif
}

RELNEURON_INLINE F32 splat(float x) { return x - F32{}; }
RELNEURON_INLINE U32 splat(uint32_t x) { return x - U32{}; }
RELNEURON_INLINE U32 bits_of(F32 x) { return reinterpret_cast<U32>(x); }
RELNEURON_INLINE F32 float_of(U32 x) { return reinterpret_cast<F32>(x); }

// a > b ? a : b, so b where one of them is NaN.
RELNEURON_INLINE F32 larger(F32 a, F32 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_max_ps(a, b));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(_mm256_max_ps(a, b));
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b, so b where one of them is NaN.
RELNEURON_INLINE F32 smaller(F32 a, F32 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<F32>(_mm512_min_ps(a, b));
#elif defined(__AVX2__)
  return reinterpret_cast<F32>(_mm256_min_ps(a, b));
#else
  return a < b ? a : b;
#endif
}

// x and its number in place of the best one and its, where x is larger; not so of NaN.
RELNEURON_INLINE void keep_larger(F32& best, U32& best_number, F32 x, U32 number) {
#if defined(__AVX512F__)
  const __mmask16 is_larger = _mm512_cmp_ps_mask(x, best, _CMP_GT_OQ);
  best = _mm512_mask_mov_ps(best, is_larger, x);
  best_number = reinterpret_cast<U32>(
      _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(best_number), is_larger,
                            reinterpret_cast<__m512i>(number)));
#else
  best_number = x > best ? number : best_number;
  best = larger(x, best);
#endif
}

// x, its magnitude at most `limit`; NaN gives NaN or the limit.
RELNEURON_INLINE F32 bounded(F32 x, float limit) {
#if defined(__AVX512F__)
  return _mm512_range_ps(x, splat(limit), 0b0010);  // the lesser magnitude, the sign of x
#else
  x = larger(splat(-limit), x);
  return x > limit ? splat(limit) : x;
#endif
}

// x - a * b where a * b is exact.
RELNEURON_INLINE F32 minus_exact_product(F32 x, F32 a, float b) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, splat(b), x);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(a, splat(b), x);
#else
  return x - a * b;
#endif
}

// The largest integer <= x, for |x| < 2^31; anything for NaN.
RELNEURON_INLINE F32 floor_of(F32 x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_floor_ps(x);
#else
  const F32 whole = __builtin_convertvector(__builtin_convertvector(x == x ? x : F32{}, I32), F32);
  return whole - (whole > x ? splat(1.0f) : F32{});
#endif
}

// x * 2^n for an integer n in [-252, 254] and a normal x * 2^(n / 2), rounded once.
RELNEURON_INLINE F32 times_power_of_2(F32 x, F32 n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(x, n);
#else
  // Two exact factors: the first keeps x normal, the second rounds if it must.
  const I32 whole = __builtin_convertvector(n == n ? n : F32{}, I32);
  const I32 half = whole >> 1;
  return x * reinterpret_cast<F32>((half + 127) << 23) *
         reinterpret_cast<F32>((whole - half + 127) << 23);
#endif
}

// table[index] for 16-bit indices.
RELNEURON_INLINE F32 look_up(const float* table, U32 index) {
#if defined(__AVX512F__)
  return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4);
#elif defined(__AVX2__)
  return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4);
#else
  F32 result;
  for (int lane = 0; lane < n_lanes; ++lane) result[lane] = table[index[lane]];
  return result;
#endif
}

// The top bit of every lane, that of lane 0 lowest, for lanes of 32 or 64 bits. Any vector of such: a
// comparison's lanes are int, long or long long, as compiler and system have it.
template <typename Vector>
RELNEURON_INLINE uint64_t top_bits(Vector x) {
  constexpr bool is_narrow = sizeof x[0] == 4;
#if defined(__AVX512F__)
  const __m512i lanes = reinterpret_cast<__m512i>(x);
  return is_narrow ? _mm512_movepi32_mask(lanes) : _mm512_movepi64_mask(lanes);
#elif defined(__AVX2__)
  const int bits = is_narrow ? _mm256_movemask_ps(reinterpret_cast<__m256>(x))
                             : _mm256_movemask_pd(reinterpret_cast<__m256d>(x));
  return static_cast<uint32_t>(bits);
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < (is_narrow ? n_lanes : n_lanes / 2); ++lane) {
    bits |= static_cast<uint64_t>(x[lane] < 0) << lane;
  }
  return bits;
#endif
}

// The bits of x at the set bits of `mask`, moved together.
RELNEURON_INLINE uint64_t extract_bits(uint64_t x, uint64_t mask) {
#if defined(__BMI2__)
  return _pext_u64(x, mask);
#else
  uint64_t result = 0;
  for (int place = 0; mask; mask &= mask - 1, ++place) {
    result |= ((x >> __builtin_ctzll(mask)) & 1u) << place;
  }
  return result;
#endif
}

// count + increment where a > b. The comparison is false for NaN.
RELNEURON_INLINE U32 add_where_greater(U32 count, F32 a, F32 b, uint32_t increment) {
#if defined(__AVX512F__)
  const __m512i old = reinterpret_cast<__m512i>(count);
  return reinterpret_cast<U32>(_mm512_mask_add_epi32(old, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), old,
                                                     _mm512_set1_epi32(static_cast<int>(increment))));
#else
  return count + (reinterpret_cast<U32>(a > b) & increment);
#endif
}

RELNEURON_INLINE bool is_finite(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7f800000u) != 0x7f800000u;
}

RELNEURON_INLINE bool any_nonfinite(F32 x) {
#if defined(__AVX512F__)
  // Quiet and signalling NaN, the two infinities.
  return _mm512_fpclass_ps_mask(x, 0x01 | 0x80 | 0x08 | 0x10) != 0;
#elif defined(__AVX2__)
  const I32 lanes = (bits_of(x) & 0x7f800000u) == 0x7f800000u;
  return _mm256_movemask_ps(reinterpret_cast<__m256>(lanes)) != 0;
#else
  const I32 lanes = (bits_of(x) & 0x7f800000u) == 0x7f800000u;
  return (lanes[0] | lanes[1] | lanes[2] | lanes[3]) != 0;
#endif
}

// Adds half a unit of the upper 16 bits, ties to even. The lower 16 bits are anything afterwards.
RELNEURON_INLINE U32 round_upper_half(U32 x) {
  const U32 up = x + 0x8000u;
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(up);
  const __mmask16 ties = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0xffff));
  return reinterpret_cast<U32>(
      _mm512_mask_and_epi32(bits, ties, bits, _mm512_set1_epi32(~0x10000)));
#else
  return (up & 0xffffu) == 0 ? up & ~0x10000u : up;
#endif
}

// x where the bit of the lane's number is set, else zeros.
RELNEURON_INLINE U32 where_bits(uint32_t bits, U32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32>(
      _mm512_maskz_mov_epi32(static_cast<__mmask16>(bits), reinterpret_cast<__m512i>(x)));
#else
  U32 bit;
  for (int lane = 0; lane < n_lanes; ++lane) bit[lane] = 1u << lane;
  return x & reinterpret_cast<U32>((bits & bit) != 0);
#endif
}

// The same for 16-bit lanes, twice as many.
RELNEURON_INLINE U32 where_bits_16(uint32_t bits, U32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32>(_mm512_maskz_mov_epi16(bits, reinterpret_cast<__m512i>(x)));
#else
  U16Pairs bit;
  for (int lane = 0; lane < 2 * n_lanes; ++lane) bit[lane] = static_cast<uint16_t>(1u << lane);
  return x & reinterpret_cast<U32>((static_cast<uint16_t>(bits) & bit) != 0);
#endif
}

// The lower (0) or upper (1) lanes as doubles, or as 64-bit integers. The compiler's own conversions between widths go
// through quarters of a vector.
template <int half>
RELNEURON_INLINE F64 widen(F32 x) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), half)));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm256_extractf128_ps(x, half));
#else
  return F64{x[2 * half], x[2 * half + 1]};
#endif
}

template <int half>
RELNEURON_INLINE U64 widen(U32 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<U64>(_mm512_cvtepu32_epi64(
      _mm512_extracti64x4_epi64(reinterpret_cast<__m512i>(x), half)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(
      _mm256_cvtepu32_epi64(_mm256_extracti128_si256(reinterpret_cast<__m256i>(x), half)));
#else
  return U64{x[2 * half], x[2 * half + 1]};
#endif
}

// The way back, each rounded to nearest.
RELNEURON_INLINE F32 narrow(F64 lower, F64 upper) {
#if defined(__AVX512F__)
  const __m512d halves = _mm512_castpd256_pd512(_mm256_castps_pd(_mm512_cvtpd_ps(lower)));
  return _mm512_castpd_ps(
      _mm512_insertf64x4(halves, _mm256_castps_pd(_mm512_cvtpd_ps(upper)), 1));
#elif defined(__AVX2__)
  return _mm256_set_m128(_mm256_cvtpd_ps(upper), _mm256_cvtpd_ps(lower));
#else
  return F32{static_cast<float>(lower[0]), static_cast<float>(lower[1]),
             static_cast<float>(upper[0]), static_cast<float>(upper[1])};
#endif
}

RELNEURON_INLINE U32 load_wide(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32>(_mm512_cvtepu16_epi32(load<__m256i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32>(_mm256_cvtepu16_epi32(load<__m128i>(from)));
#else
  return __builtin_convertvector(load<U16>(from), U32);
#endif
}

// x * x + sum, rounded once.
RELNEURON_INLINE F32 add_square(F32 sum, F32 x) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, x, sum);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(x, x, sum);
#else
  for (int lane = 0; lane < n_lanes; ++lane) sum[lane] = __builtin_fmaf(x[lane], x[lane], sum[lane]);
  return sum;
#endif
}

// a[0] b[0] a[1] b[1] ... in two vectors.
RELNEURON_INLINE void interleave(F32& a, F32& b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const F32 first = _mm512_permutex2var_ps(a, low, b);
  b = _mm512_permutex2var_ps(a, high, b);
  a = first;
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
#else
  const F32 first = {a[0], b[0], a[1], b[1]};
  b = F32{a[2], b[2], a[3], b[3]};
  a = first;
#endif
}

// The way back: the even and the odd elements.
RELNEURON_INLINE void deinterleave(F32& a, F32& b) {
#if defined(__AVX512F__)
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const F32 first = _mm512_permutex2var_ps(a, even, b);
  b = _mm512_permutex2var_ps(a, odd, b);
  a = first;
#elif defined(__AVX2__)
  const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
  a = _mm256_shuffle_ps(low, high, 0x88);
  b = _mm256_shuffle_ps(low, high, 0xdd);
#else
  const F32 first = {a[0], a[2], b[0], b[2]};
  b = F32{a[1], a[3], b[1], b[3]};
  a = first;
#endif
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
