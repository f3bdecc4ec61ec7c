// Instruction sets and threads of the CPU ops, see runtime.h.
#include "runtime.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

namespace relneuron {
namespace {

constexpr const char* isa_names[n_isas] = {"portable", "avx2", "avx512"};

#if defined(__x86_64__)
// Whether the processor has all of these features of its pages 1 and 7, and the system saves these
// registers of a thread. __builtin_cpu_supports is in a library that Clang lacks in Visual Studio.
bool has(unsigned of_page_1, unsigned of_page_7, unsigned saved) {
  unsigned a, b, c, d;
  of_page_1 |= bit_OSXSAVE;  // xgetbv is there
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & of_page_1) != of_page_1) return false;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & saved) != saved) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & of_page_7) == of_page_7;
}
#endif

bool is_usable(Isa isa) {
#ifdef RELNEURON_HAVE_AVX2
  constexpr unsigned of_both_7 = bit_BMI | bit_BMI2, of_both_1 = bit_POPCNT;
  if (isa == isa_avx2) return has(of_both_1 | bit_F16C | bit_FMA, of_both_7 | bit_AVX2, 0x06);
#endif
#ifdef RELNEURON_HAVE_AVX512
  constexpr unsigned avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if (isa == isa_avx512) return has(of_both_1, of_both_7 | avx512, 0xe6);
#endif
  return isa == isa_portable;
}

}  // namespace

std::vector<const char*> isa_levels() {
  std::vector<const char*> names;
  for (int isa = 0; isa < n_isas; ++isa) {
    if (is_usable(static_cast<Isa>(isa))) names.push_back(isa_names[isa]);
  }
  return names;
}

Isa find_isa(const char* op, const char* name) {
  const std::string wanted = name;
  for (int isa = n_isas - 1; isa >= 0; --isa) {
    if (!is_usable(static_cast<Isa>(isa))) continue;
    if (wanted.empty() || wanted == isa_names[isa]) return static_cast<Isa>(isa);
  }
  throw std::invalid_argument(std::string(op) + ": isa must be one of isa_levels(), got " + wanted);
}

// The threads are those of torch if it has OpenMP: its idle workers spin for milliseconds after each
// of its ops, and threads of our own would share the cores with them (1.6 times the time between two
// torch ops on two cores). GOMP_parallel is what GCC makes of `omp parallel`, libgomp and LLVM's
// runtime both have it, and torch loads its runtime for all to see.
void run_parallel(void (*run)(void*), void* data, int64_t n_threads) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
#if defined(__unix__) || defined(__APPLE__)
  static const auto omp_parallel =
      reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  static const Parallel omp_parallel = nullptr;
#endif
  if (n_threads == 1) {
    run(data);
  } else if (omp_parallel) {
    omp_parallel(run, data, static_cast<unsigned>(n_threads), 0);
  } else {
    std::vector<std::thread> threads;
    try {
      while (static_cast<int64_t>(threads.size()) + 1 < n_threads) threads.emplace_back(run, data);
    } catch (const std::system_error&) {
      // No more threads to be had: those there are do the rest.
    }
    run(data);
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace relneuron
