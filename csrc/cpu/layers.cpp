// layer_norms, balance_layers_ and balanced_sgd_ on a CPU. Layers are walked in groups that fit the
// caches: a group is measured, then rescaled or used for the update while it is still there.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "../layers.h"
#include "lanes.h"
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace bld_ext {
namespace {

constexpr int64_t BLOCK = 512; // elements converted at a time
// Of float gradients, for each thread: what stays in its cache while a group is changed. An update
// lets two more tensors through.
constexpr int64_t RESCALE_BYTES = 1 << 20, UPDATE_BYTES = 1 << 19;
constexpr int64_t FETCH_BYTES = 4096;      // that the processor is told ahead of
constexpr int64_t SERIAL_ELEMENTS = 16384; // where waking a thread takes longer than the work

template <typename acc_t> constexpr int64_t LINE = 64 / sizeof(acc_t); // of a cache

// Asks for what will be read soon: the hardware alone does not look far enough ahead. What is read
// just once should not push from the caches what is read again.
template <typename acc_t> BLD_EXT_INLINE void fetch_ahead(const acc_t *now) {
  __builtin_prefetch(reinterpret_cast<const char *>(now) + FETCH_BYTES);
}
template <typename acc_t> BLD_EXT_INLINE void fetch_once(const acc_t *now) {
  __builtin_prefetch(reinterpret_cast<const char *>(now) + FETCH_BYTES, 0, 0);
}

template <typename T, typename acc_t>
BLD_EXT_INLINE const acc_t *convert(const void *data, int64_t start, int64_t n, acc_t *buffer) {
  const T *from = static_cast<const T *>(data) + start;
  if constexpr (std::is_same_v<T, acc_t>)
    return from;
  for (int64_t i = 0; i < n; ++i)
    buffer[i] = static_cast<acc_t>(from[i]);
  return buffer;
}

// n elements from `start`, where they are or converted into the buffer.
template <typename acc_t>
BLD_EXT_INLINE const acc_t *read(const Operand &operand, int64_t start, int64_t n, acc_t *buffer) {
  switch (operand.dtype) {
  case Dtype::f32:
    return convert<float>(operand.data, start, n, buffer);
  case Dtype::f64:
    return convert<double>(operand.data, start, n, buffer);
  case Dtype::bf16:
    return convert<c10::BFloat16>(operand.data, start, n, buffer);
  default:
    return convert<c10::Half>(operand.data, start, n, buffer);
  }
}

template <typename T, typename acc_t>
BLD_EXT_INLINE void round_to(void *data, int64_t start, int64_t n, const acc_t *values) {
  T *to = static_cast<T *>(data) + start;
  for (int64_t i = 0; i < n; ++i)
    to[i] = static_cast<T>(values[i]);
}

// The counterpart of read(): nothing is left to do where the elements were changed in place.
template <typename acc_t>
BLD_EXT_INLINE void write(const Operand &operand, int64_t start, int64_t n, const acc_t *values) {
  if (operand.dtype == Dtype::bf16)
    round_to<c10::BFloat16>(operand.data, start, n, values);
  else if (operand.dtype == Dtype::f16)
    round_to<c10::Half>(operand.data, start, n, values);
}

// Σ x² in double, where the square of a float is exact. Sixteen sums side by side, whatever the
// registers hold, then added pairwise.
template <typename acc_t, int64_t D>
BLD_EXT_INLINE double sum_squares(const Item &item, const Chunk &chunk) {
  alignas(64) acc_t buffer[BLOCK];
  alignas(64) double lanes[16];
  Lanes<double, D> sums[16 / D]{};
  int64_t i = 0;
  const acc_t *x = nullptr;
  for (int64_t done = 0; done < chunk.size; done += BLOCK) {
    const int64_t n = std::min(BLOCK, chunk.size - done);
    x = read(item.old_grad, chunk.start + done, n, buffer);
    for (i = 0; i + 16 <= n; i += 16) {
      fetch_ahead(x + i);
      for (int64_t k = 0; k < 16 / D; ++k) {
        Lanes<acc_t, D> part;
        std::memcpy(&part, x + i + k * D, sizeof part);
        const auto wide = __builtin_convertvector(part, Lanes<double, D>);
        sums[k] += wide * wide;
      }
    }
  }
  std::memcpy(lanes, sums, sizeof lanes);
  for (const int64_t first = i; i < chunk.size % BLOCK; ++i) // BLOCK is a multiple of 16
    lanes[i - first] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (int64_t half = 8; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k)
      lanes[k] += lanes[k + half];
  return lanes[0];
}

// G_d ← f · G_d
template <typename acc_t>
BLD_EXT_INLINE void rescale(const Item &item, const Chunk &chunk, acc_t factor) {
  alignas(64) acc_t buffer[BLOCK];
  for (int64_t done = 0; done < chunk.size; done += BLOCK) {
    const int64_t start = chunk.start + done, n = std::min(BLOCK, chunk.size - done);
    acc_t *x = const_cast<acc_t *>(read(item.old_grad, start, n, buffer));
    for (int64_t i = 0; i < n; ++i)
      x[i] *= factor;
    write(item.old_grad, start, n, x);
  }
}

BLD_EXT_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
BLD_EXT_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

// θ ← θ - α (f · G_d + G_t), the last product and sum rounded once: the bits of rescaling, adding
// and torch's SGD one after the other.
template <typename acc_t>
BLD_EXT_INLINE void update(const Item &item, const Chunk &chunk, acc_t factor, acc_t lr) {
  alignas(64) acc_t buffers[3][BLOCK];
  for (int64_t done = 0; done < chunk.size; done += BLOCK) {
    const int64_t start = chunk.start + done, n = std::min(BLOCK, chunk.size - done);
    const acc_t *old_grad = read(item.old_grad, start, n, buffers[0]);
    const acc_t *new_grad = read(item.new_grad, start, n, buffers[1]);
    acc_t *param = const_cast<acc_t *>(read(item.param, start, n, buffers[2]));
    int64_t i = 0;
    for (; i + LINE<acc_t> <= n; i += LINE<acc_t>) {
      Lanes<acc_t, LINE<acc_t>> p, d, g;
      fetch_once(param + i), fetch_once(new_grad + i), fetch_ahead(old_grad + i);
      std::memcpy(&p, param + i, sizeof p);
      std::memcpy(&d, old_grad + i, sizeof d);
      std::memcpy(&g, new_grad + i, sizeof g);
      d = factor * d + g;
      acc_t before[LINE<acc_t>], total[LINE<acc_t>];
      std::memcpy(before, &p, sizeof p);
      std::memcpy(total, &d, sizeof d);
      for (int64_t k = 0; k < LINE<acc_t>; ++k)
        before[k] = fused(-lr, total[k], before[k]);
      std::memcpy(param + i, before, sizeof p);
    }
    for (; i < n; ++i)
      param[i] = fused(-lr, factor * old_grad[i] + new_grad[i], param[i]);
    write(item.param, start, n, param);
  }
}

// One chunk of each, in doubles where its tensor is.
template <int64_t D> BLD_EXT_INLINE double measure(const Item &item, const Chunk &chunk) {
  return item.old_grad.dtype == Dtype::f64 ? sum_squares<double, D>(item, chunk)
                                           : sum_squares<float, D>(item, chunk);
}

// What follows once a layer is measured.
enum class After { nothing, rescale, update };

struct Change {
  After after;
  double factor, lr; // lr is of the update
};

BLD_EXT_INLINE void change(const Item &item, const Chunk &chunk, const Change &by) {
  const float factor = narrow_factor(by.factor), lr = static_cast<float>(by.lr);
  if (by.after == After::update && item.param.dtype == Dtype::f64)
    update<double>(item, chunk, by.factor, by.lr);
  else if (by.after == After::update)
    update<float>(item, chunk, factor, lr);
  else if (item.old_grad.dtype == Dtype::f64)
    rescale<double>(item, chunk, by.factor);
  else
    rescale<float>(item, chunk, factor);
}

struct Kernels {
  double (*measure)(const Item &, const Chunk &);
  void (*change)(const Item &, const Chunk &, const Change &);
};

double measure_baseline(const Item &item, const Chunk &chunk) { return measure<2>(item, chunk); }
void change_baseline(const Item &item, const Chunk &chunk, const Change &by) {
  change(item, chunk, by);
}
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] double measure_avx2(const Item &item, const Chunk &chunk) {
  return measure<4>(item, chunk);
}
[[gnu::target("avx2,fma")]] void change_avx2(const Item &item, const Chunk &chunk,
                                             const Change &by) {
  change(item, chunk, by);
}
[[gnu::target("avx512f,avx512dq,avx512vl,avx512bw")]] double measure_avx512(const Item &item,
                                                                            const Chunk &chunk) {
  return measure<8>(item, chunk);
}
[[gnu::target("avx512f,avx512dq,avx512vl,avx512bw")]] void
change_avx512(const Item &item, const Chunk &chunk, const Change &by) {
  change(item, chunk, by);
}
#endif

Kernels kernels() {
#if defined(__x86_64__)
  if (registers() == Registers::avx512)
    return {measure_avx512, change_avx512};
  if (registers() == Registers::avx2)
    return {measure_avx2, change_avx2};
#endif
  return {measure_baseline, change_baseline};
}

// ---- the walk ----

// The tables of the last calls: a training loop comes back with the same tensors.
std::shared_ptr<const LayerTable> find_table(const std::vector<TensorList *> &lists,
                                             const TensorList &measured,
                                             const std::vector<int64_t> &layers,
                                             int64_t num_layers) {
  static std::mutex mutex;
  static std::list<std::shared_ptr<const LayerTable>> recent;
  std::vector<int64_t> key = table_key(lists, layers, num_layers);
  const std::lock_guard lock(mutex);
  const auto found =
      std::find_if(recent.begin(), recent.end(), [&](const auto &t) { return t->key == key; });
  if (found != recent.end()) {
    recent.splice(recent.begin(), recent, found);
  } else {
    auto table = std::make_shared<LayerTable>();
    fill_table(*table, std::move(key), lists, measured, layers, num_layers);
    recent.push_front(std::move(table));
    if (recent.size() > 8)
      recent.pop_back();
  }
  return recent.front();
}

// Consecutive layers that are worked on together: few enough for the caches, or a single one.
struct Group {
  int64_t first_layer, last_layer;
  std::vector<int64_t> bounds; // chunks [bounds[i], bounds[i + 1]) are thread i's
};

// Chunks [first, last) in pieces of about equal size, a single one where they are few.
std::vector<int64_t> split(const LayerTable &table, int64_t first, int64_t last, int64_t elements,
                           int64_t threads) {
  const int64_t pieces = elements > SERIAL_ELEMENTS ? threads : 1;
  std::vector<int64_t> bounds{first};
  for (int64_t c = first, seen = 0; c < last; ++c) {
    const int64_t piece = static_cast<int64_t>(bounds.size());
    seen += table.chunks[c].size;
    if (piece < pieces && seen * pieces >= elements * piece)
      bounds.push_back(c + 1);
  }
  bounds.resize(threads + 1, last);
  return bounds;
}

std::vector<Group> groups_of(const LayerTable &table, int64_t group_bytes) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t L = static_cast<int64_t>(table.first_chunk.size()) - 1;
  const int64_t limit = group_bytes / 4 * threads;
  std::vector<Group> groups;
  for (int64_t first = 0, last; first < L; first = last) {
    int64_t elements = 0;
    for (last = first; last < L; ++last) {
      int64_t more = 0;
      for (int64_t c = table.first_chunk[last]; c < table.first_chunk[last + 1]; ++c)
        more += table.chunks[c].size;
      if (last > first && elements + more > limit)
        break;
      elements += more;
    }
    groups.push_back(
        {first, last,
         split(table, table.first_chunk[first], table.first_chunk[last], elements, threads)});
  }
  return groups;
}

// Every group is measured; then its layers are changed. Calls finish(l, Σ x²), which returns the
// layer's factor, in between. The threads meet once a group: while one is changed, the next is
// measured.
template <typename Finish>
void walk(const LayerTable &table, After after, double lr, const Finish &finish) {
  const Kernels run = kernels();
  const bool changes = after != After::nothing;
  // What was measured last is in the cache first; but three tensors at once are faster forwards.
  const bool reversed = after == After::rescale;
  const int64_t bytes = after == After::update    ? UPDATE_BYTES
                        : after == After::rescale ? RESCALE_BYTES
                                                  : int64_t(1) << 40;
  const std::vector<Group> groups = groups_of(table, bytes);
  const int64_t count = static_cast<int64_t>(groups.size());
  std::vector<double> sums(table.chunks.size()), factors(table.first_chunk.size());
  for (int64_t g = 0; g < count + changes; ++g) {
    const Group *now = g < count ? &groups[g] : nullptr;
    const Group *before = changes && g > 0 ? &groups[g - 1] : nullptr;
    const auto work = [&](int64_t begin, int64_t end) {
      if (before) {
        const int64_t first = before->bounds[begin], last = before->bounds[end];
        for (int64_t c = first; c < last; ++c) {
          const Chunk &chunk = table.chunks[reversed ? first + last - 1 - c : c];
          run.change(table.items[chunk.tensor], chunk, {after, factors[chunk.layer], lr});
        }
      }
      if (now)
        for (int64_t c = now->bounds[begin]; c < now->bounds[end]; ++c)
          sums[c] = run.measure(table.items[table.chunks[c].tensor], table.chunks[c]);
    };
    const auto serial = [](const Group *group) {
      return !group || group->bounds[1] == group->bounds.back();
    };
    const int64_t threads = static_cast<int64_t>(groups[0].bounds.size()) - 1;
    if (serial(now) && serial(before))
      work(0, threads);
    else
      torch::stable::parallel_for(0, threads, 1, work);
    if (now)
      for (int64_t l = now->first_layer; l < now->last_layer; ++l) {
        double sum = 0;
        for (int64_t c = table.first_chunk[l]; c < table.first_chunk[l + 1]; ++c)
          sum += sums[c];
        factors[l] = finish(l, sum);
      }
  }
}

// ---- the ops; their documentation is in bld_ext/ops.py ----

double element(const Tensor &tensor, int64_t i) {
  const void *data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
  case ScalarType::Float:
    return static_cast<const float *>(data)[i];
  case ScalarType::Double:
    return static_cast<const double *>(data)[i];
  case ScalarType::BFloat16:
    return static_cast<const c10::BFloat16 *>(data)[i];
  default:
    return static_cast<const c10::Half *>(data)[i];
  }
}

double scalar(const char *name, const Tensor &tensor) {
  BLD_CHECK(tensor.dim() == 0 && tensor.is_cpu() && tensor.scalar_type() == ScalarType::Double,
            name, ": expected a float64 scalar on the CPU");
  const double value = element(tensor, 0);
  BLD_CHECK(value >= 0 && std::isfinite(value), name,
            ": expected a finite number, at least 0, got ", value);
  return value;
}

void set(const Tensor &tensor, int64_t i, double value) { // float32 or float64
  if (tensor.scalar_type() == ScalarType::Double)
    static_cast<double *>(tensor.mutable_data_ptr())[i] = value;
  else
    static_cast<float *>(tensor.mutable_data_ptr())[i] = static_cast<float>(value);
}

Tensor new_norms(const TensorList &measured, int64_t L) {
  return torch::stable::new_empty(measured.tensors[0], std::vector<int64_t>{L},
                                  norm_dtype(measured));
}

Tensor layer_norms(std::vector<Tensor> tensors, std::vector<int64_t> layers, int64_t num_layers) {
  TensorList list{"tensors", std::move(tensors), false};
  check_lists({&list}, layers, num_layers);
  align({&list});
  const auto table = find_table({&list}, list, layers, num_layers);
  Tensor norms = new_norms(list, num_layers);
  walk(*table, After::nothing, 0, [&](int64_t l, double sum) {
    set(norms, l, std::sqrt(sum));
    return 0;
  });
  return norms;
}

// What balance_layers_ and balanced_sgd_ have in common; lists[0] is what is written.
std::tuple<Tensor, Tensor> balance(const std::vector<TensorList *> &lists, TensorList &measured,
                                   const std::vector<int64_t> &layers,
                                   const Tensor &reference_norms, const Tensor &balance_,
                                   After after, double lr) {
  BLD_CHECK(reference_norms.dim() == 1 && reference_norms.is_cpu(),
            "reference_norms: expected one norm a layer, [L], on the CPU");
  dtype_of("reference_norms", reference_norms);
  const int64_t L = reference_norms.numel();
  check_lists(lists, layers, L);
  const double lambda = scalar("balance", balance_);
  std::vector<double> reference(L); // which the lists may hold, too
  const Tensor norms_given = torch::stable::contiguous(reference_norms);
  for (int64_t l = 0; l < L; ++l)
    reference[l] = element(norms_given, l);
  align(lists);
  const auto table = find_table(lists, measured, layers, L);

  Tensor factors = new_norms(measured, L), norms = new_norms(measured, L);
  walk(*table, after, lr, [&](int64_t l, double sum) {
    set(norms, l, std::sqrt(sum));
    set(factors, l,
        norms.scalar_type() == ScalarType::Double
            ? balance_factor<double>(std::sqrt(sum), reference[l], lambda)
            : balance_factor<float>(static_cast<float>(std::sqrt(sum)), reference[l], lambda));
    return element(factors, l);
  });
  write_back(*lists[0]);
  return {factors, norms};
}

std::tuple<Tensor, Tensor> balance_layers_(std::vector<Tensor> grads, std::vector<int64_t> layers,
                                           const Tensor &reference_norms, const Tensor &balance_) {
  TensorList list{"grads", std::move(grads), true};
  return balance({&list}, list, layers, reference_norms, balance_, After::rescale, 0);
}

std::tuple<Tensor, Tensor> balanced_sgd_(std::vector<Tensor> params,
                                         std::vector<Tensor> distill_grads,
                                         std::vector<Tensor> new_grads, std::vector<int64_t> layers,
                                         const Tensor &reference_norms, const Tensor &balance_,
                                         const Tensor &lr) {
  TensorList param{"params", std::move(params), true};
  TensorList old_grad{"distill_grads", std::move(distill_grads), false};
  TensorList new_grad{"new_grads", std::move(new_grads), false};
  return balance({&param, &old_grad, &new_grad}, old_grad, layers, reference_norms, balance_,
                 After::update, scalar("lr", lr));
}

STABLE_TORCH_LIBRARY_IMPL(bld_ext, CPU, m) {
  m.impl("layer_norms", TORCH_BOX(&layer_norms));
  m.impl("balance_layers_", TORCH_BOX(&balance_layers_));
  m.impl("balanced_sgd_", TORCH_BOX(&balanced_sgd_));
}

} // namespace
} // namespace bld_ext
