// The gradient of h of swiglu_stats on a CPU: picks the instruction set and gives each thread rows and
// columns of its own. Every element is computed alone, so no result depends on who has which.
#include "swiglu_gradient.h"

#include <algorithm>
#include <atomic>

#include "runtime.h"

namespace relneuron {
namespace {

constexpr const SwigluGradientKernel* kernels[] = RELNEURON_KERNELS(swiglu_gradient_kernel);

// About what a core does in 10 microseconds, the order of what it costs to wake a thread.
constexpr int64_t part_elements = 1 << 15;

}  // namespace

void swiglu_gradient(const SwigluGradientArgs& args, const char* isa, int n_threads) {
  const SwigluGradientKernel& kernel = *kernels[find_isa("swiglu_gradient", isa)];
  if (args.T == 0 || args.F == 0) return;
  const int64_t columns = (std::min(args.F, part_elements) + column_step - 1) / column_step * column_step;
  const int64_t rows = std::max<int64_t>(1, part_elements / columns);
  const int64_t n_across = (args.F + columns - 1) / columns;
  const int64_t n_parts = (args.T + rows - 1) / rows * n_across;
  std::atomic<int64_t> next_part{0};
  auto run_parts = [&] {
    const DefaultFloatMode mode;
    for (int64_t part; (part = next_part++) < n_parts;) {
      const int64_t t = part / n_across * rows, f = part % n_across * columns;
      kernel.part(args, t, std::min(args.T, t + rows), f, std::min(args.F, f + columns));
    }
  };
  run_parallel(run_parts, std::min<int64_t>(n_threads, n_parts));
}

}  // namespace relneuron
