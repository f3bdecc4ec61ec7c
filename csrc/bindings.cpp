// The Python module relneuron._cpu: the only file that knows pybind11. Tensors cross as addresses
// (integers) that the Python side has checked; relneuron/ops/swiglu_stats.py calls it.
// The interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "swiglu_stats.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("_cpu.swiglu_stats: ") + what);
}

bool is_site(int site) { return site >= 0 && site < relneuron::n_sites_max; }

void swiglu_stats(uintptr_t out, uintptr_t gate, uintptr_t up, int64_t stride_ht, int64_t stride_gt,
                  int64_t stride_ut, int64_t T, int64_t F, int dtype, int activation,
                  const std::vector<int>& sites, int64_t G, int32_t threshold_bits, uintptr_t count,
                  uintptr_t tokens, uintptr_t sum, uintptr_t sum_sq, uintptr_t max,
                  uintptr_t n_nonfinite, uintptr_t group_ids,
                  const std::vector<int>& response_sites, const std::vector<uintptr_t>& responses,
                  const std::vector<int64_t>& strides_rn, uintptr_t prompt_ids, uintptr_t keep,
                  uintptr_t condition_ids, const std::string& isa, int n_threads) {
  require(dtype >= 0 && dtype <= 2, "dtype must be 0, 1 or 2");
  require(activation >= 0 && activation <= 4, "activation must be in [0, 4]");
  require(T >= 0 && F >= 0, "T and F must not be negative");
  require(sites.size() <= relneuron::n_sites_max, "at most four sites");
  require(response_sites.size() <= relneuron::n_sites_max, "at most four responses");
  require(responses.size() == response_sites.size() && strides_rn.size() == responses.size(),
          "one response and stride per response site");

  relneuron::SwigluStatsArgs args;
  args.out = pointer<void>(out);
  args.gate = pointer<const void>(gate);
  args.up = pointer<const void>(up);
  args.stride_ht = stride_ht;
  args.stride_gt = stride_gt;
  args.stride_ut = stride_ut;
  args.T = T;
  args.F = F;
  args.dtype = static_cast<relneuron::DType>(dtype);
  args.activation = static_cast<relneuron::Activation>(activation);
  args.n_sites = static_cast<int>(sites.size());
  for (size_t i = 0; i < sites.size(); ++i) {
    require(is_site(sites[i]), "sites must be in [0, 3]");
    args.sites[i] = sites[i];
  }
  args.G = G;
  args.threshold_bits = static_cast<uint32_t>(threshold_bits);
  args.count = pointer<int64_t>(count);
  args.tokens = pointer<int64_t>(tokens);
  args.sum = pointer<double>(sum);
  args.sum_sq = pointer<double>(sum_sq);
  args.max = pointer<float>(max);
  args.n_nonfinite = pointer<int64_t>(n_nonfinite);
  args.group_ids = pointer<const int32_t>(group_ids);
  args.n_responses = static_cast<int>(responses.size());
  for (size_t i = 0; i < responses.size(); ++i) {
    require(is_site(response_sites[i]), "response sites must be in [0, 3]");
    args.response_sites[i] = response_sites[i];
    args.responses[i] = pointer<float>(responses[i]);
    args.strides_rn[i] = strides_rn[i];
  }
  args.prompt_ids = pointer<const int32_t>(prompt_ids);
  args.keep = pointer<const uint32_t>(keep);
  args.condition_ids = pointer<const int32_t>(condition_ids);

  const py::gil_scoped_release release;
  relneuron::swiglu_stats(args, isa.c_str(), n_threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of relneuron; call them through relneuron.ops";
  m.def(
      "isa_levels",
      [] {
        const auto names = relneuron::isa_levels();
        return std::vector<std::string>(names.begin(), names.end());
      },
      "Instruction sets that this build has and this processor can run, the best one last.");
  m.def("swiglu_stats", &swiglu_stats, py::kw_only(), py::arg("out").noconvert(),
        py::arg("gate").noconvert(), py::arg("up").noconvert(), py::arg("stride_ht").noconvert(),
        py::arg("stride_gt").noconvert(), py::arg("stride_ut").noconvert(),
        py::arg("T").noconvert(), py::arg("F").noconvert(), py::arg("dtype").noconvert(),
        py::arg("activation").noconvert(), py::arg("sites").noconvert(), py::arg("G").noconvert(),
        py::arg("threshold_bits").noconvert(), py::arg("count").noconvert(),
        py::arg("tokens").noconvert(), py::arg("sum").noconvert(), py::arg("sum_sq").noconvert(),
        py::arg("max").noconvert(), py::arg("n_nonfinite").noconvert(),
        py::arg("group_ids").noconvert(), py::arg("response_sites").noconvert(),
        py::arg("responses").noconvert(), py::arg("strides_rn").noconvert(),
        py::arg("prompt_ids").noconvert(), py::arg("keep").noconvert(),
        py::arg("condition_ids").noconvert(), py::arg("isa").noconvert(),
        py::arg("n_threads").noconvert(),
        "The kernel of relneuron.ops.swiglu_stats; addresses are not checked.");
}
