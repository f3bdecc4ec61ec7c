// swiglu_stats on a CPU: picks the instruction set and splits the columns over threads; the loops
// are in swiglu_stats_kernel.cpp. Threads split columns, never rows, so every sum is taken in the
// order of the rows and the result does not depend on the number of threads.
#include "swiglu_stats.h"

#include <algorithm>
#include <cfenv>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

namespace relneuron {
namespace {

struct Level {
  const char* name;
  SwigluStatsColumns* run;
  bool works;
};

std::vector<Level> usable_levels() {
  std::vector<Level> levels;
  levels.push_back({"portable", portable::swiglu_stats_columns, true});
#ifdef RELNEURON_HAVE_AVX2
  levels.push_back({"avx2", avx2::swiglu_stats_columns,
                    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")});
#endif
#ifdef RELNEURON_HAVE_AVX512
  levels.push_back({"avx512", avx512::swiglu_stats_columns,
                    __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
#endif
  levels.erase(std::remove_if(levels.begin(), levels.end(), [](const Level& l) { return !l.works; }),
               levels.end());
  return levels;
}

SwigluStatsColumns* find_level(const std::string& isa) {
  const std::vector<Level> levels = usable_levels();
  if (isa.empty()) return levels.back().run;
  for (const Level& level : levels) {
    if (isa == level.name) return level.run;
  }
  throw std::invalid_argument("swiglu_stats: isa must be one of isa_levels(), got " + isa);
}

// Round to nearest with subnormal numbers, whatever the calling thread's mode (torch's
// set_flush_denormal sets it); the old mode comes back at the end.
class DefaultFloatMode {
 public:
  DefaultFloatMode() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatMode() { std::fesetenv(&saved_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  std::fenv_t saved_;
};

// A thread costs some 10 microseconds to start, about what it takes to process this many elements.
// Derived from that, not yet measured.
constexpr int64_t min_elements_per_thread = 1 << 15;
// Threads share no cache line of h: 64 columns are 128 bytes in 16-bit types. Also a multiple of
// 32, as expand_mask asks.
constexpr int64_t column_step = 64;

}  // namespace

std::vector<const char*> isa_levels() {
  std::vector<const char*> names;
  for (const Level& level : usable_levels()) names.push_back(level.name);
  return names;
}

void swiglu_stats(const SwigluStatsArgs& args, const char* isa, int n_threads) {
  SwigluStatsColumns* const run = find_level(isa);
  if (args.tokens) {
    for (int64_t t = 0; t < args.T; ++t) {
      const int32_t group = args.group_ids ? args.group_ids[t] : 0;
      if (group >= 0) args.tokens[group] += 1;
    }
  }
  const auto run_range = [&args, run](int64_t f_begin, int64_t f_end) {
    const DefaultFloatMode mode;
    run(args, f_begin, f_end);
  };

  const int64_t n_steps = (args.F + column_step - 1) / column_step;
  const int64_t worthwhile = std::max<int64_t>(1, args.T * args.F / min_elements_per_thread);
  const int64_t n_parts = std::min({static_cast<int64_t>(std::max(1, n_threads)), n_steps, worthwhile});
  std::vector<std::thread> threads;
  int64_t f_begin = 0;
  for (int64_t part = 0; part + 1 < n_parts; ++part) {
    const int64_t f_end = n_steps * (part + 1) / n_parts * column_step;
    try {
      threads.emplace_back(run_range, f_begin, f_end);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: this one does the rest
    }
    f_begin = f_end;
  }
  run_range(f_begin, args.F);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace relneuron
