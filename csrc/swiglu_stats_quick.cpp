// The quick way into swiglu_stats, for calls of a few tokens, where checks in Python take longer than
// the kernel. It runs a call that is plainly right: plain CPU tensors of the shapes, types and strides
// that the op asks for, ids in range, nothing that is written shares an address range with anything
// else. Every other call it leaves alone, for the slow way (swiglu_stats_checks.py) to run or refuse:
// no mistake has its message here.
#include "swiglu_stats_quick.h"

#include <cstddef>
#include <new>

#include "dlpack_exchange.h"
#include "swiglu_stats.h"

namespace relneuron {
namespace {

// What torch gives once.
struct Torch {
  PyObject* tensor_type = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* requires_grad = nullptr;
  const DLPackExchange* exchange = nullptr;  // null: this torch has none that is known

  Torch() {
    PyObject* const torch = PyImport_ImportModule("torch");
    if (torch) tensor_type = PyObject_GetAttrString(torch, "Tensor");
    Py_XDECREF(torch);
    is_neg = PyUnicode_InternFromString("is_neg");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    PyObject* const capsule =
        tensor_type ? PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__") : nullptr;
    if (capsule) {
      const auto* const found =
          static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule, dlpack_capsule));
      if (found && found->major == dlpack_major) exchange = found;
    }
    Py_XDECREF(capsule);
    if (!is_neg || !requires_grad) exchange = nullptr;
    PyErr_Clear();
  }
};

const Torch& torch_once() {
  static const Torch torch;
  return torch;
}

struct Range {
  const char* begin;
  const char* end;
};

// One call's tensors. A method that returns false has met what the slow way must look at.
class Call {
 public:
  explicit Call(bool grad_enabled) : torch_(torch_once()), grad_enabled_(grad_enabled) {}

  bool is_possible() const { return torch_.exchange != nullptr; }

  // `tensor` as (sizes[0], ..., sizes[ndim - 1]); a size of -1 is taken from it. Rows may have any
  // stride if `any_row_stride`, else all is contiguous.
  bool take(PyObject* object, uint8_t code, uint8_t bits, int ndim, int64_t* sizes, bool is_written,
            bool any_row_stride, DLTensor& tensor) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != torch_.tensor_type) return false;
    if (torch_.exchange->from_object(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (tensor.device_type != dl_cpu || tensor.type_code != code || tensor.type_bits != bits ||
        tensor.type_lanes != 1 || tensor.ndim != ndim || !tensor.data || tensor.byte_offset) {
      return false;
    }
    int64_t last = 0, contiguous = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      const int64_t size = tensor.shape[i], stride = tensor.strides[i];
      if (sizes[i] == -1) sizes[i] = size;
      if (size != sizes[i] || size < 1 || stride < 0) return false;
      const bool is_free = any_row_stride && i == 0 && ndim == 2;
      if (size > 1 && stride != contiguous && !is_free) return false;
      if (is_free && is_written && size > 1 && stride < contiguous) return false;
      contiguous *= size;
      last += (size - 1) * stride;
    }
    if (is_true(object, torch_.is_neg, true)) return false;
    if (grad_enabled_ && code != dl_int && is_true(object, torch_.requires_grad, false)) return false;
    const char* const begin = static_cast<const char*>(tensor.data);
    if (n_ranges_ == max_ranges) return false;
    ranges_[n_ranges_] = {begin, begin + (last + 1) * (bits / 8)};
    is_written_[n_ranges_++] = is_written;
    return true;
  }

  bool are_apart() const {
    for (int i = 0; i < n_ranges_; ++i) {
      for (int j = 0; j < i; ++j) {
        if ((is_written_[i] || is_written_[j]) && ranges_[i].begin < ranges_[j].end &&
            ranges_[j].begin < ranges_[i].end) {
          return false;
        }
      }
    }
    return true;
  }

 private:
  // An attribute, or what a method returns, is not False; what cannot be had counts as true.
  static bool is_true(PyObject* object, PyObject* name, bool is_method) {
    PyObject* const value = is_method ? PyObject_CallMethodNoArgs(object, name)
                                      : PyObject_GetAttr(object, name);
    if (!value) PyErr_Clear();
    const bool result = value != Py_False;
    Py_XDECREF(value);
    return result;
  }

  static constexpr int max_ranges = 3 + 6 + n_sites_max + 4;
  const Torch& torch_;
  const bool grad_enabled_;
  int n_ranges_ = 0;
  Range ranges_[max_ranges] = {};
  bool is_written_[max_ranges] = {};
};

// A tuple of codes of sites, distinct; their number, or -1.
int take_sites(PyObject* codes, int* sites) {
  if (!PyTuple_CheckExact(codes) || PyTuple_GET_SIZE(codes) > n_sites_max) return -1;
  const int n = static_cast<int>(PyTuple_GET_SIZE(codes));
  for (int i = 0; i < n; ++i) {
    const long site = PyLong_AsLong(PyTuple_GET_ITEM(codes, i));
    if (site < 0 || site >= n_sites_max) return -1;
    sites[i] = static_cast<int>(site);
    for (int j = 0; j < i; ++j) {
      if (sites[j] == sites[i]) return -1;
    }
  }
  return n;
}

bool are_within(const int32_t* ids, int64_t n, int32_t low, int64_t high) {
  int32_t smallest = low, largest = low;
  for (int64_t i = 0; i < n; ++i) {
    smallest = ids[i] < smallest ? ids[i] : smallest;
    largest = ids[i] > largest ? ids[i] : largest;
  }
  return smallest >= low && largest < high;
}

// The positions of the arguments; relneuron/ops/swiglu_stats/op.py gives them in this order.
enum Argument {
  arg_gate, arg_up, arg_out, arg_activation, arg_sites, arg_groups, arg_width, arg_threshold_bits,
  arg_count, arg_tokens, arg_sum, arg_sum_sq, arg_max, arg_n_nonfinite, arg_group_ids,
  arg_response_sites, arg_responses, arg_prompt_ids, arg_keep, arg_condition_ids, arg_ids_checked,
  arg_grad_enabled, arg_n_threads, n_arguments
};

bool take_all(PyObject* const* a, Call& call, SwigluStatsArgs& args) {
  const auto is_given = [&](Argument i) { return a[i] != Py_None; };
  DLTensor t;
  // Types by the position in DTYPES of the Python side.
  constexpr uint8_t type_codes[] = {dl_float, dl_bfloat, dl_float}, type_bits[] = {32, 16, 16};
  int dtype = 0;
  int64_t sizes[2];
  for (;; ++dtype) {
    if (dtype == 3) return false;
    sizes[0] = sizes[1] = -1;
    if (call.take(a[arg_gate], type_codes[dtype], type_bits[dtype], 2, sizes, false, true, t)) break;
  }
  const int64_t T = sizes[0], F = sizes[1];
  const auto matrix = [&](Argument i, bool is_written) {
    return call.take(a[i], type_codes[dtype], type_bits[dtype], 2, sizes, is_written, true, t);
  };
  args.dtype = static_cast<DType>(dtype);
  args.T = T;
  args.F = F;
  args.gate = t.data;
  args.stride_gt = t.strides[0];
  args.activation = static_cast<Activation>(PyLong_AsLong(a[arg_activation]));
  if (is_given(arg_up)) {
    if (!matrix(arg_up, false)) return false;
    args.up = t.data;
    args.stride_ut = t.strides[0];
  } else if (args.activation >= Activation::residual) {
    return false;  // of two inputs
  }
  if (is_given(arg_out)) {
    if (!matrix(arg_out, true)) return false;
    args.out = t.data;
    args.stride_ht = t.strides[0];
  }

  const auto ids = [&](Argument i, const int32_t*& address) {
    int64_t n[1] = {T};
    if (!call.take(a[i], dl_int, 32, 1, n, false, false, t)) return false;
    address = static_cast<const int32_t*>(t.data);
    return true;
  };
  const bool ids_checked = a[arg_ids_checked] == Py_True;
  if (is_given(arg_tokens)) {
    args.n_sites = take_sites(a[arg_sites], args.sites);
    int64_t groups[1] = {PyLong_AsLongLong(a[arg_groups])};
    if (args.n_sites < 1 || groups[0] < 1 || PyLong_AsLongLong(a[arg_width]) != F) return false;
    if (!call.take(a[arg_tokens], dl_int, 64, 1, groups, true, false, t)) return false;
    args.G = groups[0];
    args.tokens = static_cast<int64_t*>(t.data);
    args.threshold_bits = static_cast<uint32_t>(PyLong_AsLongLong(a[arg_threshold_bits]));
    const auto statistic = [&](Argument i, uint8_t code, uint8_t bits, auto*& address) {
      int64_t shape[3] = {args.n_sites, args.G, F};
      if (!call.take(a[i], code, bits, 3, shape, true, false, t)) return false;
      address = static_cast<std::remove_reference_t<decltype(address)>>(t.data);
      return true;
    };
    if (!statistic(arg_count, dl_int, 64, args.count)) return false;
    const bool has_moments = is_given(arg_sum);
    if (is_given(arg_sum_sq) != has_moments || is_given(arg_max) != has_moments ||
        is_given(arg_n_nonfinite) != has_moments) {
      return false;
    }
    if (has_moments && !(statistic(arg_sum, dl_float, 64, args.sum) &&
                         statistic(arg_sum_sq, dl_float, 64, args.sum_sq) &&
                         statistic(arg_max, dl_float, 32, args.max) &&
                         statistic(arg_n_nonfinite, dl_int, 64, args.n_nonfinite))) {
      return false;
    }
    if (is_given(arg_group_ids)) {
      if (!ids(arg_group_ids, args.group_ids)) return false;
      if (!ids_checked && !are_within(args.group_ids, T, -1, args.G)) return false;
    } else if (args.G != 1) {
      return false;
    }
  } else if (is_given(arg_group_ids)) {
    return false;
  }

  args.n_responses = take_sites(a[arg_response_sites], args.response_sites);
  if (args.n_responses < 0 || !PyTuple_CheckExact(a[arg_responses]) ||
      PyTuple_GET_SIZE(a[arg_responses]) != args.n_responses ||
      is_given(arg_prompt_ids) != (args.n_responses > 0)) {
    return false;
  }
  int64_t shape[2] = {-1, F};  // the first one's N is that of all
  for (int i = 0; i < args.n_responses; ++i) {
    PyObject* const object = PyTuple_GET_ITEM(a[arg_responses], i);
    if (!call.take(object, dl_float, 32, 2, shape, true, true, t)) return false;
    args.responses[i] = static_cast<float*>(t.data);
    args.strides_rn[i] = t.strides[0];
  }
  if (args.n_responses) {
    if (!ids(arg_prompt_ids, args.prompt_ids)) return false;
    if (!ids_checked && !are_within(args.prompt_ids, T, -1, shape[0])) return false;
  }

  if (is_given(arg_keep)) {
    int64_t words[2] = {-1, (F + 31) / 32};
    if (!call.take(a[arg_keep], dl_int, 32, 2, words, false, false, t)) return false;
    args.keep = static_cast<const uint32_t*>(t.data);
    if (is_given(arg_condition_ids)) {
      if (!ids(arg_condition_ids, args.condition_ids)) return false;
      if (!ids_checked && !are_within(args.condition_ids, T, 0, words[0])) return false;
    }
  } else if (is_given(arg_condition_ids)) {
    return false;
  }
  return call.are_apart();
}

}  // namespace

PyObject* swiglu_stats_quick(PyObject*, PyObject* const* a, Py_ssize_t n) {
  if (n != n_arguments) {
    PyErr_Format(PyExc_TypeError, "swiglu_stats_quick takes %d arguments", n_arguments);
    return nullptr;
  }
  Call call(a[arg_grad_enabled] != Py_False);
  SwigluStatsArgs args;
  const bool is_plain = call.is_possible() && take_all(a, call, args);
  if (PyErr_Occurred()) PyErr_Clear();  // a number that is none: the slow way says so
  if (!is_plain) Py_RETURN_FALSE;
  const int n_threads = static_cast<int>(PyLong_AsLong(a[arg_n_threads]));
  bool has_memory = true;
  Py_BEGIN_ALLOW_THREADS;
  try {
    swiglu_stats(args, "", n_threads);
  } catch (const std::bad_alloc&) {
    has_memory = false;
  }
  Py_END_ALLOW_THREADS;
  if (!has_memory) return PyErr_NoMemory();
  Py_RETURN_TRUE;
}

}  // namespace relneuron
