// How tensors that belong to layers are cut into chunks, the unit of work of the layer kernels on
// every device. A chunk's sum depends on nothing but its elements, and a layer's on its chunks in
// order, so that norms are the same bits for any number of threads or blocks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace bld_ext {

struct Chunk { // elements [start, start + size) of a tensor
  int64_t start;
  int32_t tensor, layer, size;
};

struct ChunkTable {
  std::vector<Chunk> chunks;        // layer after layer, inside a layer tensor after tensor
  std::vector<int64_t> first_chunk; // of each layer, and their number: [L + 1]
};

// Elements of a chunk; a variable for the tests' sake.
inline std::atomic<int64_t> chunk_size{8192};

// Every layer gets at least one chunk, an empty one where it has no elements.
inline ChunkTable make_chunks(const std::vector<int64_t> &sizes, const std::vector<int64_t> &layers,
                              int64_t num_layers, int64_t chunk) {
  std::vector<int64_t> first(num_layers + 1, 0), order(sizes.size()); // tensors by layer
  for (int64_t l : layers)
    ++first[l + 1];
  for (int64_t l = 0; l < num_layers; ++l)
    first[l + 1] += first[l];
  std::vector<int64_t> next(first);
  for (size_t i = 0; i < sizes.size(); ++i)
    order[next[layers[i]]++] = static_cast<int64_t>(i);

  ChunkTable table;
  for (int64_t l = 0; l < num_layers; ++l) {
    const int32_t layer = static_cast<int32_t>(l);
    table.first_chunk.push_back(static_cast<int64_t>(table.chunks.size()));
    for (int64_t k = first[l]; k < first[l + 1]; ++k) {
      const int32_t tensor = static_cast<int32_t>(order[k]);
      for (int64_t start = 0; start < sizes[tensor]; start += chunk)
        table.chunks.push_back(
            {start, tensor, layer, static_cast<int32_t>(std::min(chunk, sizes[tensor] - start))});
    }
    if (table.first_chunk.back() == static_cast<int64_t>(table.chunks.size()))
      table.chunks.push_back({0, 0, layer, 0});
  }
  table.first_chunk.push_back(static_cast<int64_t>(table.chunks.size()));
  return table;
}

} // namespace bld_ext
