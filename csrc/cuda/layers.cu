// layer_norms, balance_layers_ and balanced_sgd_ on CUDA: one launch that measures all layers, one
// that rescales or updates them. The table they walk stays on the device until a tensor changes.
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "../layers.h"
#include "layers.cuh"

namespace bld_ext {
namespace {

constexpr size_t TABLES = 16; // kept for each stream

// A table and its copy on the device, for launches in one stream or one captured graph: in there
// they follow each other, so that they can share `partials` and `arrived`.
struct DeviceTable : LayerTable {
  int device;
  cudaStream_t stream;
  unsigned long long capture; // 0 outside of graphs
  char *memory = nullptr;
  size_t capacity = 0;
  Walk walk;
};

struct Launch {
  int device;
  cudaStream_t stream;
  unsigned long long capture = 0;

  explicit Launch(const Tensor &tensor) : device(tensor.get_device_index()) {
    void *current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
    cudaStreamCaptureStatus status;
    STD_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture));
    if (status != cudaStreamCaptureStatusActive)
      capture = 0;
  }
  bool uses(const DeviceTable &table) const {
    return table.device == device && table.stream == stream && table.capture == capture;
  }
};

// While it lives, this thread may allocate and copy although its stream is being captured.
struct Uncaptured {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Uncaptured() { STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode)); }
  ~Uncaptured() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

// Copies to the device, in the stream; for a graph once and for all, before it is ever replayed.
void copy_to_device(char *to, const std::vector<char> &from, const Launch &launch) {
  if (!launch.capture) {
    STD_CUDA_CHECK(
        cudaMemcpyAsync(to, from.data(), from.size(), cudaMemcpyHostToDevice, launch.stream));
    return;
  }
  cudaStream_t side;
  STD_CUDA_CHECK(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
  cudaError_t status = cudaMemcpyAsync(to, from.data(), from.size(), cudaMemcpyHostToDevice, side);
  if (status == cudaSuccess)
    status = cudaStreamSynchronize(side);
  cudaStreamDestroy(side);
  STD_CUDA_CHECK(status);
}

void upload(DeviceTable &table, const Launch &launch) {
  std::vector<char> bytes;
  const auto append = [&](const void *data, size_t size) { // returns where
    const size_t at = (bytes.size() + 15) / 16 * 16;
    bytes.resize(at + size);
    if (data)
      std::memcpy(bytes.data() + at, data, size);
    else
      std::memset(bytes.data() + at, 0, size);
    return at;
  };
  const size_t items = append(table.items.data(), table.items.size() * sizeof(Item));
  const size_t chunks = append(table.chunks.data(), table.chunks.size() * sizeof(Chunk));
  const size_t first = append(table.first_chunk.data(), table.first_chunk.size() * sizeof(int64_t));
  const size_t arrived = append(nullptr, table.first_chunk.size() * sizeof(unsigned));
  const size_t partials = (bytes.size() + 15) / 16 * 16;
  const size_t needed = partials + table.chunks.size() * sizeof(double);

  const Uncaptured uncaptured;
  if (needed > table.capacity) {
    if (table.memory) { // never in a graph, whose stream nobody can wait for
      STD_CUDA_CHECK(cudaStreamSynchronize(launch.stream)); // launches still read it
      STD_CUDA_CHECK(cudaFree(table.memory));
      table.memory = nullptr;
      table.capacity = 0;
    }
    STD_CUDA_CHECK(cudaMalloc(reinterpret_cast<void **>(&table.memory), needed));
    table.capacity = needed;
  }
  copy_to_device(table.memory, bytes, launch);
  const auto at = [&](size_t offset) { return static_cast<void *>(table.memory + offset); };
  table.walk = {static_cast<Item *>(at(items)), static_cast<Chunk *>(at(chunks)),
                static_cast<int64_t *>(at(first)), static_cast<double *>(at(partials)),
                static_cast<unsigned *>(at(arrived))};
}

// Held from the search for a table until its launches are in the stream.
std::mutex tables_mutex;

// What a captured graph reads stays for good: a replay cannot say when it was the last one.
DeviceTable &find_table(const std::vector<TensorList *> &lists, const TensorList &measured,
                        const std::vector<int64_t> &layers, int64_t num_layers,
                        const Launch &launch) {
  static std::list<DeviceTable> &tables = *new std::list<DeviceTable>; // outlives the CUDA context
  std::vector<int64_t> key = table_key(lists, layers, num_layers);
  size_t count = 0;
  auto oldest = tables.end();
  for (auto table = tables.begin(); table != tables.end(); ++table)
    if (launch.uses(*table)) {
      if (table->key == key) {
        tables.splice(tables.begin(), tables, table);
        return tables.front();
      }
      ++count;
      oldest = table;
    }
  if (launch.capture || count < TABLES)
    tables.emplace_front();
  else // its memory is written in the stream, after the launches that read it
    tables.splice(tables.begin(), tables, oldest);
  DeviceTable &table = tables.front();
  table.device = launch.device;
  table.stream = launch.stream;
  table.capture = launch.capture;
  try {
    fill_table(table, std::move(key), lists, measured, layers, num_layers);
    BLD_CHECK(table.chunks.size() < INT32_MAX, measured.name,
              ": expected fewer than 2^31 chunks of ", chunk_size.load(), " elements");
    upload(table, launch);
  } catch (...) {
    table.key.clear(); // no call finds it
    throw;
  }
  return table;
}

// Calls run(walk, blocks, stream) with the table of these lists.
template <typename F>
void with_table(const std::vector<TensorList *> &lists, const TensorList &measured,
                const std::vector<int64_t> &layers, int64_t num_layers, const F &run) {
  const torch::stable::accelerator::DeviceGuard guard(measured.tensors[0].get_device_index());
  const Launch launch(measured.tensors[0]);
  const std::lock_guard lock(tables_mutex);
  const DeviceTable &table = find_table(lists, measured, layers, num_layers, launch);
  run(table.walk, static_cast<unsigned>(table.chunks.size()), launch.stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Scalar scalar(const char *name, const Tensor &tensor, const Tensor &on) {
  BLD_CHECK(tensor.dim() == 0 && tensor.scalar_type() == ScalarType::Double, name,
            ": expected a float64 scalar");
  if (!tensor.is_cpu()) {
    BLD_CHECK(tensor.device() == on.device(), name,
              ": expected a scalar on the tensors' device or the CPU");
    return {static_cast<const double *>(tensor.const_data_ptr()), 0};
  }
  const double value = *static_cast<const double *>(tensor.const_data_ptr());
  BLD_CHECK(value >= 0 && std::isfinite(value), name,
            ": expected a finite number, at least 0, got ", value);
  return {nullptr, value};
}

Tensor new_norms(const TensorList &measured, int64_t L) {
  return torch::stable::new_empty(measured.tensors[0], std::vector<int64_t>{L},
                                  norm_dtype(measured));
}

Tensor layer_norms(std::vector<Tensor> tensors, std::vector<int64_t> layers, int64_t num_layers) {
  TensorList list{"tensors", std::move(tensors), false};
  check_lists({&list}, layers, num_layers);
  align({&list});
  Tensor norms = new_norms(list, num_layers);
  Result result{};
  result.norms = norms.mutable_data_ptr();
  result.is_double = norms.scalar_type() == ScalarType::Double;
  with_table({&list}, list, layers, num_layers,
             [&](const Walk &walk, unsigned blocks, cudaStream_t stream) {
               measure_kernel<<<blocks, THREADS, 0, stream>>>(walk, result);
             });
  return norms;
}

// What balance_layers_ and balanced_sgd_ have in common; lists[0] is what is written.
template <typename Change>
std::tuple<Tensor, Tensor> balance(const std::vector<TensorList *> &lists, TensorList &measured,
                                   const std::vector<int64_t> &layers,
                                   const Tensor &reference_norms, const Tensor &balance_,
                                   const Change &change) {
  BLD_CHECK(reference_norms.dim() == 1, "reference_norms: expected one norm a layer, [L]");
  const Dtype reference_dtype = dtype_of("reference_norms", reference_norms);
  const int64_t L = reference_norms.numel();
  check_lists(lists, layers, L);
  BLD_CHECK(reference_norms.device() == measured.tensors[0].device(),
            "reference_norms: expected the tensors' device");
  const Scalar lambda = scalar("balance", balance_, measured.tensors[0]);
  const Tensor reference = torch::stable::contiguous(reference_norms);
  align(lists);

  Tensor factors = new_norms(measured, L), norms = new_norms(measured, L);
  const Result result{norms.mutable_data_ptr(),
                      factors.mutable_data_ptr(),
                      norms.scalar_type() == ScalarType::Double,
                      {const_cast<void *>(reference.const_data_ptr()), reference_dtype},
                      lambda};
  with_table(lists, measured, layers, L,
             [&](const Walk &walk, unsigned blocks, cudaStream_t stream) {
               change(walk, result, blocks, stream);
             });
  write_back(*lists[0]);
  return {factors, norms};
}

// Whether balance_layers_ is one cooperative launch instead of two launches. It is not the default:
// it is predicted to be faster, but neither has been timed.
bool in_one_launch() {
  const char *value = std::getenv("BLD_EXT_ONE_LAUNCH");
  return value && std::strcmp(value, "1") == 0;
}

// The most blocks of balance_kernel that the current device runs at once.
unsigned most_blocks() {
  constexpr int kept = KEPT * KEPT_BYTES;
  int device, multiprocessors, each;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(balance_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kept));
  STD_CUDA_CHECK(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, balance_kernel, THREADS, kept));
  return multiprocessors * each;
}

void measure_and_rescale(const Walk &walk, const Result &result, unsigned chunks,
                         cudaStream_t stream) {
  if (!in_one_launch()) {
    measure_kernel<<<chunks, THREADS, 0, stream>>>(walk, result);
    rescale_kernel<<<chunks, THREADS, 0, stream>>>(walk, result);
    return;
  }
  Walk walked = walk;
  Result found = result;
  void *arguments[] = {&walked, &found, &chunks};
  STD_CUDA_CHECK(cudaLaunchCooperativeKernel(balance_kernel, std::min(chunks, most_blocks()),
                                             THREADS, arguments, KEPT * KEPT_BYTES, stream));
}

std::tuple<Tensor, Tensor> balance_layers_(std::vector<Tensor> grads, std::vector<int64_t> layers,
                                           const Tensor &reference_norms, const Tensor &balance_) {
  TensorList list{"grads", std::move(grads), true};
  return balance({&list}, list, layers, reference_norms, balance_, &measure_and_rescale);
}

std::tuple<Tensor, Tensor> balanced_sgd_(std::vector<Tensor> params,
                                         std::vector<Tensor> distill_grads,
                                         std::vector<Tensor> new_grads, std::vector<int64_t> layers,
                                         const Tensor &reference_norms, const Tensor &balance_,
                                         const Tensor &lr) {
  TensorList param{"params", std::move(params), true};
  TensorList old_grad{"distill_grads", std::move(distill_grads), false};
  TensorList new_grad{"new_grads", std::move(new_grads), false};
  BLD_CHECK(!old_grad.tensors.empty(), "params: expected at least one tensor, got none");
  const Scalar rate = scalar("lr", lr, old_grad.tensors[0]);
  const auto update = [&](const Walk &walk, const Result &result, unsigned blocks,
                          cudaStream_t stream) {
    measure_kernel<<<blocks, THREADS, 0, stream>>>(walk, result);
    update_kernel<<<blocks, THREADS, 0, stream>>>(walk, result, rate);
  };
  return balance({&param, &old_grad, &new_grad}, old_grad, layers, reference_norms, balance_,
                 update);
}

STABLE_TORCH_LIBRARY_IMPL(bld_ext, CUDA, m) {
  m.impl("layer_norms", TORCH_BOX(&layer_norms));
  m.impl("balance_layers_", TORCH_BOX(&balance_layers_));
  m.impl("balanced_sgd_", TORCH_BOX(&balanced_sgd_));
}

} // namespace
} // namespace bld_ext
