// What every op on a CPU shares: the instruction sets, the float mode, the threads. The ops' own files
// (<op>.cpp) use it; kernel files, compiled once per instruction set, do not.
#pragma once

#include <cfenv>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace relneuron {

// In the order of preference.
enum Isa : int { isa_portable = 0, isa_avx2 = 1, isa_avx512 = 2, n_isas = 3 };

// The instruction sets that this build has and this processor can run, the best one last.
std::vector<const char*> isa_levels();

// The one that `name` says, the best one if it is empty. Throws std::invalid_argument on a name that
// isa_levels() does not have.
Isa find_isa(const char* op, const char* name);

// An op's kernels by Isa, null where this build has none:
//   constexpr const Kernel* kernels[] = RELNEURON_KERNELS(my_kernel);
#ifdef RELNEURON_HAVE_AVX2
#define RELNEURON_KERNEL_AVX2(name) &avx2::name
#else
#define RELNEURON_KERNEL_AVX2(name) nullptr
#endif
#ifdef RELNEURON_HAVE_AVX512
#define RELNEURON_KERNEL_AVX512(name) &avx512::name
#else
#define RELNEURON_KERNEL_AVX512(name) nullptr
#endif
#define RELNEURON_KERNELS(name) \
  { &portable::name, RELNEURON_KERNEL_AVX2(name), RELNEURON_KERNEL_AVX512(name) }

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

// Calls run(data) in up to n_threads threads at once, this one among them.
void run_parallel(void (*run)(void*), void* data, int64_t n_threads);

template <typename Function>
void run_parallel(Function& function, int64_t n_threads) {
  run_parallel([](void* data) { (*static_cast<Function*>(data))(); }, &function, n_threads);
}

// Memory that begins at a cache line.
struct AlignedDelete {
  void operator()(unsigned char* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<unsigned char, AlignedDelete>;

inline Scratch make_scratch(int64_t n_bytes) {
  return Scratch(static_cast<unsigned char*>(
      ::operator new(static_cast<size_t>(n_bytes), std::align_val_t(64))));
}

}  // namespace relneuron
