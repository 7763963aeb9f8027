// Importing this module loads the library, whose static initialisers register the CUDA kernels.
#include <Python.h>

#ifndef SAMA_CUDA_ARCH_LIST
#error "setup.py defines SAMA_CUDA_ARCH_LIST"
#endif

extern "C" PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of the sama::* ops.", -1, nullptr, nullptr, nullptr, nullptr,
      nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "ARCH_LIST", SAMA_CUDA_ARCH_LIST) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
