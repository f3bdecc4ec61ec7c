// average_precision on a CPU for one instruction set (RELNEURON_ISA): columns are loaded, sorted once
// (average_precision_order.h; with few relations once for each, average_precision_labelled.h), and
// every relation is counted along that order (average_precision_sums.h). average_precision.cpp calls it
// for each thread's columns. As in every kernel file, nothing here comes from headers that have inline
// functions.
#include "average_precision.h"

#include "average_precision_labelled.h"
#include "average_precision_order.h"
#include "average_precision_sums.h"

namespace relneuron {
namespace RELNEURON_ISA {
namespace {

#if defined(__AVX512F__)
// Rows of other pages are not fetched by the processor's own guess: 3 % of the time of wide matrices.
constexpr int64_t rows_ahead = 32;

// 16 rows of 16 neighbouring values become 16 columns: to interleave the first half of the rows with
// the second one four times is to transpose them.
RELNEURON_INLINE void transpose(const float* from, int64_t stride_from, float* to,
                                int64_t stride_to) {
  F32 x[16];
  for (int i = 0; i < 16; ++i) {
    x[i] = load<F32>(from + i * stride_from);
    __builtin_prefetch(from + (i + rows_ahead) * stride_from);
  }
  for (int half = 8; half >= 1; half /= 2) {
    F32 y[16];
    for (int i = 0; i < 16; ++i) y[i] = x[i];
    for (int i = 0; i < 8; ++i) {
      interleave(y[i], y[i + 8]);
      x[2 * i] = y[i];
      x[2 * i + 1] = y[i + 8];
    }
  }
  for (int i = 0; i < 16; ++i) store(to + i * stride_to, x[i]);
}
#endif

// Copies columns next to each other, the rows of each one after another.
template <typename Storage>
void load_tile(const AveragePrecisionArgs& args, int64_t m_begin, int64_t n_columns, Storage* tile,
               int64_t stride) {
  const Storage* values = static_cast<const Storage*>(args.values) + m_begin * args.stride_vm;
  int64_t first = 0;  // of the columns that are left
#if defined(__AVX512F__)
  if (sizeof(Storage) == 4 && args.stride_vm == 1) {
    const float* from = reinterpret_cast<const float*>(values);
    float* to = reinterpret_cast<float*>(tile);
    const int64_t n_blocks = n_columns / 16;
    int64_t i = 0;
    for (; i + 16 <= args.N; i += 16) {
      for (int64_t m = 0; m < 16 * n_blocks; m += 16) {
        transpose(from + i * args.stride_vn + m, args.stride_vn, to + m * stride + i, stride);
      }
    }
    for (; i < args.N; ++i) {
      for (int64_t m = 0; m < 16 * n_blocks; ++m) to[m * stride + i] = from[i * args.stride_vn + m];
    }
    first = 16 * n_blocks;
  }
#endif
  if (first == n_columns) return;
  for (int64_t i = 0; i < args.N; ++i, values += args.stride_vn) {
    for (int64_t m = first; m < n_columns; ++m) tile[m * stride + i] = values[m * args.stride_vm];
  }
}

int64_t tile_stride(int64_t n) { return padded(n) + sorted_pad; }

const uint32_t* labels_of(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan,
                          int64_t group) {
  return plan.label_words + group * label_stride(args.N);
}

enum class Outcome { counted, not_finite, not_possible };

// All relations of a column, each one sorted by itself.
template <typename Storage>
Outcome count_directly(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan,
                       const Work& work, const Storage* values, int64_t m) {
  const Magnitudes magnitudes = measure(args, values);
  if (!magnitudes.is_finite) return Outcome::not_finite;
  if (!magnitudes.fits) return Outcome::not_possible;
  for (int64_t r = 0; r < args.R; ++r) {
    const uint32_t* labels = labels_of(args, plan, r / relations_per_group);
    const int64_t n = sort_labelled(args, work, values, magnitudes.offset, labels,
                                    static_cast<int>(r % relations_per_group),
                                    plan.n_members[r] == args.N);
    const LabelledWords words{reinterpret_cast<const uint32_t*>(work.words), n};
    const U128 sum = sum_tied(words, n, work, plan.reciprocals);
    args.ap[r * args.M + m] = from_sum(sum, plan.n_positive[r]);
  }
  return Outcome::counted;
}
Outcome count_directly(const AveragePrecisionArgs&, const AveragePrecisionPlan&, const Work&,
                       const double*, int64_t) {
  return Outcome::not_possible;
}

template <typename Storage, typename Sort>
bool count_columns(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan,
                   int64_t m_begin, int64_t m_end, const Work& work, Sort sort) {
  const int64_t n = args.N, n_padded = padded(n);
  const bool is_copied = args.stride_vn != 1;
  Storage* tile = reinterpret_cast<Storage*>(work.tile);
  if (is_copied) load_tile(args, m_begin, m_end - m_begin, tile, tile_stride(n));
  for (int64_t m = m_begin; m < m_end; m += plan.batch_columns) {
    const int64_t n_batch = plan.batch_columns < m_end - m ? plan.batch_columns : m_end - m;
    bool is_counted = false;
    for (int64_t c = 0; c < n_batch; ++c) {
      const Storage* column = is_copied
                                  ? tile + (m - m_begin + c) * tile_stride(n)
                                  : static_cast<const Storage*>(args.values) + (m + c) * args.stride_vm;
      if (plan.is_direct) {
        const Outcome outcome = count_directly(args, plan, work, column, m + c);
        if (outcome == Outcome::not_finite) return false;
        is_counted = outcome == Outcome::counted;
        if (is_counted) continue;
      }
      Order& order = work.orders[c];
      if (!sort(args, work, column, order)) return false;
      // Behind the last row is one that no relation has.
      for (int64_t i = n; i < n_padded; ++i) order.rows[i] = static_cast<int32_t>(n);
    }
    for (int64_t group = 0; !is_counted && group < plan.n_groups; ++group) {
      const int64_t first = group * relations_per_group;
      const int n_relations = static_cast<int>(
          args.R - first < relations_per_group ? args.R - first : relations_per_group);
      for (int64_t c = 0; c < n_batch; ++c) {
        const Order& order = work.orders[c];
        U128 sums[relations_per_group];
        if (plan.weight_rows) {
          sum_rows(order, n, WeightRows{plan.weight_rows + group * n}, plan.reciprocals, sums);
        } else if (order.n_tied > n / 2) {
          sum_rows(order, n, LabelRows{labels_of(args, plan, group)}, plan.reciprocals, sums);
        } else {
          order_labels(labels_of(args, plan, group), order, n, work);
          for (int r = 0; r < n_relations; ++r) {
            const LabelBytes labels(work, order, r);
            sums[r] = order.n_tied ? sum_tied(labels, n, work, plan.reciprocals)
                                   : sum_untied(labels, n, work, plan.reciprocals);
          }
        }
        for (int r = 0; r < n_relations; ++r) {
          args.ap[(first + r) * args.M + m + c] = from_sum(sums[r], plan.n_positive[first + r]);
        }
      }
    }
  }
  return true;
}

constexpr int64_t value_bytes_max = 8;

// Gives the parts of the scratch their places; returns its size.
int64_t lay_out(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan,
                unsigned char* scratch, Work& work) {
  const int64_t n = padded(args.N), batch = plan.batch_columns;
  int64_t at = 0;
  const auto take = [&](auto*& part, int64_t n_entries, int64_t bytes) {
    part = reinterpret_cast<decltype(part + 0)>(scratch + at);
    at += (n_entries * bytes + 63) / 64 * 64;
  };
  const int64_t element = args.dtype == ValueType::float64   ? 8
                          : args.dtype == ValueType::float32 ? 4
                                                             : 2;
  take(work.tile, args.stride_vn == 1 ? 0 : plan.block_columns * tile_stride(args.N), element);
  take(work.column, n, value_bytes_max);
  take(work.sorted, n + sorted_pad, value_bytes_max);
  take(work.words, n + sorted_pad, value_bytes_max);
  take(work.shared, n / word_rows, sizeof *work.shared);
  take(work.merged, n, sizeof *work.merged);
  take(work.list, list_size + word_rows, sizeof *work.list);
  for (uint8_t*& bytes : work.labels) take(bytes, n, 1);
  take(work.orders, batch, sizeof *work.orders);
  for (int64_t c = 0; c < batch; ++c) {
    Order order;
    take(order.rows, n, sizeof *order.rows);
    take(order.tied, n / word_rows, sizeof *order.tied);
    if (scratch) work.orders[c] = order;
  }
  return at;
}

int64_t scratch_bytes(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan) {
  Work work;
  return lay_out(args, plan, nullptr, work);
}

bool columns(const AveragePrecisionArgs& args, const AveragePrecisionPlan& plan, int64_t m_begin,
             int64_t m_end, unsigned char* scratch) {
  Work work;
  lay_out(args, plan, scratch, work);
  if (args.dtype == ValueType::float32) {
    return count_columns<float>(args, plan, m_begin, m_end, work, sort_reals<float>);
  }
  if (args.dtype == ValueType::float64) {
    return count_columns<double>(args, plan, m_begin, m_end, work, sort_reals<double>);
  }
  constexpr int64_t rows_of_16_bits = 65536;
  return args.N <= rows_of_16_bits
             ? count_columns<uint16_t>(args, plan, m_begin, m_end, work, sort_halves<uint32_t>)
             : count_columns<uint16_t>(args, plan, m_begin, m_end, work, sort_halves<uint64_t>);
}

}  // namespace

const AveragePrecisionKernel average_precision_kernel = {columns, scratch_bytes};

}  // namespace RELNEURON_ISA
}  // namespace relneuron
