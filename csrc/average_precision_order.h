// The order of a column's rows, best first, and which neighbours are tied: the first half of the CPU
// kernel of average_precision. Included by average_precision_kernel.cpp only (see simd.h).
#pragma once

#include "average_precision.h"
#include "simd.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

constexpr int64_t sorted_pad = 64;  // entries behind the last row, so that loops take whole words
constexpr int list_size = 1024;  // of Sum, which says what bounds it

// The order of one column.
struct Order {
  int32_t* rows;   // (padded N,), best first; `N` behind the last one
  uint64_t* tied;  // (padded N / 64,): bit i = the rows at i and i + 1 are tied
  int64_t n_tied;  // bits of `tied`
};

// What a thread works in. Values and words have 2, 4 or 8 bytes.
struct Work {
  unsigned char* tile;    // (columns, padded N + sorted_pad) values, column by column
  unsigned char* column;  // (padded N,) the values of one column, +0 for -0
  unsigned char* sorted;  // (padded N + sorted_pad,) the same in order
  unsigned char* words;   // (padded N + sorted_pad,) what is sorted: a value's rank or bits, the row
  uint64_t* shared;       // (padded N / 64,): bit i = the rows at i and i + 1 share a step
  int32_t* merged;        // (N,)
  uint32_t* list;         // (list_size + word_rows,) see Sum
  uint8_t* labels[4];     // (padded N,) each: the bytes of the label words, in order
  Order* orders;          // (batch,) what is known of sorted columns
};

template <typename Real>
struct Bits;
template <>
struct Bits<float> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
  static constexpr Unsigned exponent = 0x7f800000u;
};
template <>
struct Bits<double> {
  using Unsigned = uint64_t;
  using Signed = int64_t;
  static constexpr Unsigned exponent = 0x7ff0000000000000u;
};

template <typename Word>
struct WordVector;
template <>
struct WordVector<uint32_t> {
  using Type = U32;
};
template <>
struct WordVector<uint64_t> {
  using Type = U64;
};

// Bits as a signed integer in the order of the numbers, and back.
template <typename Signed>
RELNEURON_INLINE Signed in_order(Signed bits) {
  constexpr int top = 8 * sizeof(Signed) - 1;
  constexpr Signed magnitude = static_cast<Signed>(~(Signed{1} << top));
  return bits ^ ((bits >> top) & magnitude);
}

template <typename To, typename From>
RELNEURON_INLINE To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To result;
  memcpy(&result, &x, sizeof x);
  return result;
}

// Bit j = bit `bit` of bytes[j], for 64 bytes.
RELNEURON_INLINE uint64_t gather_bits(const uint8_t* bytes, int bit) {
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(1 << bit));
  return _mm512_test_epi8_mask(load<__m512i>(bytes), mask);
#elif defined(__AVX2__)
  const __m128i shift = _mm_cvtsi32_si128(7 - bit);
  const __m256i low = _mm256_sll_epi16(load<__m256i>(bytes), shift);
  const __m256i high = _mm256_sll_epi16(load<__m256i>(bytes + 32), shift);
  return static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
         static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
#else
  uint64_t result = 0;
  for (int i = 0; i < word_rows; ++i) {
    result |= static_cast<uint64_t>((bytes[i] >> bit) & 1) << i;
  }
  return result;
#endif
}

// The same of 32-bit words.
RELNEURON_INLINE uint64_t gather_bits(const uint32_t* words, int bit) {
  uint64_t result = 0;
  for (int i = 0; i < word_rows; i += n_lanes) {
#if defined(__AVX512F__)
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(1u << bit));
    const __mmask16 part = _mm512_test_epi32_mask(load<__m512i>(words + i), mask);
    result |= static_cast<uint64_t>(part) << i;
#else
    result |= top_bits(load<I32>(words + i) << (31 - bit)) << i;
#endif
  }
  return result;
}

// Bit j: the words j and j + 1 are equal above their lowest `n_low` bits.
template <typename Word>
RELNEURON_INLINE uint64_t equal_neighbours(const Word* words, int n_low) {
  using Vector = typename WordVector<Word>::Type;
  constexpr int n = sizeof(Vector) / sizeof(Word);
  uint64_t result = 0;
  for (int i = 0; i < word_rows; i += n) {
    const Vector difference = load<Vector>(words + i) ^ load<Vector>(words + i + 1);
    result |= top_bits(difference >> n_low == 0) << i;
  }
  return result;
}

// A vector of 32-bit words, or of the lower halves of 64-bit ones.
RELNEURON_INLINE U32 lower_halves(const uint32_t* words) { return load<U32>(words); }
RELNEURON_INLINE U32 lower_halves(const uint64_t* words) {
#if defined(__AVX512F__)
  const __m256i first = _mm512_cvtepi64_epi32(load<__m512i>(words));
  const __m256i second = _mm512_cvtepi64_epi32(load<__m512i>(words + 8));
  return reinterpret_cast<U32>(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
#else
  U32 result;
  for (int lane = 0; lane < n_lanes; ++lane) result[lane] = static_cast<uint32_t>(words[lane]);
  return result;
#endif
}

// to[i] = table[rows[i]] for one vector.
RELNEURON_INLINE void look_up_rows(float* to, const float* table, U32 rows) {
  store(to, look_up(table, rows));
}
RELNEURON_INLINE void look_up_rows(double* to, const double* table, U32 rows) {
#if defined(__AVX512F__)
  const __m512i index = reinterpret_cast<__m512i>(rows);
  store(to, _mm512_i32gather_pd(_mm512_castsi512_si256(index), table, 8));
  store(to + 8, _mm512_i32gather_pd(_mm512_extracti64x4_epi64(index, 1), table, 8));
#else
  for (int lane = 0; lane < n_lanes; ++lane) to[lane] = table[rows[lane]];
#endif
}

// Bit j: the values at j and j + 1 are equal; the first is the smaller one.
struct Neighbours {
  uint64_t tied, inverted;
};

RELNEURON_INLINE Neighbours compare_word(const float* sorted) {
  Neighbours result = {};
  for (int i = 0; i < word_rows; i += n_lanes) {
    const F32 a = load<F32>(sorted + i), b = load<F32>(sorted + i + 1);
    result.tied |= top_bits(a == b) << i;
    result.inverted |= top_bits(a < b) << i;
  }
  return result;
}

RELNEURON_INLINE Neighbours compare_word(const double* sorted) {
  Neighbours result = {};
  for (int i = 0; i < word_rows; i += n_lanes / 2) {
    const F64 a = load<F64>(sorted + i), b = load<F64>(sorted + i + 1);
    result.tied |= top_bits(a == b) << i;
    result.inverted |= top_bits(a < b) << i;
  }
  return result;
}

// Rows from n on are no neighbours of anybody.
RELNEURON_INLINE uint64_t pairs_below(int64_t i, int64_t n) {
  const int64_t n_pairs = n - 1 - i;
  return n_pairs >= word_rows ? ~uint64_t{0} : (uint64_t{1} << n_pairs) - 1;
}

// Sorted words with the whole value in their upper half: equal ones are ties.
template <typename Word>
void read_exact_words(const Work& work, int64_t n, Order& result) {
  constexpr int half = 4 * sizeof(Word);
  const Word* words = reinterpret_cast<const Word*>(work.words);
  for (int64_t i = 0; i < n; i += n_lanes) {
    store(result.rows + i, lower_halves(words + i) & static_cast<uint32_t>((Word{1} << half) - 1));
  }
  result.n_tied = 0;
  for (int64_t i = 0; i < n; i += word_rows) {
    const uint64_t tied = equal_neighbours(words + i, half) & pairs_below(i, n);
    result.tied[i / word_rows] = tied;
    result.n_tied += __builtin_popcountll(tied);
  }
}

// Sorts rows [begin, end) of a run by their full values: by insertion in pieces, which are merged.
template <typename Real>
void sort_run(const Work& work, int64_t begin, int64_t end, int32_t* order) {
  const Real* column = reinterpret_cast<const Real*>(work.column);
  constexpr int64_t piece = 16;
  for (int64_t from = begin; from < end; from += piece) {
    const int64_t to = from + piece < end ? from + piece : end;
    for (int64_t i = from + 1; i < to; ++i) {
      const int32_t row = order[i];
      int64_t j = i;
      for (; j > from && column[order[j - 1]] < column[row]; --j) order[j] = order[j - 1];
      order[j] = row;
    }
  }
  for (int64_t width = piece; width < end - begin; width *= 2) {
    for (int64_t from = begin; from + width < end; from += 2 * width) {
      const int64_t middle = from + width;
      const int64_t to = middle + width < end ? middle + width : end;
      int64_t a = from, b = middle, n_merged = 0;
      while (a < middle && b < to) {
        const bool second = column[order[a]] < column[order[b]];
        work.merged[n_merged++] = second ? order[b++] : order[a++];
      }
      while (a < middle) work.merged[n_merged++] = order[a++];
      memcpy(order + from, work.merged, static_cast<size_t>(n_merged) * sizeof *order);
    }
  }
}

// Which neighbours are tied, from their values; returns how many are in the wrong order.
template <typename Real>
int64_t compare_values(const Work& work, int64_t n, Order& result) {
  const Real* column = reinterpret_cast<const Real*>(work.column);
  Real* sorted = reinterpret_cast<Real*>(work.sorted);
  for (int64_t i = 0; i < n; i += n_lanes) {
    look_up_rows(sorted + i, column, load<U32>(result.rows + i));
  }
  int64_t n_inverted = 0;
  for (int64_t i = 0; i < n; i += word_rows) {
    const Neighbours found = compare_word(sorted + i);
    const uint64_t pairs = pairs_below(i, n);
    result.tied[i / word_rows] = found.tied & pairs;
    result.n_tied += __builtin_popcountll(found.tied & pairs);
    n_inverted += __builtin_popcountll(found.inverted & pairs);
  }
  return n_inverted;
}

// Words of 32 bits of value and 32 of row.
void sort_exactly(const AveragePrecisionArgs& args, const Work& work, Order& result) {
  const float* column = reinterpret_cast<const float*>(work.column);
  uint64_t* words = reinterpret_cast<uint64_t*>(work.words);
  for (int64_t i = 0; i < args.N; ++i) {
    const uint32_t key = static_cast<uint32_t>(in_order(same_bits<int32_t>(column[i])));
    words[i] = static_cast<uint64_t>(key ^ 0x7fffffffu) << 32 | static_cast<uint64_t>(i);
  }
  args.sort_u64(words, args.N, nullptr);
  read_exact_words<uint64_t>(work, args.N, result);
}

// Sorts words of a value's rank among 2^rank_bits equal steps from the largest to the smallest, with
// the row's number below: half the size of value and row. Then rows that share a step are put right by
// their values, unless there are many: then either they are ties, which a look at all values shows, or
// a few values lie far from all others, and `sort_exactly` does it for float.
template <typename Real, typename Word>
void sort_by_steps(const AveragePrecisionArgs& args, const Work& work, int row_bits, Real lowest,
                   Real highest, Order& result) {
  using Signed = typename Bits<Real>::Signed;
  const int64_t n = args.N;
  const Real* column = reinterpret_cast<const Real*>(work.column);
  Word* words = reinterpret_cast<Word*>(work.words);
  constexpr int word_bits = 8 * sizeof(Word);
  constexpr int exact_bits = sizeof(Real) == 4 ? 20 : 50;  // a step's number is exact in Real
  const int rank_bits = word_bits - row_bits < exact_bits ? word_bits - row_bits : exact_bits;
  // Halves, so that the range of finite values is finite. Every step of the formula is monotone.
  const Real top = highest * Real{0.5}, range = top - lowest * Real{0.5};
  const Real steps = static_cast<Real>((Signed{1} << rank_bits) - 1);
  constexpr Real largest = sizeof(Real) == 4 ? Real(__FLT_MAX__) : Real(__DBL_MAX__);
  const Real scale = range > 0 ? (steps / range < largest ? steps / range : largest) : 0;
  for (int64_t i = 0; i < n; ++i) {
    const Signed rank = static_cast<Signed>((top - column[i] * Real{0.5}) * scale);
    words[i] = static_cast<Word>(rank) << row_bits | static_cast<Word>(i);
  }
  (sizeof(Word) == 4 ? args.sort_u32 : args.sort_u64)(words, n, nullptr);
  const Word row_mask = (Word{1} << row_bits) - 1;
  for (int64_t i = n; i < padded(n); ++i) words[i] = 0;  // row 0, so that whole vectors can be read
  int64_t n_shared = 0;
  for (int64_t i = 0; i < n; i += word_rows) {
    for (int64_t j = i; j < i + word_rows; j += n_lanes) {
      store(result.rows + j, lower_halves(words + j) & static_cast<uint32_t>(row_mask));
    }
    const uint64_t shared = equal_neighbours(words + i, row_bits) & pairs_below(i, n);
    work.shared[i / word_rows] = shared;
    result.tied[i / word_rows] = 0;
    n_shared += __builtin_popcountll(shared);
  }
  result.n_tied = 0;
  if (n_shared > n / 8) {
    const int64_t n_inverted = compare_values<Real>(work, n, result);
    if (n_inverted == 0) return;
    if (sizeof(Real) == 4 && n_inverted > n / 16) return sort_exactly(args, work, result);
  }
  int64_t end = 0;
  for (int64_t i = 0; i < n; i += word_rows) {
    for (uint64_t left = work.shared[i / word_rows]; left; left &= left - 1) {
      const int64_t begin = i + __builtin_ctzll(left);
      if (begin < end) continue;
      end = begin + 2;
      if (!(work.shared[(begin + 1) / word_rows] >> ((begin + 1) % word_rows) & 1)) {
        // Nearly all runs are pairs; without branches, as the outcome is anybody's guess.
        int32_t* pair = result.rows + begin;
        const int32_t first = pair[0], second = pair[1];
        const bool is_inverted = column[first] < column[second];
        const uint64_t is_tied = column[first] == column[second];
        pair[0] = is_inverted ? second : first;
        pair[1] = is_inverted ? first : second;
        uint64_t& tied = result.tied[begin / word_rows];
        const int64_t bit = begin % word_rows;
        result.n_tied += static_cast<int64_t>(is_tied) - static_cast<int64_t>(tied >> bit & 1);
        tied = (tied & ~(uint64_t{1} << bit)) | is_tied << bit;
        continue;
      }
      while (work.shared[(end - 1) / word_rows] >> ((end - 1) % word_rows) & 1) ++end;
      sort_run<Real>(work, begin, end, result.rows);
      for (int64_t j = begin; j + 1 < end; ++j) {
        const uint64_t bit = uint64_t{1} << (j % word_rows);
        const bool is_tied = column[result.rows[j]] == column[result.rows[j + 1]];
        result.n_tied += is_tied - ((result.tied[j / word_rows] & bit) != 0);
        result.tied[j / word_rows] = (result.tied[j / word_rows] & ~bit) | (is_tied ? bit : 0);
      }
    }
  }
}

template <typename Real>
bool sort_reals(const AveragePrecisionArgs& args, const Work& work, const Real* values,
                Order& result) {
  using Unsigned = typename Bits<Real>::Unsigned;
  using Signed = typename Bits<Real>::Signed;
  const int64_t n = args.N;
  Real* column = reinterpret_cast<Real*>(work.column);
  Unsigned wrong = 0;
  Signed lowest = in_order(same_bits<Signed>(values[0] + 0)), highest = lowest;
  for (int64_t i = 0; i < n; ++i) {
    const Real value = values[i] + 0;  // turns -0 into +0
    column[i] = value;
    const Unsigned bits = same_bits<Unsigned>(value);
    wrong |= (bits & Bits<Real>::exponent) == Bits<Real>::exponent;
    const Signed key = in_order(static_cast<Signed>(bits));
    lowest = key < lowest ? key : lowest;
    highest = key > highest ? key : highest;
  }
  if (wrong) return false;
  const Real low = same_bits<Real>(in_order(lowest)), high = same_bits<Real>(in_order(highest));
  const int row_bits = n > 1 ? 64 - __builtin_clzll(static_cast<uint64_t>(n - 1)) : 1;
  // With fewer than 18 bits of rank too many rows of a smooth column would share one.
  constexpr int row_bits_max = 14;
  if (sizeof(Real) == 8) {
    sort_by_steps<Real, uint64_t>(args, work, row_bits, low, high, result);
  } else if (row_bits <= row_bits_max) {
    sort_by_steps<Real, uint32_t>(args, work, row_bits, low, high, result);
  } else {
    sort_exactly(args, work, result);
  }
  return true;
}

// bfloat16 and float16: 16 bits of value above 16 of row, or 32 above 32 with more rows than that.
template <typename Word>
bool sort_halves(const AveragePrecisionArgs& args, const Work& work, const uint16_t* values,
                 Order& result) {
  Word* words = reinterpret_cast<Word*>(work.words);
  const uint32_t exponent = args.dtype == ValueType::bfloat16 ? 0x7f80u : 0x7c00u;
  uint32_t wrong = 0;
  for (int64_t i = 0; i < args.N; ++i) {
    const uint32_t bits = values[i] == 0x8000u ? 0u : values[i];
    wrong |= (bits & exponent) == exponent;
    const uint32_t descending = bits & 0x8000u ? bits : bits ^ 0x7fffu;
    words[i] = static_cast<Word>(descending) << (4 * sizeof(Word)) | static_cast<Word>(i);
  }
  if (wrong) return false;
  (sizeof(Word) == 4 ? args.sort_u32 : args.sort_u64)(words, args.N, nullptr);
  read_exact_words<Word>(work, args.N, result);
  return true;
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
