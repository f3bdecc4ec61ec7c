// The quick way into swiglu_stats, a function of the Python module; see swiglu_stats_quick.cpp.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace relneuron {

// True: the call was run. False: nothing was done, the slow way must run or refuse it.
PyObject* swiglu_stats_quick(PyObject* module, PyObject* const* arguments, Py_ssize_t n);

}  // namespace relneuron
