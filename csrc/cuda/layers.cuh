// The kernels of layer_norms, balance_layers_ and balanced_sgd_: one block a chunk, all tensors of
// all layers in one launch. Sums have a fixed order: inside a thread, over the threads of a block,
// over the chunks of a layer; no floating-point atomics.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "../balance.h"
#include "../chunks.h"
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace bld_ext {

constexpr int THREADS = 256;
constexpr int WIDTH = 4; // neighbouring elements that a thread takes at once
// Such groups of one tensor whose loads are in flight together; the update reads three tensors.
constexpr int AT_ONCE = 4, UPDATE_AT_ONCE = 2;
// What a block of balance_kernel keeps in shared memory between norm and rescaling: so many chunks
// of at most so many bytes. Three such blocks fit on a multiprocessor of an H100, two on an A100's.
constexpr unsigned KEPT = 2, KEPT_BYTES = 32768;

// What a launch reads, all of it on the device.
struct Walk {
  const Item *items;
  const Chunk *chunks;
  const int64_t *first_chunk; // [L + 1]
  double *partials;           // one a chunk
  unsigned *arrived;          // [L], chunks of the layer that are done; 0 between launches
};

// A number passed by value, or one on the device.
struct Scalar {
  const double *at;
  double value;
  __device__ double get() const { return at ? *at : value; }
};

// Where norms and factors go, [L] each, and what factors are made from; null where not wanted.
struct Result {
  void *norms, *factors;
  bool is_double;
  Operand reference_norms;
  Scalar balance;
};

template <typename F> __device__ __forceinline__ void with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::f32)
    f(float());
  else if (dtype == Dtype::bf16)
    f(c10::BFloat16());
  else if (dtype == Dtype::f16)
    f(c10::Half());
  else
    f(double());
}

__device__ inline double load(const Operand &operand, int64_t i) {
  double value = 0;
  with_dtype(operand.dtype,
             [&](auto kind) { value = static_cast<const decltype(kind) *>(operand.data)[i]; });
  return value;
}

// The elements from `start` on. Loads from a pointer that came from memory are slower unless the
// compiler is told where it points.
template <typename T>
__device__ __forceinline__ T *elements(const Operand &operand, int64_t start) {
  __builtin_assume(__isGlobal(operand.data));
  return static_cast<T *>(operand.data) + start;
}

// Some neighbours, moved by one instruction where they are aligned.
template <typename T> struct alignas(WIDTH * sizeof(T) < 16 ? WIDTH * sizeof(T) : 16) Group {
  T values[WIDTH];
};

template <typename T> __device__ __forceinline__ bool is_aligned(const T *data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Group<T>) == 0;
}

// Where the u-th group of elements is that this thread takes at once.
__device__ __forceinline__ int position(int first, int u) { return first + u * THREADS * WIDTH; }

// N groups from data[first] on; zeros behind `size`. `whole`: they are all there, and aligned.
template <int N, typename acc_t, typename T>
__device__ __forceinline__ void read(const T *data, int first, int size, bool whole,
                                     acc_t (*to)[WIDTH]) {
  if (whole) {
    Group<T> groups[N];
#pragma unroll
    for (int u = 0; u < N; ++u)
      groups[u] = *reinterpret_cast<const Group<T> *>(data + position(first, u));
#pragma unroll
    for (int u = 0; u < N; ++u)
      for (int k = 0; k < WIDTH; ++k)
        to[u][k] = static_cast<acc_t>(groups[u].values[k]);
  } else {
#pragma unroll
    for (int u = 0; u < N; ++u)
      for (int k = 0; k < WIDTH; ++k) {
        const int i = position(first, u) + k;
        to[u][k] = i < size ? static_cast<acc_t>(data[i]) : acc_t(0);
      }
  }
}

template <int N, typename acc_t, typename T>
__device__ __forceinline__ void write(T *data, int first, int size, bool whole,
                                      const acc_t (*from)[WIDTH]) {
#pragma unroll
  for (int u = 0; u < N; ++u) {
    Group<T> group;
    for (int k = 0; k < WIDTH; ++k)
      group.values[k] = static_cast<T>(from[u][k]);
    if (whole)
      *reinterpret_cast<Group<T> *>(data + position(first, u)) = group;
    else
      for (int k = 0; k < WIDTH; ++k)
        if (position(first, u) + k < size)
          data[position(first, u) + k] = group.values[k];
  }
}

// Calls f(first, whole) for each N groups that are this thread's.
template <int N, typename F>
__device__ __forceinline__ void for_groups(int size, bool aligned, F f) {
  for (int first = threadIdx.x * WIDTH; first < size; first += THREADS * WIDTH * N)
    f(first, aligned && position(first, N - 1) + WIDTH <= size);
}

// Σ of one value a thread, in thread 0. A barrier has to stand between two sums.
__device__ inline double block_sum(double value) {
  __shared__ double warps[THREADS / 32];
  for (int step = 16; step > 0; step /= 2)
    value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % 32 == 0)
    warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < THREADS / 32; ++w)
      value += warps[w];
  return value;
}

// Σ x² of this thread's part, in double, where the square of a float is exact. The part is copied
// to `kept`, unless that is null.
template <typename T>
__device__ __forceinline__ double thread_squares(const T *data, int size, T *kept) {
  double sums[WIDTH] = {};
  for_groups<AT_ONCE>(size, is_aligned(data), [&](int first, bool whole) {
    double x[AT_ONCE][WIDTH];
    read<AT_ONCE>(data, first, size, whole, x);
    if (kept) {
      __builtin_assume(__isShared(kept));
      write<AT_ONCE>(kept, first, size, whole, x);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u)
      for (int k = 0; k < WIDTH; ++k)
        sums[k] += x[u][k] * x[u][k];
  });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <typename acc_t>
__device__ inline void report(const Result &result, int layer, double sum) {
  const acc_t norm = static_cast<acc_t>(sqrt(sum));
  static_cast<acc_t *>(result.norms)[layer] = norm;
  if (result.factors)
    static_cast<acc_t *>(result.factors)[layer] =
        balance_factor(norm, load(result.reference_norms, layer), result.balance.get());
}

// Where a chunk of this dtype is kept; null if it does not fit, or if nothing is to be kept.
template <typename T> __device__ __forceinline__ T *room(char *kept, int size) {
  return size * sizeof(T) <= KEPT_BYTES ? reinterpret_cast<T *>(kept) : nullptr;
}

// One chunk of the measurement: the block that finishes a layer's last chunk adds the layer up.
__device__ __forceinline__ void measure(const Walk &walk, const Result &result, unsigned id,
                                        char *kept) {
  const Chunk chunk = walk.chunks[id];
  const Operand grad = walk.items[chunk.tensor].old_grad;
  double sum = 0;
  with_dtype(grad.dtype, [&](auto kind) {
    typedef decltype(kind) T;
    sum = thread_squares<T>(elements<T>(grad, chunk.start), chunk.size, room<T>(kept, chunk.size));
  });
  sum = block_sum(sum);

  const int64_t first = walk.first_chunk[chunk.layer], last = walk.first_chunk[chunk.layer + 1];
  __shared__ bool finished;
  if (threadIdx.x == 0) {
    walk.partials[id] = sum;
    __threadfence(); // before the arrival can be seen
    finished = atomicAdd(&walk.arrived[chunk.layer], 1u) == last - first - 1;
  }
  __syncthreads();
  if (!finished)
    return;
  __threadfence();
  sum = 0;
  for (int64_t c = first + threadIdx.x; c < last; c += THREADS)
    sum += __ldcg(&walk.partials[c]); // from where the other blocks' writes are
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    walk.arrived[chunk.layer] = 0;
    if (result.is_double)
      report<double>(result, chunk.layer, sum);
    else
      report<float>(result, chunk.layer, sum);
  }
}

// First launch.
__global__ void __launch_bounds__(THREADS) measure_kernel(Walk walk, Result result) {
  measure(walk, result, blockIdx.x, nullptr);
}

__device__ inline double factor_of(const Result &result, int layer) {
  return result.is_double ? __ldcg(static_cast<const double *>(result.factors) + layer)
                          : __ldcg(static_cast<const float *>(result.factors) + layer);
}

// The second launch takes the chunks backwards: what was measured last is in the cache first.
__device__ inline unsigned backwards() { return gridDim.x - 1 - blockIdx.x; }

// A thread finds what it kept itself, so no barrier is needed.
template <typename acc_t, typename T>
__device__ __forceinline__ void rescale(T *data, int size, acc_t factor, const T *kept) {
  for_groups<AT_ONCE>(size, is_aligned(data), [&](int first, bool whole) {
    acc_t x[AT_ONCE][WIDTH];
    if (kept) {
      __builtin_assume(__isShared(kept));
      read<AT_ONCE>(kept, first, size, whole, x);
    } else {
      read<AT_ONCE>(data, first, size, whole, x);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u)
      for (int k = 0; k < WIDTH; ++k)
        x[u][k] *= factor;
    write<AT_ONCE>(data, first, size, whole, x);
  });
}

// G_d ← f · G_d in one chunk.
__device__ __forceinline__ void rescale(const Walk &walk, const Result &result, unsigned id,
                                        char *kept) {
  const Chunk chunk = walk.chunks[id];
  const Operand grad = walk.items[chunk.tensor].old_grad;
  const double factor = factor_of(result, chunk.layer);
  with_dtype(grad.dtype, [&](auto kind) {
    typedef decltype(kind) T;
    T *data = elements<T>(grad, chunk.start);
    const T *copy = room<T>(kept, chunk.size);
    if constexpr (sizeof(T) == sizeof(double))
      rescale<double>(data, chunk.size, factor, copy);
    else
      rescale<float>(data, chunk.size, narrow_factor(factor), copy);
  });
}

__global__ void __launch_bounds__(THREADS) rescale_kernel(Walk walk, Result result) {
  rescale(walk, result, backwards(), nullptr);
}

// Both in one cooperative launch, whose blocks run all at once. What a block keeps is read once.
__global__ void __launch_bounds__(THREADS)
    balance_kernel(Walk walk, Result result, unsigned chunks) {
  extern __shared__ __align__(16) char kept[];
  const auto place = [&](unsigned k) { return k < KEPT ? kept + k * KEPT_BYTES : nullptr; };
  unsigned mine = 0;
  for (unsigned id = blockIdx.x; id < chunks; id += gridDim.x) {
    measure(walk, result, id, place(mine++));
    __syncthreads(); // between two sums
  }
  cooperative_groups::this_grid().sync();
  while (mine-- > 0)
    rescale(walk, result, blockIdx.x + mine * gridDim.x, place(mine));
}

// θ - α (f · G_d + G_t), the last product and sum rounded once, as on a CPU.
__device__ __forceinline__ float step(float param, float old_grad, float new_grad, float factor,
                                      float lr) {
  return __fmaf_rn(-lr, __fadd_rn(__fmul_rn(factor, old_grad), new_grad), param);
}
__device__ __forceinline__ double step(double param, double old_grad, double new_grad,
                                       double factor, double lr) {
  return __fma_rn(-lr, __dadd_rn(__dmul_rn(factor, old_grad), new_grad), param);
}

template <typename acc_t, typename T>
__device__ __forceinline__ void update(T *param, const T *old_grad, const T *new_grad, int size,
                                       acc_t factor, acc_t lr) {
  constexpr int N = UPDATE_AT_ONCE;
  const bool aligned = is_aligned(param) && is_aligned(old_grad) && is_aligned(new_grad);
  for_groups<N>(size, aligned, [&](int first, bool whole) {
    acc_t p[N][WIDTH], d[N][WIDTH], n[N][WIDTH];
    read<N>(param, first, size, whole, p);
    read<N>(old_grad, first, size, whole, d);
    read<N>(new_grad, first, size, whole, n);
#pragma unroll
    for (int u = 0; u < N; ++u)
      for (int k = 0; k < WIDTH; ++k)
        p[u][k] = step(p[u][k], d[u][k], n[u][k], factor, lr);
    write<N>(param, first, size, whole, p);
  });
}

// The same where the three have different dtypes: one element at a time.
template <typename acc_t>
__device__ inline void update_mixed(const Item &item, const Chunk &chunk, acc_t factor, acc_t lr) {
  for (int i = threadIdx.x; i < chunk.size; i += THREADS) {
    const int64_t at = chunk.start + i;
    const acc_t p = static_cast<acc_t>(load(item.param, at));
    const acc_t d = static_cast<acc_t>(load(item.old_grad, at));
    const acc_t n = static_cast<acc_t>(load(item.new_grad, at));
    with_dtype(item.param.dtype, [&](auto kind) {
      typedef decltype(kind) T;
      static_cast<T *>(item.param.data)[at] = static_cast<T>(step(p, d, n, factor, lr));
    });
  }
}

__global__ void __launch_bounds__(THREADS) update_kernel(Walk walk, Result result, Scalar lr) {
  const Chunk chunk = walk.chunks[backwards()];
  const Item item = walk.items[chunk.tensor];
  const double factor = factor_of(result, chunk.layer), rate = lr.get();
  const Dtype dtype = item.param.dtype;
  if (dtype == item.old_grad.dtype && dtype == item.new_grad.dtype)
    with_dtype(dtype, [&](auto kind) {
      typedef decltype(kind) T;
      T *param = elements<T>(item.param, chunk.start);
      const T *old_grad = elements<T>(item.old_grad, chunk.start);
      const T *new_grad = elements<T>(item.new_grad, chunk.start);
      if constexpr (sizeof(T) == sizeof(double))
        update<double>(param, old_grad, new_grad, chunk.size, factor, rate);
      else
        update<float>(param, old_grad, new_grad, chunk.size, narrow_factor(factor),
                      static_cast<float>(rate));
    });
  else if (dtype == Dtype::f64)
    update_mixed<double>(item, chunk, factor, rate);
  else
    update_mixed<float>(item, chunk, narrow_factor(factor), static_cast<float>(rate));
}

} // namespace bld_ext
