// The gradient of h of swiglu_stats on a CPU: its arguments and entry points. The spec is
// relneuron/ops/swiglu_stats/gradient.py; bindings.cpp calls `swiglu_gradient`, which runs the kernel
// of one instruction set on each thread's rows and columns.
#pragma once

#include <cstdint>

#include "swiglu_stats.h"

namespace relneuron {

// A null pointer says that the argument was not given, or is not wanted. Strides count elements.
struct SwigluGradientArgs {
  void* d_gate = nullptr;      // (T, F), contiguous
  void* d_up = nullptr;        // (T, F), contiguous
  const void* dh = nullptr;    // (T, F), rows stride_dt apart
  const void* gate = nullptr;  // (T, F), rows stride_gt apart
  const void* up = nullptr;    // (T, F), rows stride_ut apart; null = h is act
  int64_t stride_dt = 0, stride_gt = 0, stride_ut = 0;
  int64_t T = 0, F = 0;
  DType dtype = DType::float32;
  Activation activation = Activation::silu;  // not residual
  const uint32_t* keep = nullptr;            // (C, ceil(F / 32))
  const int32_t* condition_ids = nullptr;    // (T,), null = row 0
};

// The result is the same bit for bit for every n_threads. Throws std::invalid_argument on an unknown
// isa.
void swiglu_gradient(const SwigluGradientArgs& args, const char* isa, int n_threads);

struct SwigluGradientKernel {
  // The columns [f_begin, f_end) of the rows [t_begin, t_end); f_begin is a multiple of column_step.
  void (*part)(const SwigluGradientArgs& args, int64_t t_begin, int64_t t_end, int64_t f_begin,
               int64_t f_end);
};
namespace portable {
extern const SwigluGradientKernel swiglu_gradient_kernel;
}
namespace avx2 {
extern const SwigluGradientKernel swiglu_gradient_kernel;
}
namespace avx512 {
extern const SwigluGradientKernel swiglu_gradient_kernel;
}

}  // namespace relneuron
