// The Python module bld_ext._C. The kernels register themselves with the dispatcher when it loads.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "chunks.h"

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

using Chunks = std::vector<std::tuple<int64_t, int64_t, int64_t>>;

std::pair<Chunks, std::vector<int64_t>> make_chunks(const std::vector<int64_t> &sizes,
                                                    const std::vector<int64_t> &layers,
                                                    int64_t num_layers, int64_t chunk_size) {
  if (sizes.size() != layers.size())
    throw py::value_error("layers: expected one index a size");
  for (int64_t layer : layers)
    if (layer < 0 || layer >= num_layers)
      throw py::value_error("layers: expected indices below num_layers, got " +
                            std::to_string(layer));
  if (chunk_size < 1 || chunk_size > INT32_MAX)
    throw py::value_error("chunk_size: expected 1 to 2**31 - 1 elements, got " +
                          std::to_string(chunk_size));
  const bld_ext::ChunkTable table = bld_ext::make_chunks(sizes, layers, num_layers, chunk_size);
  Chunks chunks;
  for (const bld_ext::Chunk &chunk : table.chunks)
    chunks.emplace_back(chunk.tensor, chunk.start, chunk.size);
  return {chunks, table.first_chunk};
}

int64_t set_chunk_size(int64_t size) {
  if (size < 1 || size > INT32_MAX)
    throw py::value_error("size: expected 1 to 2**31 - 1 elements, got " + std::to_string(size));
  return bld_ext::chunk_size.exchange(size);
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of bld_ext, reached as torch.ops.bld_ext.*";
  m.def("build_info", &build_info,
        "How this module was built: oldest torch it runs on, torch and CUDA it was built with, GPU "
        "architectures and compiler. Empty strings where there are no CUDA kernels.");
  m.def(
      "make_chunks", &make_chunks, py::arg("sizes"), py::arg("layers"), py::arg("num_layers"),
      py::arg("chunk_size"),
      "How the layer kernels cut tensors of these sizes into work: [(tensor, start, size)], layer "
      "after layer, and the first chunk of each layer with their number at the end.");
  m.def("set_chunk_size", &set_chunk_size, py::arg("size"),
        "Elements of a chunk from now on, for tests; returns what it was.");
}
