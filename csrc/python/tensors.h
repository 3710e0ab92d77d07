// What of torch's Python side the _C module needs. That side's headers know the layouts of one version
// of Python: they are in tensors.cpp alone, which uses nothing that differs between versions.
#pragma once

#include <ATen/core/Tensor.h>

typedef struct _object PyObject;

namespace fastbptt::python {

// The tensor that an object is, or null.
const at::Tensor* find_tensor(PyObject* object);

// A new reference, to None if the tensor is undefined; null after an error, which is set.
PyObject* wrap(const at::Tensor& tensor);

// run(context), whose C++ exceptions become Python's and whose warnings are given as Python's. Null
// after an error, which is set.
PyObject* with_torchs_errors(PyObject* (*run)(const void* context), const void* context);

}  // namespace fastbptt::python
