#include "python/tensors.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace fastbptt::python {

const at::Tensor* find_tensor(PyObject* object) {
  // Not THPVariable_Check: what it throws takes pybind11's runtime, and with it one version's layouts.
  const int is_tensor =
      THPVariable_CheckExact(object) ? 1 : PyObject_IsInstance(object, THPVariableClass);
  if (is_tensor < 0) PyErr_Clear();
  return is_tensor == 1 ? &THPVariable_Unpack(object) : nullptr;
}

PyObject* wrap(const at::Tensor& tensor) { return THPVariable_Wrap(tensor); }

PyObject* with_torchs_errors(PyObject* (*run)(const void* context), const void* context) {
  HANDLE_TH_ERRORS
  return run(context);
  END_HANDLE_TH_ERRORS
}

}  // namespace fastbptt::python
