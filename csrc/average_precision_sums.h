// The sum of a relation along the order of a column: the second half of the CPU kernel of
// average_precision. Included by average_precision_kernel.cpp only (see simd.h).
#pragma once

#include "average_precision_order.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

typedef unsigned __int128 U128;

// The sum is over positives, of TP * I(N), both counted at the end of their tie group. A word of 64
// rows is first moved together to the relation's members, whose places then are their N.

// The sum, and the positives that it has seen.
class Sum {
 public:
  // `list` has list_size + word_rows entries.
  RELNEURON_INLINE Sum(const uint64_t* reciprocals, uint32_t* list)
      : reciprocals_(reciprocals), list_(list) {}

  // All functions are inlined, so that the members stay in registers.
  RELNEURON_INLINE uint64_t n_positive() const {
    return n_done_ + static_cast<uint64_t>(n_listed_);
  }

  // Positives that are tied with nobody: bit k is at N = n_above + k + 1.
  RELNEURON_INLINE void add_singles(uint64_t positives, uint64_t n_above) {
#if defined(__AVX512F__)
    if (n_listed_ > list_size - word_rows) flush();
    __m512i n = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(n_above)),
                                 _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                                   15, 16));
    for (int i = 0; i < word_rows; i += n_lanes) {
      if (i == 32 && positives >> 32 == 0) break;
      const __mmask16 part = static_cast<__mmask16>(positives >> i);
      store(list_ + n_listed_, _mm512_maskz_compress_epi32(part, n));
      n_listed_ += __builtin_popcount(part);
      n = _mm512_add_epi32(n, _mm512_set1_epi32(n_lanes));
    }
#else
    for (; positives; positives &= positives - 1) {
      const auto place = static_cast<uint64_t>(__builtin_ctzll(positives));
      sum_ += static_cast<U128>(++n_done_) * reciprocals_[n_above + place + 1];
    }
#endif
  }

  // n positives of a tie group, at most 64; they count as seen and not yet in the sum.
  RELNEURON_INLINE void skip(int n) {
#if defined(__AVX512F__)
    if (n_listed_ > list_size - word_rows) flush();
    for (int i = 0; i < n; i += n_lanes) store(list_ + n_listed_ + i, _mm512_setzero_si512());
    n_listed_ += n;
#else
    n_done_ += static_cast<uint64_t>(n);
#endif
  }

  // All of a tie group that ends at N = n_above, `n` positives of it that were skipped.
  RELNEURON_INLINE void add_group(uint64_t n, uint64_t n_above) {
    sum_ += static_cast<U128>(n) * (n_positive() * reciprocals_[n_above]);
  }

  RELNEURON_INLINE U128 total() {
    flush();
    return sum_;
  }

 private:
  RELNEURON_INLINE void flush() {
#if defined(__AVX512F__)
    // The terms of eight entries at a time, in two halves. A lane adds up list_size / 8 of them, each
    // less than TP * 2^32: they fit in 64 bits while TP is below 2^25, and N is (bindings.cpp).
    store(list_ + n_listed_, _mm512_setzero_si512());  // I(0) = 0
    __m512i tp = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(n_done_)),
                                  _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8));
    __m512i high = _mm512_setzero_si512(), low = high;
    for (int j = 0; j < n_listed_; j += 8) {
      const __m512i reciprocal = _mm512_i32gather_epi64(load<__m256i>(list_ + j), reciprocals_, 8);
      low = _mm512_add_epi64(low, _mm512_mul_epu32(tp, reciprocal));
      high = _mm512_add_epi64(high, _mm512_mul_epu32(tp, _mm512_srli_epi64(reciprocal, 32)));
      tp = _mm512_add_epi64(tp, _mm512_set1_epi64(8));
    }
    uint64_t parts[16];
    store(parts, low);
    store(parts + 8, high);
    for (int i = 0; i < 8; ++i) sum_ += (static_cast<U128>(parts[8 + i]) << 32) + parts[i];
    n_done_ += static_cast<uint64_t>(n_listed_);
    n_listed_ = 0;
#endif
  }

  const uint64_t* reciprocals_;
  U128 sum_ = 0;
  uint64_t n_done_ = 0;
  int n_listed_ = 0;
  // With AVX-512: N of the positives that are not in the sum yet, 0 of those that were skipped. Their
  // reciprocals are gathered together.
  [[maybe_unused]] uint32_t* list_;
};

// Sorted label words, as bytes: one relation of a group.
struct LabelBytes {
  const uint8_t *positives_, *members_;
  const uint64_t* tied_;
  int bit_;
  RELNEURON_INLINE LabelBytes(const Work& work, const Order& order, int relation)
      : positives_(work.labels[relation / 8]),
        members_(work.labels[2 + relation / 8]),
        tied_(order.tied),
        bit_(relation % 8) {}
  RELNEURON_INLINE uint64_t members(int64_t i) const { return gather_bits(members_ + i, bit_); }
  RELNEURON_INLINE uint64_t positives(int64_t i) const { return gather_bits(positives_ + i, bit_); }
  RELNEURON_INLINE uint64_t tied(int64_t i) const { return tied_[i / word_rows]; }
};

// Sorted words of value and label: all rows are members.
struct LabelledWords {
  const uint32_t* words_;
  int64_t n_;
  RELNEURON_INLINE uint64_t members(int64_t i) const {
    return n_ - i >= word_rows ? ~uint64_t{0} : (uint64_t{1} << (n_ - i)) - 1;
  }
  RELNEURON_INLINE uint64_t positives(int64_t i) const {
    return gather_bits(words_ + i, 0) & members(i);
  }
  RELNEURON_INLINE uint64_t tied(int64_t i) const {
    return equal_neighbours(words_ + i, 1) & pairs_below(i, n_);
  }
};

template <typename Labels>
RELNEURON_INLINE U128 sum_untied(const Labels& labels, int64_t n, const Work& work,
                                 const uint64_t* reciprocals) {
  Sum sum(reciprocals, work.list);
  uint64_t n_above = 0;  // members before this word
  for (int64_t i = 0; i < n; i += word_rows) {
    const uint64_t members = labels.members(i);
    sum.add_singles(extract_bits(labels.positives(i), members), n_above);
    n_above += static_cast<uint64_t>(__builtin_popcountll(members));
  }
  return sum.total();
}

template <typename Labels>
RELNEURON_INLINE U128 sum_tied(const Labels& labels, int64_t n, const Work& work,
                               const uint64_t* reciprocals) {
  Sum sum(reciprocals, work.list);
  uint64_t n_above = 0;
  uint64_t open = 0;   // positives of the last tie group, which may go on in the next word
  uint64_t carry = 0;  // the last member is tied with the rows that follow it
  for (int64_t i = 0; i < n; i += word_rows) {
    const uint64_t members = labels.members(i);
    uint64_t positives = extract_bits(labels.positives(i), members);
    // A tied member is tied with the next one if all rows between them are tied, too: the bit behind
    // it ripples through them as the carry of an addition does, and lands on that member.
    const uint64_t ties = labels.tied(i);
    const uint64_t bridges = ties & ~members, from = ties & members;
    const uint64_t first = from << 1 | carry;
    const uint64_t landed = first + bridges;
    carry = from >> 63 | static_cast<uint64_t>(landed < first);
    if (!members) continue;
    const uint64_t joined = extract_bits(landed & ~bridges, members);
    const int last = __builtin_popcountll(members) - 1;
    const uint64_t starts = ~joined & (~uint64_t{0} >> (63 - last));  // of tie groups
    // Adds the group of the first positives, which ends before place `end`.
    const auto close = [&](int end) RELNEURON_LAMBDA {
      const uint64_t before = (uint64_t{1} << end) - 1;
      const int n_closed = __builtin_popcountll(positives & before);
      sum.skip(n_closed);
      sum.add_group(open + static_cast<uint64_t>(n_closed), n_above + static_cast<uint64_t>(end));
      positives &= ~before;
      open = 0;
    };
    if (open && starts) close(__builtin_ctzll(starts));
    if (!joined) {
      const uint64_t before_last = positives & ((uint64_t{1} << last) - 1);
      sum.add_singles(before_last, n_above);
      positives ^= before_last;
    }
    while (positives) {
      const uint64_t later = starts & -(uint64_t{2} << __builtin_ctzll(positives));
      if (!later) {
        const int n_left = __builtin_popcountll(positives);
        sum.skip(n_left);
        open += static_cast<uint64_t>(n_left);
        break;
      }
      close(__builtin_ctzll(later));
    }
    n_above += static_cast<uint64_t>(last + 1);
  }
  sum.add_group(open, n_above);
  return sum.total();
}

// The label words of a group in order, byte by byte.
RELNEURON_INLINE void order_labels(const uint32_t* words, const Order& order, int64_t n,
                                   const Work& work) {
  for (int64_t i = 0; i < n; i += word_rows) {
#if defined(__AVX512F__)
    // Bytes of four rows side by side, then the fours of 32 rows, then all 64.
    const __m512i fours = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i low_bytes =
        _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i high_bytes = _mm512_add_epi32(low_bytes, _mm512_set1_epi32(2));
    __m512i part[4];
    for (int k = 0; k < 4; ++k) {
      const __m512i rows = load<__m512i>(order.rows + i + 16 * k);
      part[k] = _mm512_shuffle_epi8(_mm512_i32gather_epi32(rows, words, 4), fours);
    }
    for (int k = 0; k < 2; ++k) {
      const __m512i bytes = k ? high_bytes : low_bytes;
      const __m512i first = _mm512_permutex2var_epi32(part[0], bytes, part[1]);
      const __m512i second = _mm512_permutex2var_epi32(part[2], bytes, part[3]);
      store(work.labels[2 * k] + i, _mm512_shuffle_i64x2(first, second, 0x44));
      store(work.labels[2 * k + 1] + i, _mm512_shuffle_i64x2(first, second, 0xee));
    }
#else
    for (int64_t j = i; j < i + word_rows; ++j) {
      const uint32_t word = words[order.rows[j]];
      for (int k = 0; k < 4; ++k) work.labels[k][j] = static_cast<uint8_t>(word >> (8 * k));
    }
#endif
  }
}

// ---- All relations of a group at once, row by row: with weights, and where most rows are tied.

// Both add a row's members and positives to 16 counts each, and say whether it has a positive.
struct LabelRows {
  const uint32_t* words;
  RELNEURON_INLINE bool add(int32_t row, uint32_t* members, uint32_t* positives) const {
    const uint32_t word = words[row];
    for (int r = 0; r < relations_per_group; r += n_lanes) {
      U32 bit;
      for (int lane = 0; lane < n_lanes; ++lane) bit[lane] = static_cast<uint32_t>(r + lane);
      const U32 is_member = (splat(word >> relations_per_group) >> bit) & 1u;
      const U32 is_positive = (splat(word) >> bit) & 1u;
      store(members + r, load<U32>(members + r) + is_member);
      store(positives + r, load<U32>(positives + r) + is_positive);
    }
    return (word & 0xffffu) != 0;
  }
  RELNEURON_INLINE void fetch(int32_t) const {}
};

struct WeightRows {
  const WeightRow* rows;
  RELNEURON_INLINE bool add(int32_t row, uint32_t* members, uint32_t* positives) const {
    const WeightRow& weights = rows[row];
    uint64_t halves[2];
    memcpy(halves, weights.positive, sizeof halves);
    for (int r = 0; r < relations_per_group; ++r) members[r] += weights.weight[r];
    if (!(halves[0] | halves[1])) return false;
    for (int r = 0; r < relations_per_group; ++r) positives[r] += weights.positive[r];
    return true;
  }
  RELNEURON_INLINE void fetch(int32_t row) const { __builtin_prefetch(&rows[row]); }
};

template <typename Rows>
void sum_rows(const Order& order, int64_t n, const Rows& rows, const uint64_t* reciprocals,
              U128 (&sums)[relations_per_group]) {
  uint32_t n_above[relations_per_group] = {}, tp[relations_per_group] = {};
  uint32_t tied_tp[relations_per_group] = {};  // positives of the tie group
  uint64_t high[relations_per_group] = {}, low[relations_per_group] = {};
  bool any_positive = false;  // in the tie group
  constexpr int64_t ahead = 16;
  for (int64_t i = 0; i < n; ++i) {
    rows.fetch(order.rows[i + ahead < n ? i + ahead : i]);
    any_positive |= rows.add(order.rows[i], n_above, tied_tp);
    const bool is_tied = order.tied[i / word_rows] >> (i % word_rows) & 1;
    if (is_tied || !any_positive) continue;
    for (int r = 0; r < relations_per_group; ++r) {
      tp[r] += tied_tp[r];
      const uint64_t term = tp[r] * reciprocals[n_above[r]];
      high[r] += tied_tp[r] * (term >> 31);
      low[r] += tied_tp[r] * (term & 0x7fffffffu);
      tied_tp[r] = 0;
    }
    any_positive = false;
  }
  for (int r = 0; r < relations_per_group; ++r) {
    sums[r] = (static_cast<U128>(high[r]) << 31) + low[r];
  }
}

// S / (2^62 P): as `from_sums` in average_precision.py, step by step.
float from_sum(U128 sum, uint64_t n_positive) {
  const double high = static_cast<double>(static_cast<uint64_t>(sum >> 31));
  const double low = static_cast<double>(static_cast<uint64_t>(sum) & 0x7fffffffu);
  const double total = high * 0x1p31 + low;
  return static_cast<float>(total / (static_cast<double>(n_positive) * 0x1p62));
}

}  // namespace
}  // namespace RELNEURON_ISA
}  // namespace relneuron
