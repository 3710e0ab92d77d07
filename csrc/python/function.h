// Functions of the _C module: C++ functions as Python calls them.
//
// They use Python's stable ABI alone, so that one built module serves every version of Python, and are
// cheap: a call of `network` is most of what a short sequence costs. What pybind11 makes is neither.
#pragma once

#include <pyconfig.h>
#ifndef Py_GIL_DISABLED  // these builds of Python have no stable ABI
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "python/tensors.h"

namespace fastbptt::python {

// While it lives, other threads may run Python.
class NoGil {
 public:
  NoGil() = default;
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;
  ~NoGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      // The interpreter is at its end, and ends a thread that comes back by unwinding its stack, which
      // would abort at the first destructor. As from Python 3.14 on, it waits for the process to end.
      for (;;) pause();
    }
  }

 private:
  PyThreadState* const state_ = PyEval_SaveThread();
};

// An argument by its position, from 1 on.
struct Argument {
  PyObject* value;
  int position;

  [[noreturn]] void refuse(const char* wanted) const {
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, "argument ", position, " must be ", wanted);
  }
};

template <typename T>
T from_python(const Argument& argument) {
  PyObject* const value = argument.value;
  if constexpr (std::is_same_v<T, at::Tensor>) {
    if (const at::Tensor* tensor = find_tensor(value)) return *tensor;
    argument.refuse("a Tensor");
  } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
    if (value == Py_None) return std::nullopt;
    if (const at::Tensor* tensor = find_tensor(value)) return *tensor;
    argument.refuse("a Tensor or None");
  } else if constexpr (std::is_same_v<T, bool>) {
    if (value == Py_True || value == Py_False) return value == Py_True;
    argument.refuse("a bool");
  } else if constexpr (std::is_same_v<T, int64_t>) {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) argument.refuse("an int of 64 bits");
    return number;
  } else if constexpr (std::is_same_v<T, double>) {
    const double number = PyFloat_AsDouble(value);
    if (number == -1 && PyErr_Occurred()) argument.refuse("a float");
    return number;
  } else if constexpr (std::is_same_v<T, std::string>) {
    Py_ssize_t size;
    const char* const text = PyUnicode_AsUTF8AndSize(value, &size);
    if (!text) argument.refuse("a str");
    return std::string(text, size_t(size));
  } else {  // a std::vector or a c10::List
    const bool is_list = PyList_Check(value);
    if (!is_list && !PyTuple_Check(value)) argument.refuse("a list or a tuple");
    const Py_ssize_t size = is_list ? PyList_Size(value) : PyTuple_Size(value);
    T result;
    result.reserve(size_t(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* const item = is_list ? PyList_GetItem(value, i) : PyTuple_GetItem(value, i);
      result.push_back(from_python<typename T::value_type>({item, argument.position}));
    }
    return result;
  }
}

inline PyObject* to_python(const at::Tensor& tensor) { return wrap(tensor); }
inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* to_python(const std::string& text) {
  return PyUnicode_FromStringAndSize(text.data(), Py_ssize_t(text.size()));
}

template <typename T>
PyObject* to_python(const std::vector<T>& values) {
  PyObject* const list = PyList_New(Py_ssize_t(values.size()));
  for (size_t i = 0; list && i < values.size(); ++i) {
    PyObject* const item = to_python(values[i]);
    if (!item || PyList_SetItem(list, Py_ssize_t(i), item) != 0) {
      Py_DecRef(list);
      return nullptr;
    }
  }
  return list;
}

template <typename... T>
PyObject* to_python(const std::tuple<T...>& values) {
  PyObject* const tuple = PyTuple_New(sizeof...(T));
  if (!tuple) return nullptr;
  Py_ssize_t next = 0;
  const auto add = [&](PyObject* item) {
    return item && PyTuple_SetItem(tuple, next++, item) == 0;
  };
  if (std::apply([&](const T&... value) { return (add(to_python(value)) && ...); }, values)) {
    return tuple;
  }
  Py_DecRef(tuple);
  return nullptr;
}

// What holds an argument of such a type during the call.
template <typename T>
struct Held {
  using type = T;
};
template <>
struct Held<c10::string_view> {
  using type = std::string;
};
template <>
struct Held<at::TensorList> {
  using type = std::vector<at::Tensor>;
};
template <typename T>
using held_t = typename Held<std::decay_t<T>>::type;

template <typename Result, typename... Args, size_t... I>
PyObject* call(Result (*fn)(Args...), PyObject* const* args, std::index_sequence<I...>) {
  // In braces: an argument after the other.
  const std::tuple<held_t<Args>...> values{from_python<held_t<Args>>({args[I], int(I) + 1})...};
  if constexpr (std::is_void_v<Result>) {
    std::apply(fn, values);
    Py_IncRef(Py_None);
    return Py_None;
  } else {
    return to_python(std::apply(fn, values));
  }
}

template <typename Result, typename... Args>
PyObject* call(Result (*fn)(Args...), PyObject* const* args, Py_ssize_t count) {
  TORCH_CHECK_TYPE(count == Py_ssize_t(sizeof...(Args)), "takes ", sizeof...(Args),
                   " arguments, got ", count);
  return call(fn, args, std::index_sequence_for<Args...>());
}

// A function of the module. Arguments go by position.
template <auto fn>
PyMethodDef function(const char* name, const char* doc) {
  constexpr auto run = [](PyObject*, PyObject* const* args, Py_ssize_t count) -> PyObject* {
    const std::pair<PyObject* const*, Py_ssize_t> given(args, count);
    return with_torchs_errors(
        [](const void* context) {
          const auto& [args, count] = *static_cast<const decltype(given)*>(context);
          return call(fn, args, count);
        },
        &given);
  };
  PyObject* (*const as_function)(PyObject*, PyObject* const*, Py_ssize_t) = run;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(as_function)),
          METH_FASTCALL, doc};
}

}  // namespace fastbptt::python
