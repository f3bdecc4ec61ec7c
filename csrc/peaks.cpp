// peaks, merge_peaks and histogram on a CPU: puts the rows of each segment or group together and
// splits the columns over threads; the loops of the first and the last are in peaks_kernel.cpp.
// merge_peaks has its own here: few of its values are better than what is there.
#include "peaks.h"

#include <algorithm>
#include <atomic>

#include "rows_by_group.h"
#include "runtime.h"

namespace relneuron {
namespace {

constexpr const PeaksKernel* kernels[] = RELNEURON_KERNELS(peaks_kernel);

template <typename Args>
void run(const Args& args, void (*columns)(const Args&, const PeaksPlan&, int64_t, int64_t),
         int n_threads) {
  const SwigluStatsArgs& site = args.site;
  const RowsByGroup rows(site.group_ids, site.T, site.G);
  PeaksPlan plan;
  plan.rows = site.group_ids ? rows.rows.data() : nullptr;
  plan.begins = rows.begins.data();
  if (site.dtype != DType::float32) plan.act_table = act_table(site.dtype, site.activation);
  const Parts parts(site, n_threads);
  std::atomic<int64_t> next_part{0};
  auto run_parts = [&] {
    const DefaultFloatMode mode;
    for (int64_t part; (part = next_part++) < parts.n;) {
      columns(args, plan, parts.begin(part), parts.begin(part + 1));
    }
  };
  run_parallel(run_parts, parts.n);
}

// Columns whose lists, and values of all segments, stay in the first-level cache.
constexpr int64_t merge_width = 16;

struct Peak {
  float value;
  int64_t number;
  int32_t position;

  // In the order of BestPeaks. Without their signs numbers and positions of -1, of no peak, are last.
  bool is_before(const Peak& other) const {
    if (value != other.value) return value > other.value;
    if (number != other.number) {
      return static_cast<uint64_t>(number) < static_cast<uint64_t>(other.number);
    }
    return static_cast<uint32_t>(position) < static_cast<uint32_t>(other.position);
  }
};

// Puts a peak into a list of K, if it is before the last one.
void insert(const MergePeaksArgs& args, int64_t list, const Peak& peak) {
  float* const value = args.best_value + list;
  int64_t* const number = args.best_number + list;
  int32_t* const position = args.best_position + list;
  int64_t place = args.K;
  while (place > 0 &&
         peak.is_before({value[place - 1], number[place - 1], position[place - 1]})) {
    --place;
  }
  if (place == args.K) return;
  std::copy_backward(value + place, value + args.K - 1, value + args.K);
  std::copy_backward(number + place, number + args.K - 1, number + args.K);
  std::copy_backward(position + place, position + args.K - 1, position + args.K);
  value[place] = peak.value + 0.0f;  // turns -0 into +0
  number[place] = peak.number;
  position[place] = peak.position;
}

void merge_columns(const MergePeaksArgs& args, int64_t f_begin, int64_t f_end) {
  for (int64_t s = 0; s < args.S; ++s) {
    const int64_t group = args.group_ids ? args.group_ids[s] : 0;
    if (group < 0) continue;
    for (int64_t f = f_begin; f < f_end; ++f) {
      const float value = args.values[s * args.F + f];
      const int64_t list = (group * args.F + f) * args.K;
      // Not so of NaN.
      if (!(value >= args.best_value[list + args.K - 1])) continue;
      const int32_t position = args.positions[s * args.F + f];
      if (position >= 0) insert(args, list, {value, args.numbers[s], position});
    }
  }
}

}  // namespace

void peaks(const PeaksArgs& args, const char* isa, int n_threads) {
  run(args, kernels[find_isa("peaks", isa)]->peaks, n_threads);
}

void histogram(const HistogramArgs& args, const char* isa, int n_threads) {
  run(args, kernels[find_isa("histogram", isa)]->histogram, n_threads);
}

void merge_peaks(const MergePeaksArgs& args, int n_threads) {
  SwigluStatsArgs size;
  size.T = args.S;
  size.F = args.F;
  const Parts parts(size, n_threads);
  std::atomic<int64_t> next_part{0};
  auto run_parts = [&] {
    const DefaultFloatMode mode;
    for (int64_t part; (part = next_part++) < parts.n;) {
      const int64_t end = parts.begin(part + 1);
      for (int64_t f = parts.begin(part); f < end; f += merge_width) {
        merge_columns(args, f, std::min(end, f + merge_width));
      }
    }
  };
  run_parallel(run_parts, parts.n);
}

}  // namespace relneuron
