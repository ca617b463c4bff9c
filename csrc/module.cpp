// The Python module bld_ext._C. The kernels register themselves with the dispatcher when it loads.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch_target"] = BLD_EXT_TORCH_TARGET;
  info["torch_built_with"] = BLD_EXT_TORCH_BUILT_WITH;
  info["cuda"] = BLD_EXT_CUDA;
  info["architectures"] = BLD_EXT_ARCHITECTURES;
#if defined(__clang__)
  info["compiler"] = "Clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "GCC " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  return info;
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of bld_ext, reached as torch.ops.bld_ext.*";
  m.def("build_info", &build_info,
        "How this module was built: oldest torch it runs on, torch and CUDA it was built with, GPU "
        "architectures and compiler. Empty strings where there are no CUDA kernels.");
}
