// A CUDA that runs on the CPU, enough of it for the layer kernels: blocks one after the other in
// any order, the threads of a block as fibers that meet at barriers. It finds wrong indices, missing
// barriers (the threads take turns in an order that changes) and barriers that not all threads reach.
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
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __isGlobal(pointer) true
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
};
inline State state;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done = false;
  const char *barrier = "";
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::function<void()> body;

inline void run_fiber() {
  body();
  fibers[threadIdx.x].done = true;
}

inline void wait_at(const char *barrier) {
  Fiber &fiber = fibers[threadIdx.x];
  fiber.barrier = barrier;
  swapcontext(&fiber.context, &scheduler);
}

inline std::vector<unsigned> any_order(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), std::mt19937(state.seed++));
  return order;
}

inline void run_block(unsigned threads) {
  fibers.resize(threads);
  for (Fiber &fiber : fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  do {
    for (unsigned t : any_order(threads)) {
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
    }
    for (const Fiber &fiber : fibers)
      if (fiber.done != fibers[0].done ||
          (!fiber.done && std::strcmp(fiber.barrier, fibers[0].barrier) != 0))
        throw std::runtime_error("the threads of a block are not at the same barrier");
  } while (!fibers[0].done);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
            Arguments... arguments) {
  ++state.launches;
  gridDim.x = blocks;
  body = [&] { kernel(arguments...); };
  for (unsigned block : any_order(blocks)) {
    blockIdx.x = block;
    run_block(threads);
  }
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
  emulator::wait_at("shuffle, written");
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
// While a stream is captured a thread may not allocate, unless it has said so before, and nobody may
// wait for that stream.
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
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void **stream) {
  *stream = emulator::state.stream;
  return 0;
}
