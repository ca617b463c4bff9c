// A CUDA that runs on the CPU, enough of it for the layer kernels: blocks one after the other in
// any order, the threads of a block as fibers that meet at barriers. It finds wrong indices,
// missing barriers (the threads take turns in an order that changes) and barriers that not all
// threads reach. The blocks of a cooperative launch stop at grid.sync until all are there.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __isGlobal(pointer) true
#define __isShared(pointer) true
#define __builtin_assume(condition) ((void)(condition))

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, gridDim;

namespace emulator {

struct State {
  void *stream = nullptr;
  unsigned long long capture = 0;
  unsigned seed = 0;
  int64_t launches = 0, allocations = 0, copies = 0;
  int64_t shared_limit = 48 << 10, occupancy_for = -1; // as the host set it, and asked for
};
inline State state;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
  const char *barrier = "";
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared; // the launch's dynamic shared memory
};
constexpr const char *GRID = "grid.sync", *SHUFFLE = "shuffle";
constexpr int MULTIPROCESSORS = 3, BLOCKS = 2; // and the blocks that fit on each
constexpr size_t GUARD = 4096;                 // bytes behind shared memory that nobody may write
inline ucontext_t scheduler;
inline Block *block;                        // that runs
inline std::function<void()> body, between; // what a test does while all blocks are at grid.sync

inline char *dynamic_shared() { return block->shared.data(); }

inline void run_fiber() {
  body();
  block->fibers[threadIdx.x].done = true;
}

inline void wait_at(const char *barrier) {
  Fiber &fiber = block->fibers[threadIdx.x];
  fiber.barrier = barrier;
  swapcontext(&fiber.context, &scheduler);
}

inline std::vector<unsigned> any_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(state.seed++));
  return order;
}

inline void begin(Block &started, unsigned threads, size_t shared) {
  started.shared.assign(shared + GUARD, char(0xff)); // nan
  started.fibers.resize(threads);
  for (Fiber &fiber : started.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

inline bool waits_for(const Fiber &fiber, const char *what) {
  return !fiber.done && std::strncmp(fiber.barrier, what, std::strlen(what)) == 0;
}

// Runs threads until each of them is at its end or at a barrier, the same for all.
inline void run_threads(unsigned first, unsigned count) {
  const std::vector<Fiber> &fibers = block->fibers;
  for (unsigned t : any_order(count)) {
    threadIdx.x = first + t;
    swapcontext(&scheduler, &block->fibers[first + t].context);
  }
  for (unsigned t = first; t < first + count; ++t)
    if (fibers[t].done != fibers[first].done ||
        (!fibers[t].done && std::strcmp(fibers[t].barrier, fibers[first].barrier) != 0))
      throw std::runtime_error("the threads of a warp are not at the same barrier");
}

// Runs a block to its end, or to where it waits for all others; returns whether that is its end.
// A warp shuffles by itself and goes as far as the next barrier of the block before another begins.
inline bool run_block(Block &running) {
  block = &running;
  const std::vector<Fiber> &fibers = running.fibers;
  do {
    for (unsigned warp : any_order(fibers.size() / 32))
      do
        run_threads(32 * warp, 32);
      while (waits_for(fibers[32 * warp], SHUFFLE));
    for (const Fiber &fiber : fibers)
      if (fiber.done != fibers[0].done ||
          (!fiber.done && std::strcmp(fiber.barrier, fibers[0].barrier) != 0))
        throw std::runtime_error("the threads of a block are not at the same barrier");
  } while (!fibers[0].done && !waits_for(fibers[0], GRID));
  return fibers[0].done;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
            Arguments... arguments) {
  ++state.launches;
  gridDim.x = blocks;
  body = [&] { kernel(arguments...); };
  static Block one;
  for (unsigned b : any_order(blocks)) {
    blockIdx.x = b;
    begin(one, threads, 0);
    if (!run_block(one))
      throw std::runtime_error("grid.sync in a launch that is not cooperative");
  }
}

// Blocks that wait for each other. Static shared memory is theirs only until they do.
template <typename... Parameters>
void launch_together(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                     void **arguments, size_t shared) {
  ++state.launches;
  if (blocks > MULTIPROCESSORS * BLOCKS || int64_t(shared) != state.occupancy_for)
    throw std::runtime_error(
        "more blocks than run at once, or with other shared memory than asked for");
  if (int64_t(shared) > state.shared_limit)
    throw std::runtime_error("more shared memory than the kernel may have");
  gridDim.x = blocks;
  body = [&] {
    [&]<size_t... i>(std::index_sequence<i...>) {
      kernel(*static_cast<Parameters *>(arguments[i])...);
    }(std::index_sequence_for<Parameters...>());
  };
  std::vector<Block> all(blocks);
  for (Block &each : all)
    begin(each, threads, shared);
  for (size_t done = 0; done < blocks;) {
    done = 0;
    for (unsigned b : any_order(blocks)) {
      blockIdx.x = b;
      done += run_block(all[b]);
    }
    if (done == 0 && between)
      between();
    if (done != 0 && done != blocks)
      throw std::runtime_error("not all blocks are at grid.sync");
  }
  for (const Block &each : all)
    if (std::any_of(each.shared.end() - GUARD, each.shared.end(), [](char c) { return c != -1; }))
      throw std::runtime_error("a write behind shared memory");
}

} // namespace emulator

inline void __syncthreads() { emulator::wait_at("__syncthreads"); }
inline void __threadfence() {}
template <typename T> T __ldcg(const T *at) { return *at; }
inline unsigned atomicAdd(unsigned *at, unsigned value) {
  *at += value;
  return *at - value;
}
inline double __shfl_down_sync(unsigned, double value, unsigned step) {
  static double values[1024];
  const unsigned mine = threadIdx.x;
  values[mine] = value;
  emulator::wait_at("shuffle, written"); // for the other threads of the warp
  const double other = mine % 32 + step < 32 ? values[mine + step] : value;
  emulator::wait_at("shuffle, read");
  return other;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// ---- the runtime ----

typedef void *cudaStream_t;
enum cudaError_t { cudaSuccess, cudaErrorStreamCaptureUnsupported = 900 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
enum { cudaStreamNonBlocking = 1 };

inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status,
                                            unsigned long long *id) {
  *id = emulator::state.capture;
  *status = *id ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
// While a stream is captured a thread may not allocate, unless it has said so before, and nobody
// may wait for that stream.
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
inline bool forbidden() {
  return emulator::state.capture && capture_mode != cudaStreamCaptureModeRelaxed;
}
inline bool captured(cudaStream_t stream) {
  return emulator::state.capture && stream == emulator::state.stream;
}
inline cudaError_t cudaMalloc(void **memory, size_t size) {
  if (forbidden())
    return cudaErrorStreamCaptureUnsupported;
  ++emulator::state.allocations;
  *memory = std::malloc(size);
  std::memset(*memory, 0xff, size); // nan, and counters that never end
  return cudaSuccess;
}
inline cudaError_t cudaFree(void *memory) {
  if (forbidden())
    return cudaErrorStreamCaptureUnsupported;
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind,
                                   cudaStream_t stream) {
  if (captured(stream) || forbidden())
    return cudaErrorStreamCaptureUnsupported;
  ++emulator::state.copies;
  std::memcpy(to, from, size);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(-1);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return captured(stream) || forbidden() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
  return *value = emulator::MULTIPROCESSORS, cudaSuccess;
}
template <typename F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int bytes) {
  return emulator::state.shared_limit = bytes, cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, F, int, size_t shared) {
  emulator::state.occupancy_for = shared;
  return *blocks = emulator::BLOCKS, cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Parameters...), unsigned blocks,
                                        unsigned threads, void **arguments, size_t shared,
                                        cudaStream_t) {
  emulator::launch_together(kernel, blocks, threads, arguments, shared);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void **stream) {
  *stream = emulator::state.stream;
  return 0;
}
