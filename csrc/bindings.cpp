// The Python module relneuron._cpu: the only file that knows pybind11. Tensors cross as addresses
// (integers) that the Python side has checked; relneuron/ops/swiglu_stats/op.py calls it.
// The interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <numpy/arrayobject.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "average_precision.h"
#include "logprob_gain.h"
#include "peaks.h"
#include "runtime.h"
#include "swiglu_gradient.h"
#include "swiglu_stats.h"
#include "swiglu_stats_quick.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("_cpu: ") + what);
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
  require(activation >= 0 && activation <= static_cast<int>(relneuron::Activation::difference),
          "an activation has a number");
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

// What peaks and histogram read: a site's values, and the segment or group of each row.
relneuron::SwigluStatsArgs site_args(uintptr_t gate, uintptr_t up, int64_t stride_gt,
                                     int64_t stride_ut, int64_t T, int64_t F, int dtype,
                                     int activation, int site, uintptr_t ids, int64_t n_ids) {
  require(dtype >= 0 && dtype <= 2, "dtype must be 0, 1 or 2");
  require(activation >= 0 && activation < static_cast<int>(relneuron::Activation::residual),
          "an activation has a number");
  require(is_site(site), "a site must be in [0, 3]");
  // What is empty has no address.
  require(up || !T || !F || (site != relneuron::site_up && site != relneuron::site_product),
          "the site needs up");
  require(T >= 0 && F >= 0 && n_ids >= 0, "T, F and the number of ids must not be negative");

  relneuron::SwigluStatsArgs args;
  args.gate = pointer<const void>(gate);
  args.up = pointer<const void>(up);
  args.stride_gt = stride_gt;
  args.stride_ut = stride_ut;
  args.T = T;
  args.F = F;
  args.dtype = static_cast<relneuron::DType>(dtype);
  args.activation = static_cast<relneuron::Activation>(activation);
  args.n_sites = 1;
  args.sites[0] = site;
  args.group_ids = pointer<const int32_t>(ids);
  args.G = n_ids;
  return args;
}

void peaks(uintptr_t gate, uintptr_t up, int64_t stride_gt, int64_t stride_ut, int64_t T, int64_t F,
           int dtype, int activation, int site, uintptr_t ids, int64_t n_ids, uintptr_t values,
           uintptr_t positions, int64_t first_row, const std::string& isa, int n_threads) {
  relneuron::PeaksArgs args;
  args.site =
      site_args(gate, up, stride_gt, stride_ut, T, F, dtype, activation, site, ids, n_ids);
  args.values = pointer<float>(values);
  args.positions = pointer<int32_t>(positions);
  args.first_row = first_row;
  const py::gil_scoped_release release;
  relneuron::peaks(args, isa.c_str(), n_threads);
}

void histogram(uintptr_t gate, uintptr_t up, int64_t stride_gt, int64_t stride_ut, int64_t T,
               int64_t F, int dtype, int activation, int site, uintptr_t ids, int64_t n_ids,
               uintptr_t counts, uintptr_t exponent, uintptr_t first, int64_t B,
               const std::string& isa, int n_threads) {
  require(B >= 1 && B <= 4096, "B must be in [1, 4096]");
  relneuron::HistogramArgs args;
  args.site =
      site_args(gate, up, stride_gt, stride_ut, T, F, dtype, activation, site, ids, n_ids);
  args.counts = pointer<int64_t>(counts);
  args.exponent = pointer<const int32_t>(exponent);
  args.first = pointer<const int32_t>(first);
  args.B = B;
  const py::gil_scoped_release release;
  relneuron::histogram(args, isa.c_str(), n_threads);
}

void merge_peaks(uintptr_t values, uintptr_t positions, uintptr_t numbers, uintptr_t group_ids,
                 uintptr_t best_value, uintptr_t best_number, uintptr_t best_position, int64_t S,
                 int64_t F, int64_t K, int n_threads) {
  require(S >= 0 && F >= 0 && K >= 1, "S and F must not be negative, K positive");
  relneuron::MergePeaksArgs args;
  args.values = pointer<const float>(values);
  args.positions = pointer<const int32_t>(positions);
  args.numbers = pointer<const int64_t>(numbers);
  args.group_ids = pointer<const int32_t>(group_ids);
  args.best_value = pointer<float>(best_value);
  args.best_number = pointer<int64_t>(best_number);
  args.best_position = pointer<int32_t>(best_position);
  args.S = S;
  args.F = F;
  args.K = K;
  const py::gil_scoped_release release;
  relneuron::merge_peaks(args, n_threads);
}

void swiglu_gradient(uintptr_t d_gate, uintptr_t d_up, uintptr_t dh, uintptr_t gate, uintptr_t up,
                     int64_t stride_dt, int64_t stride_gt, int64_t stride_ut, int64_t T, int64_t F,
                     int dtype, int activation, uintptr_t keep, uintptr_t condition_ids,
                     const std::string& isa, int n_threads) {
  require(dtype >= 0 && dtype <= 2, "dtype must be 0, 1 or 2");
  require(activation >= 0 && activation < static_cast<int>(relneuron::Activation::residual),
          "an activation has a number");
  require(T >= 0 && F >= 0, "T and F must not be negative");

  relneuron::SwigluGradientArgs args;
  args.d_gate = pointer<void>(d_gate);
  args.d_up = pointer<void>(d_up);
  args.dh = pointer<const void>(dh);
  args.gate = pointer<const void>(gate);
  args.up = pointer<const void>(up);
  args.stride_dt = stride_dt;
  args.stride_gt = stride_gt;
  args.stride_ut = stride_ut;
  args.T = T;
  args.F = F;
  args.dtype = static_cast<relneuron::DType>(dtype);
  args.activation = static_cast<relneuron::Activation>(activation);
  args.keep = pointer<const uint32_t>(keep);
  args.condition_ids = pointer<const int32_t>(condition_ids);

  const py::gil_scoped_release release;
  relneuron::swiglu_gradient(args, isa.c_str(), n_threads);
}

// numpy's sort of an integer type, which is as good as any there is (x86-simd-sort, Highway); a plain
// function that needs neither the interpreter nor its lock.
relneuron::SortFunction numpy_sort(int type) {
  PyArray_Descr* descr = PyArray_DescrFromType(type);
  PyArray_SortFunc* sort = PyDataType_GetArrFuncs(descr)->sort[NPY_QUICKSORT];
  Py_DECREF(descr);
  return sort;
}

bool average_precision(uintptr_t ap, uintptr_t values, int64_t stride_vn, int64_t stride_vm,
                       int64_t N, int64_t M, int dtype, uintptr_t labels, uintptr_t weights,
                       int64_t R, const std::string& isa, int n_threads) {
  require(dtype >= 0 && dtype <= 3, "dtype must be in [0, 3]");
  require(N >= 1 && N <= 1 << 24 && M >= 1 && R >= 1, "N must be in [1, 2^24], M and R positive");

  relneuron::AveragePrecisionArgs args;
  args.ap = pointer<float>(ap);
  args.values = pointer<const void>(values);
  args.stride_vn = stride_vn;
  args.stride_vm = stride_vm;
  args.N = N;
  args.M = M;
  args.dtype = static_cast<relneuron::ValueType>(dtype);
  args.labels = pointer<const int8_t>(labels);
  args.weights = pointer<const uint8_t>(weights);
  args.R = R;
  args.sort_u32 = numpy_sort(NPY_UINT32);
  args.sort_u64 = numpy_sort(NPY_UINT64);

  const py::gil_scoped_release release;
  return relneuron::average_precision(args, isa.c_str(), n_threads);
}

void logprob_gain(uintptr_t values, int64_t stride_vk, int64_t stride_vd, int values_dtype,
                  uintptr_t rows, int64_t K, int64_t D, uintptr_t unembed, int64_t stride_uv,
                  int unembed_dtype, int64_t V, uintptr_t logp, int64_t E, uintptr_t largest,
                  uintptr_t row_start, uintptr_t sentence, uintptr_t t, uintptr_t tilt, uintptr_t z,
                  uintptr_t log_sums, uintptr_t second, uintptr_t third, const std::string& isa,
                  int n_threads) {
  require(values_dtype >= 0 && values_dtype <= 2 && unembed_dtype >= 0 && unembed_dtype <= 2,
          "dtypes must be in [0, 2]");
  require(K >= 1 && D >= 1 && V >= 1 && E >= 1, "K, D, V and E must be positive");
  require((log_sums && row_start && sentence && t && !second) || (second && third && !log_sums),
          "pairs and log_sums, or second and third must be given");
  require(!tilt == !z, "tilt and z go together");

  relneuron::LogprobGainArgs args;
  args.values = pointer<const void>(values);
  args.stride_vk = stride_vk;
  args.stride_vd = stride_vd;
  args.values_dtype = static_cast<relneuron::GainType>(values_dtype);
  args.rows = pointer<const int64_t>(rows);
  args.K = K;
  args.D = D;
  args.unembed = pointer<const void>(unembed);
  args.stride_uv = stride_uv;
  args.unembed_dtype = static_cast<relneuron::GainType>(unembed_dtype);
  args.V = V;
  args.logp = pointer<const float>(logp);
  args.E = E;
  args.largest = pointer<float>(largest);
  args.row_start = pointer<const int64_t>(row_start);
  args.sentence = pointer<const int32_t>(sentence);
  args.t = pointer<const float>(t);
  args.tilt = pointer<const float>(tilt);
  args.z = pointer<const float>(z);
  args.log_sums = pointer<double>(log_sums);
  args.second = pointer<double>(second);
  args.third = pointer<double>(third);

  const py::gil_scoped_release release;
  relneuron::logprob_gain(args, isa.c_str(), n_threads);
}

PyMethodDef quick_methods[] = {
    {"swiglu_stats_quick",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(relneuron::swiglu_stats_quick)),
     METH_FASTCALL, "The kernel of relneuron.ops.swiglu_stats for calls that are plainly right."},
    {nullptr, nullptr, 0, nullptr}};

void import_numpy() {
  if (_import_array() < 0) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  import_numpy();
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
  m.def("peaks", &peaks, py::kw_only(), py::arg("gate").noconvert(), py::arg("up").noconvert(),
        py::arg("stride_gt").noconvert(), py::arg("stride_ut").noconvert(),
        py::arg("T").noconvert(), py::arg("F").noconvert(), py::arg("dtype").noconvert(),
        py::arg("activation").noconvert(), py::arg("site").noconvert(),
        py::arg("ids").noconvert(), py::arg("n_ids").noconvert(),
        py::arg("values").noconvert(), py::arg("positions").noconvert(),
        py::arg("first_row").noconvert(), py::arg("isa").noconvert(),
        py::arg("n_threads").noconvert(),
        "The kernel of relneuron.ops.peaks; addresses are not checked.");
  m.def("histogram", &histogram, py::kw_only(), py::arg("gate").noconvert(), py::arg("up").noconvert(),
        py::arg("stride_gt").noconvert(), py::arg("stride_ut").noconvert(),
        py::arg("T").noconvert(), py::arg("F").noconvert(), py::arg("dtype").noconvert(),
        py::arg("activation").noconvert(), py::arg("site").noconvert(),
        py::arg("ids").noconvert(), py::arg("n_ids").noconvert(),
        py::arg("counts").noconvert(), py::arg("exponent").noconvert(),
        py::arg("first").noconvert(), py::arg("B").noconvert(), py::arg("isa").noconvert(),
        py::arg("n_threads").noconvert(),
        "The kernel of relneuron.ops.histogram; addresses are not checked.");
  m.def("merge_peaks", &merge_peaks, py::kw_only(), py::arg("values").noconvert(),
        py::arg("positions").noconvert(), py::arg("numbers").noconvert(),
        py::arg("group_ids").noconvert(), py::arg("best_value").noconvert(),
        py::arg("best_number").noconvert(), py::arg("best_position").noconvert(),
        py::arg("S").noconvert(), py::arg("F").noconvert(), py::arg("K").noconvert(),
        py::arg("n_threads").noconvert(),
        "The kernel of relneuron.ops.merge_peaks; addresses are not checked.");
  m.def("swiglu_gradient", &swiglu_gradient, py::kw_only(), py::arg("d_gate").noconvert(),
        py::arg("d_up").noconvert(), py::arg("dh").noconvert(), py::arg("gate").noconvert(),
        py::arg("up").noconvert(), py::arg("stride_dt").noconvert(),
        py::arg("stride_gt").noconvert(), py::arg("stride_ut").noconvert(),
        py::arg("T").noconvert(), py::arg("F").noconvert(), py::arg("dtype").noconvert(),
        py::arg("activation").noconvert(), py::arg("keep").noconvert(),
        py::arg("condition_ids").noconvert(), py::arg("isa").noconvert(),
        py::arg("n_threads").noconvert(),
        "The kernel of the gradient of relneuron.ops.swiglu_stats; addresses are not checked.");
  if (PyModule_AddFunctions(m.ptr(), quick_methods) != 0) throw py::error_already_set();
  m.def("average_precision", &average_precision, py::kw_only(), py::arg("ap").noconvert(),
        py::arg("values").noconvert(), py::arg("stride_vn").noconvert(),
        py::arg("stride_vm").noconvert(), py::arg("N").noconvert(), py::arg("M").noconvert(),
        py::arg("dtype").noconvert(), py::arg("labels").noconvert(),
        py::arg("weights").noconvert(), py::arg("R").noconvert(), py::arg("isa").noconvert(),
        py::arg("n_threads").noconvert(),
        "The kernel of relneuron.ops.average_precision; addresses are not checked. False if a "
        "value is not finite.");
  m.def("logprob_gain", &logprob_gain, py::kw_only(), py::arg("values").noconvert(),
        py::arg("stride_vk").noconvert(), py::arg("stride_vd").noconvert(),
        py::arg("values_dtype").noconvert(), py::arg("rows").noconvert(),
        py::arg("K").noconvert(), py::arg("D").noconvert(), py::arg("unembed").noconvert(),
        py::arg("stride_uv").noconvert(), py::arg("unembed_dtype").noconvert(),
        py::arg("V").noconvert(), py::arg("logp").noconvert(), py::arg("E").noconvert(),
        py::arg("largest").noconvert(), py::arg("row_start") = 0, py::arg("sentence") = 0,
        py::arg("t") = 0, py::arg("tilt") = 0, py::arg("z") = 0, py::arg("log_sums") = 0,
        py::arg("second") = 0, py::arg("third") = 0, py::arg("isa").noconvert(),
        py::arg("n_threads").noconvert(),
        "The kernel of relneuron.ops.logprob_gain; addresses are not checked.");
}
