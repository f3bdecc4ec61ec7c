// The short way of average_precision with few relations: the values of one relation's members are
// sorted together with their labels, which needs no row number and nothing to be looked up afterwards.
// A word has one bit of label below 31 bits of value. Included by average_precision_kernel.cpp only.
#pragma once

#include "average_precision_order.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

// The magnitudes of a column: all that are not zero lie above `offset`, and less than 2^30 above it.
struct Magnitudes {
  bool is_finite, fits;
  uint32_t offset;
};

RELNEURON_INLINE uint32_t magnitude(float x) { return same_bits<uint32_t>(x) & 0x7fffffffu; }
RELNEURON_INLINE uint32_t magnitude(uint16_t x) { return x & 0x7fffu; }
RELNEURON_INLINE bool is_negative(float x) { return same_bits<uint32_t>(x) >> 31; }
RELNEURON_INLINE bool is_negative(uint16_t x) { return x >> 15; }

template <typename Storage>
Magnitudes measure(const AveragePrecisionArgs& args, const Storage* values) {
  uint32_t largest = 0, smallest_less_1 = ~0u;  // zero, less 1, is no smallest
  for (int64_t i = 0; i < args.N; ++i) {
    const uint32_t x = magnitude(values[i]);
    largest = x > largest ? x : largest;
    smallest_less_1 = x - 1 < smallest_less_1 ? x - 1 : smallest_less_1;
  }
  const uint32_t infinity = args.dtype == ValueType::float32    ? 0x7f800000u
                            : args.dtype == ValueType::bfloat16 ? 0x7f80u
                                                                : 0x7c00u;
  const uint32_t exponent = largest >> 23;
  const uint32_t offset = exponent > 127 ? (exponent - 127) << 23 : 0;
  return {largest < infinity, smallest_less_1 >= offset, offset};
}

template <typename Storage>
RELNEURON_INLINE uint32_t labelled(Storage x, uint32_t offset, uint32_t label) {
  const uint32_t above = magnitude(x) > offset ? magnitude(x) - offset : 0;
  const uint32_t descending = (1u << 30) + (is_negative(x) ? above : -above);
  return descending << 1 | (label & 1);
}

// The words of a relation's members, best first; their number. `is_full`: all rows are members.
template <typename Storage>
int64_t sort_labelled(const AveragePrecisionArgs& args, const Work& work, const Storage* values,
                      uint32_t offset, const uint32_t* label_words, int bit, bool is_full) {
  uint32_t* words = reinterpret_cast<uint32_t*>(work.words);
  int64_t n = 0;
  int64_t i = 0;
  if (is_full) {
    for (; i < args.N; ++i) words[i] = labelled(values[i], offset, label_words[i] >> bit);
    n = args.N;
  }
#if defined(__AVX512F__)
  const __m512i member = _mm512_set1_epi32(static_cast<int>(1u << (relations_per_group + bit)));
  for (; i + n_lanes <= args.N; i += n_lanes) {
    uint32_t lanes[n_lanes];
    for (int lane = 0; lane < n_lanes; ++lane) {
      lanes[lane] = labelled(values[i + lane], offset, label_words[i + lane] >> bit);
    }
    const __mmask16 is_member = _mm512_test_epi32_mask(load<__m512i>(label_words + i), member);
    store(words + n, _mm512_maskz_compress_epi32(is_member, load<__m512i>(lanes)));
    n += __builtin_popcount(is_member);
  }
#endif
  for (; i < args.N; ++i) {
    words[n] = labelled(values[i], offset, label_words[i] >> bit);
    n += label_words[i] >> (relations_per_group + bit) & 1;
  }
  args.sort_u32(words, n, nullptr);
  return n;
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
