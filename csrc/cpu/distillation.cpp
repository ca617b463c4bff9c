// head_softmax, distillation_loss, warm_up_loss and joint_loss on a CPU: one pass over the logits
// of all heads. As many positions as a register holds are computed side by side, class after class,
// so that the result at a position depends on its own logits alone: not on its neighbours, threads
// or registers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../check.h"
#include "lanes.h"

namespace bld_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t IGNORED = -100; // the label of a position without a class

// What one call reads and writes; a null pointer leaves that part out. S positions an image.
template <typename scalar_t, typename acc_t> struct Heads {
  const scalar_t *logits;          // [N, C, S]
  const int64_t *labels;           // [N, S], of the head behind the old ones
  const acc_t *targets;            // [N, C_old, S], the bank to distil from
  acc_t *bank;                     // [N, C_old, S], the bank to fill
  acc_t *old_grad;                 // [N, C, S], of the distillation loss
  acc_t *new_grad;                 // [N, C, S], of the cross-entropy
  std::vector<int64_t> head_sizes; // of the old heads
  int64_t N, C, C_old, S;
  acc_t inverse_temperature; // 1 / τ

  // Lines of neighbouring positions: those of an image where it has several, else all images.
  int64_t lines() const { return S > 1 ? N : 1; }
  int64_t line() const { return S > 1 ? S : N; }
  // Losses are added up along pieces of a line, then piece by piece, whatever the threads do.
  int64_t piece() const { return std::max<int64_t>(1, 512 / C) * 16; }
  int64_t pieces_a_line() const { return (line() + piece() - 1) / piece(); }
};

// Where a tile lies in an array [N, classes, S]: the lanes of a class, then its classes.
struct Place {
  int64_t lanes, lane_stride, class_stride;
};

// Four floats of each of W / 4 rows, from row after row.
template <int64_t W> BLD_EXT_INLINE Lanes<float, W> gather(const float *from, int64_t stride) {
  if constexpr (W == 4) {
    return read<4>(from);
  } else {
    const auto low = gather<W / 2>(from, stride),
               high = gather<W / 2>(from + W / 8 * stride, stride);
    return [&]<int... i>(std::integer_sequence<int, i...>) BLD_EXT_INLINE_LAMBDA {
      return __builtin_shufflevector(low, high, i...);
    }(std::make_integer_sequence<int, W>());
  }
}

template <int64_t W>
BLD_EXT_INLINE void scatter(const Lanes<float, W> &x, float *to, int64_t stride) {
  if constexpr (W == 4)
    std::memcpy(to, &x, sizeof x);
  else
    [&]<int... i>(std::integer_sequence<int, i...>) BLD_EXT_INLINE_LAMBDA {
      scatter<W / 2>(__builtin_shufflevector(x, x, i...), to, stride);
      scatter<W / 2>(__builtin_shufflevector(x, x, W / 2 + i...), to + W / 8 * stride, stride);
    }(std::make_integer_sequence<int, W / 2>());
}

// In each 16 bytes of the four registers, four rows of four floats become four columns.
template <int64_t W> BLD_EXT_INLINE void transpose(Lanes<float, W> (&x)[4]) {
  Lanes<int32_t, W> in_turn, in_pairs;
  for (int i = 0; i < W; ++i) {
    in_turn[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * int(W);
    in_pairs[i] = i / 4 * 4 + i % 2 + i % 4 / 2 * int(W);
  }
  const Lanes<float, W> ab_low = __builtin_shuffle(x[0], x[1], in_turn);
  const Lanes<float, W> ab_high = __builtin_shuffle(x[0], x[1], in_turn + 2);
  const Lanes<float, W> cd_low = __builtin_shuffle(x[2], x[3], in_turn);
  const Lanes<float, W> cd_high = __builtin_shuffle(x[2], x[3], in_turn + 2);
  x[0] = __builtin_shuffle(ab_low, cd_low, in_pairs);
  x[1] = __builtin_shuffle(ab_low, cd_low, in_pairs + 2);
  x[2] = __builtin_shuffle(ab_high, cd_high, in_pairs);
  x[3] = __builtin_shuffle(ab_high, cd_high, in_pairs + 2);
}

// Some classes of a tile from memory; lanes that are not there become 0.
template <typename acc_t, int64_t W, typename T>
BLD_EXT_INLINE void load(const T *from, const Place &at, int64_t classes, Lanes<acc_t, W> *tile) {
  acc_t *to = reinterpret_cast<acc_t *>(tile);
  int64_t c = 0;
  if (at.lanes < W)
    std::memset(static_cast<void *>(tile), 0, classes * sizeof *tile);
  if constexpr (std::is_same_v<T, float>)
    if (at.lanes == W && at.class_stride == 1)
      for (; c + 4 <= classes; c += 4) {
        Lanes<float, W> x[4];
        for (int k = 0; k < 4; ++k) // rows k, k + 4, ...
          x[k] = gather<W>(from + c + k * at.lane_stride, 4 * at.lane_stride);
        transpose<W>(x);
        for (int k = 0; k < 4; ++k)
          tile[c + k] = x[k];
      }
  for (; c < classes; ++c)
    for (int64_t i = 0; i < at.lanes; ++i)
      to[c * W + i] = static_cast<acc_t>(from[c * at.class_stride + i * at.lane_stride]);
}

// Some classes of a tile to memory.
template <typename acc_t, int64_t W, typename T>
BLD_EXT_INLINE void store(const Lanes<acc_t, W> *tile, const Place &at, int64_t classes, T *to) {
  const acc_t *from = reinterpret_cast<const acc_t *>(tile);
  int64_t c = 0;
  if constexpr (std::is_same_v<T, float>)
    if (at.lanes == W && at.class_stride == 1)
      for (; c + 4 <= classes; c += 4) {
        Lanes<float, W> x[4] = {tile[c], tile[c + 1], tile[c + 2], tile[c + 3]};
        transpose<W>(x);
        for (int k = 0; k < 4; ++k)
          scatter<W>(x[k], to + c + k * at.lane_stride, 4 * at.lane_stride);
      }
  for (; c < classes; ++c)
    for (int64_t i = 0; i < at.lanes; ++i)
      to[c * at.class_stride + i * at.lane_stride] = static_cast<T>(from[c * W + i]);
}

template <typename T> BLD_EXT_INLINE void zero(const Place &at, int64_t classes, T *to) {
  if (at.class_stride == 1) // the classes of one image are contiguous
    for (int64_t i = 0; i < at.lanes; ++i)
      std::memset(static_cast<void *>(to + i * at.lane_stride), 0, classes * sizeof(T));
  else
    for (int64_t c = 0; c < classes; ++c)
      std::memset(static_cast<void *>(to + c * at.class_stride), 0, at.lanes * sizeof(T));
}

// Classes whose terms are added up before they join the others, so that wide heads lose no digits.
constexpr int64_t SOME = 256;

template <typename acc_t, int64_t W> struct Sums {
  Lanes<acc_t, W> log_sum, first, second;
};

// z -> p = softmax(z / τ), in place; returns log Σ e^x of x = (z - max) / τ, and the two sums to
// which `visit(c, x, first, second)` adds. The one softmax: it makes the bank, and p is compared
// with the bank.
template <typename acc_t, int64_t W, typename Visit>
BLD_EXT_INLINE Sums<acc_t, W> softmax(Lanes<acc_t, W> *z, int64_t classes,
                                      acc_t inverse_temperature, Visit visit) {
  Lanes<acc_t, W> largest = z[0];
  for (int64_t c = 1; c < classes; ++c)
    largest = z[c] > largest ? z[c] : largest;
  // The largest, where e^x = 1, are counted apart: log Σ e^x keeps its digits where Σ e^x is
  // near 1.
  Lanes<acc_t, W> others{}, ones{}, first{}, second{};
  for (int64_t begin = 0; begin < classes; begin += SOME) {
    Lanes<acc_t, W> some{}, some_first{}, some_second{};
    const int64_t end = std::min(begin + SOME, classes);
    for (int64_t c = begin; c < end; ++c) {
      Lanes<acc_t, W> x = (z[c] - largest) * inverse_temperature;
      visit(c, x, some_first, some_second);
      const auto one = x == 0;
      exp_nonpositive<W>(x);
      some += one ? Lanes<acc_t, W>{} : x;
      ones += one ? Lanes<acc_t, W>{} + 1 : Lanes<acc_t, W>{};
      z[c] = x;
    }
    others += some, first += some_first, second += some_second;
  }
  Lanes<acc_t, W> sum = others + ones;
  const Lanes<acc_t, W> inverse = acc_t(1) / sum;
  for (int64_t c = 0; c < classes; ++c)
    z[c] *= inverse;
  // log(1 + a) = log(s) a / (s - 1) with s the rounded 1 + a, as Kahan has it
  const Lanes<acc_t, W> a = others + (ones - 1), above = sum - 1;
  log_of_sum<W>(sum);
  return {above == 0 ? a : sum * (a / above), first, second};
}

// All heads at W neighbouring positions, or the `lanes` that are left of a line, from position s of
// image n; adds to sums = {new loss, old loss}. `x` and `y` have room for all classes.
template <typename scalar_t, typename acc_t, int64_t W>
BLD_EXT_INLINE void tile(const Heads<scalar_t, acc_t> &h, int64_t n, int64_t s, int64_t lanes,
                         Lanes<acc_t, W> *x, Lanes<acc_t, W> *y, double *sums) {
  const Place at{lanes, h.S > 1 ? 1 : h.C, h.S}, bank_at{lanes, h.S > 1 ? 1 : h.C_old, h.S};
  const int64_t start = n * h.C * h.S + s, bank_start = n * h.C_old * h.S + s;
  const int64_t new_start = start + h.C_old * h.S, C_new = h.C - h.C_old;
  Lanes<acc_t, W> old_loss{}, new_loss{};

  load<acc_t, W>(h.logits + start, at, h.labels ? h.C : h.C_old, x);
  if (h.targets)
    load<acc_t, W>(h.targets + bank_start, bank_at, h.C_old, y);
  int64_t first = 0; // class at which the head begins
  for (int64_t size : h.head_sizes) {
    Lanes<acc_t, W> *p = x + first, *target = y + first;
    typedef Lanes<acc_t, W> Block;
    const auto compare = [&](int64_t c, const Block &x, Block &mass, Block &dot)
                             BLD_EXT_INLINE_LAMBDA {
                               mass += target[c];
                               dot += target[c] == 0 ? Block{} : target[c] * x; // 0 of x = -inf
                             };
    const auto ignore = [](int64_t, const Block &, Block &, Block &) BLD_EXT_INLINE_LAMBDA {};
    const auto [log_sum, mass, dot] =
        h.targets ? softmax<acc_t, W>(p, size, h.inverse_temperature, compare)
                  : softmax<acc_t, W>(p, size, h.inverse_temperature, ignore);
    if (h.targets) {
      old_loss += mass * log_sum - dot;  // -Σ ŷ (x - log Σ e^x)
      for (int64_t c = 0; c < size; ++c) // exactly 0 where the bank was made from these logits
        target[c] = (p[c] - target[c]) * h.inverse_temperature;
    }
    first += size;
  }
  if (h.bank)
    store<acc_t, W>(x, bank_at, h.C_old, h.bank + bank_start);
  if (h.old_grad) {
    store<acc_t, W>(y, at, h.C_old, h.old_grad + start);
    zero(at, C_new, h.old_grad + new_start);
  }

  if (h.labels) {
    Lanes<acc_t, W> *p = x + h.C_old;
    typedef std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t> Class;
    Lanes<Class, W> label{};
    Lanes<acc_t, W> poison{}, counts{};
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t class_ = h.labels[n * h.S + s + i];
      const bool known = 0 <= class_ && class_ < C_new;
      label[i] = known ? static_cast<Class>(class_) : -1;
      poison[i] = known ? 0 : std::numeric_limits<acc_t>::quiet_NaN();
      counts[i] = class_ != IGNORED;
    }
    const auto pick = [&](int64_t c, const Lanes<acc_t, W> &x, Lanes<acc_t, W> &dot,
                          Lanes<acc_t, W> &) BLD_EXT_INLINE_LAMBDA {
      dot += label == static_cast<Class>(c) ? x : Lanes<acc_t, W>{};
    };
    const Sums<acc_t, W> found = softmax<acc_t, W>(p, C_new, 1, pick);
    new_loss = found.log_sum - found.first + poison;
    new_loss = counts == 0 ? Lanes<acc_t, W>{} : new_loss; // whatever its logits are
    for (int64_t c = 0; c < C_new; ++c) {
      p[c] += (label == static_cast<Class>(c) ? Lanes<acc_t, W>{} - 1 : Lanes<acc_t, W>{}) + poison;
      p[c] = counts == 0 ? Lanes<acc_t, W>{} : p[c];
    }
    store<acc_t, W>(p, at, C_new, h.new_grad + new_start);
    zero(at, h.C_old, h.new_grad + start);
  }
  for (int64_t i = 0; i < lanes; ++i) {
    sums[0] += new_loss[i];
    sums[1] += old_loss[i];
  }
}

// Some pieces of the lines; sums[piece] = {new loss, old loss}.
template <typename scalar_t, typename acc_t, int64_t W>
BLD_EXT_INLINE void run_pieces(const Heads<scalar_t, acc_t> &h, int64_t begin, int64_t end,
                               double (*sums)[2]) {
  struct alignas(64) Room {
    Lanes<acc_t, W> lanes[64 / sizeof(Lanes<acc_t, W>)];
  };
  std::vector<Room> room((2 * h.C * sizeof(Lanes<acc_t, W>) + sizeof(Room) - 1) / sizeof(Room));
  Lanes<acc_t, W> *x = room.data()->lanes, *y = x + h.C;
  for (int64_t i = begin; i < end; ++i) {
    sums[i][0] = sums[i][1] = 0;
    const int64_t line = i / h.pieces_a_line(), first = i % h.pieces_a_line() * h.piece();
    const int64_t last = std::min(first + h.piece(), h.line());
    for (int64_t at = first; at < last; at += W)
      tile<scalar_t, acc_t, W>(h, h.S > 1 ? line : at, h.S > 1 ? at : 0, std::min(W, last - at), x,
                               y, sums[i]);
  }
}

template <typename scalar_t, typename acc_t>
void run_baseline(const Heads<scalar_t, acc_t> &h, int64_t begin, int64_t end, double (*sums)[2]) {
  run_pieces<scalar_t, acc_t, 16 / sizeof(acc_t)>(h, begin, end, sums);
}
#if defined(__x86_64__)
template <typename scalar_t, typename acc_t>
[[gnu::target("avx2")]] void run_avx2(const Heads<scalar_t, acc_t> &h, int64_t begin, int64_t end,
                                      double (*sums)[2]) {
  run_pieces<scalar_t, acc_t, 32 / sizeof(acc_t)>(h, begin, end, sums);
}
template <typename scalar_t, typename acc_t>
[[gnu::target("avx512f,avx512dq,avx512vl")]] void
run_avx512(const Heads<scalar_t, acc_t> &h, int64_t begin, int64_t end, double (*sums)[2]) {
  run_pieces<scalar_t, acc_t, 64 / sizeof(acc_t)>(h, begin, end, sums);
}
#endif

// Everything, over torch's threads; returns {new loss, old loss}.
template <typename scalar_t, typename acc_t>
std::pair<double, double> run(const Heads<scalar_t, acc_t> &h) {
  auto run_some = run_baseline<scalar_t, acc_t>;
#if defined(__x86_64__)
  if (registers() == Registers::avx512)
    run_some = run_avx512<scalar_t, acc_t>;
  else if (registers() == Registers::avx2)
    run_some = run_avx2<scalar_t, acc_t>;
#endif
  const int64_t pieces = h.lines() * h.pieces_a_line();
  std::unique_ptr<double[][2]> sums(new double[pieces][2]);
  torch::stable::parallel_for(
      0, pieces, 1, [&](int64_t begin, int64_t end) { run_some(h, begin, end, sums.get()); });
  double new_loss = 0, old_loss = 0;
  for (int64_t i = 0; i < pieces; ++i) {
    new_loss += sums[i][0];
    old_loss += sums[i][1];
  }
  return {new_loss, old_loss};
}

// One op's inputs and the outputs it wants; what it has no use for stays empty.
struct Call {
  Tensor logits;                            // [N, C, *spatial], contiguous
  std::vector<int64_t> head_sizes;          // of the old heads
  double temperature;                       // τ
  std::optional<Tensor> labels;             // [N, *spatial], contiguous
  std::optional<Tensor> targets;            // [N, C_old, *spatial], contiguous
  std::optional<Tensor> bank;               // [N, C_old, *spatial]
  std::optional<Tensor> old_grad, new_grad; // [N, C, *spatial]
  std::optional<Tensor> old_loss, new_loss; // scalars

  bool is_double() const { return logits.scalar_type() == ScalarType::Double; }
  ScalarType acc_dtype() const { return is_double() ? ScalarType::Double : ScalarType::Float; }
  int64_t old_classes() const {
    return std::accumulate(head_sizes.begin(), head_sizes.end(), int64_t(0));
  }
  std::vector<int64_t> shape(int64_t classes) const { // [N, classes, *spatial]
    std::vector<int64_t> shape(logits.sizes().begin(), logits.sizes().end());
    shape[1] = classes;
    return shape;
  }
  Tensor make_bank() const {
    return torch::stable::new_empty(logits, shape(old_classes()), acc_dtype());
  }
  Tensor make_loss() const {
    return torch::stable::new_empty(logits, std::vector<int64_t>{}, acc_dtype());
  }
  Tensor make_grad() const {
    return torch::stable::new_empty(logits, shape(logits.size(1)), acc_dtype());
  }
};

template <typename scalar_t> void launch(const Call &call) {
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  const auto in = [](const std::optional<Tensor> &t) { return t ? t->const_data_ptr() : nullptr; };
  const auto out = [](const std::optional<Tensor> &t) {
    return t ? t->mutable_data_ptr() : nullptr;
  };
  Heads<scalar_t, acc_t> h;
  h.logits = static_cast<const scalar_t *>(call.logits.const_data_ptr());
  h.labels = static_cast<const int64_t *>(in(call.labels));
  h.targets = static_cast<const acc_t *>(in(call.targets));
  h.bank = static_cast<acc_t *>(out(call.bank));
  h.old_grad = static_cast<acc_t *>(out(call.old_grad));
  h.new_grad = static_cast<acc_t *>(out(call.new_grad));
  h.head_sizes = call.head_sizes;
  h.N = call.logits.size(0);
  h.C = call.logits.size(1);
  h.C_old = call.old_classes();
  h.S = call.logits.numel() / std::max<int64_t>(1, h.N * h.C);
  h.inverse_temperature = // of a tiny τ: finite, so that 0 / τ stays 0
      static_cast<acc_t>(std::min<double>(1 / call.temperature, std::numeric_limits<acc_t>::max()));
  const auto [new_loss, old_loss] = call.logits.numel() ? run(h) : std::pair(0., 0.);
  if (call.new_loss)
    *static_cast<acc_t *>(out(call.new_loss)) = static_cast<acc_t>(new_loss);
  if (call.old_loss)
    *static_cast<acc_t *>(out(call.old_loss)) = static_cast<acc_t>(old_loss);
}

void dispatch(const Call &call) {
  THO_DISPATCH_V2(call.logits.scalar_type(), "bld_ext", AT_WRAP([&] { launch<scalar_t>(call); }),
                  AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, ScalarType::BFloat16);
}

Tensor dense(const Tensor &tensor) { // without a call to the dispatcher where it can be
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Call begin(const Tensor &logits, std::vector<int64_t> head_sizes, const Tensor &temperature) {
  BLD_CHECK(logits.dim() >= 2, "logits: expected [N, C, *spatial], got ", logits.dim(),
            " dimensions");
  int64_t left = logits.size(1);
  for (int64_t size : head_sizes) {
    BLD_CHECK(size >= 1, "head_sizes: expected sizes of at least 1, got ", size);
    BLD_CHECK(size <= left, "head_sizes: they sum to more than the ", logits.size(1),
              " classes of logits");
    left -= size;
  }
  BLD_CHECK(temperature.dim() == 0 && temperature.scalar_type() == ScalarType::Double,
            "temperature: expected a float64 scalar");
  Call call;
  call.logits = dense(logits);
  call.head_sizes = std::move(head_sizes);
  call.temperature = *static_cast<const double *>(temperature.const_data_ptr());
  BLD_CHECK(call.temperature > 0 && std::isfinite(call.temperature),
            "temperature: expected a positive finite number, got ", call.temperature);
  return call;
}

void set_labels(Call &call, const Tensor &labels) {
  BLD_CHECK(!call.head_sizes.empty(), "head_sizes: expected at least one head");
  BLD_CHECK(call.old_classes() == call.logits.size(1), "head_sizes: expected a sum of ",
            call.logits.size(1), ", the classes of logits");
  call.head_sizes.pop_back();
  BLD_CHECK(labels.scalar_type() == ScalarType::Long, "labels: expected int64");
  const auto of_logits = call.logits.sizes(), of_labels = labels.sizes();
  BLD_CHECK(labels.dim() + 1 == call.logits.dim() && of_labels[0] == of_logits[0] &&
                std::equal(of_labels.begin() + 1, of_labels.end(), of_logits.begin() + 2),
            "labels: expected [N, *spatial], one for each position of logits");
  BLD_CHECK(call.logits.size(1) < INT32_MAX, "logits: expected fewer than 2^31 classes");
  call.labels = dense(labels);
}

void set_targets(Call &call, const Tensor &bank) {
  BLD_CHECK(bank.scalar_type() == call.acc_dtype(),
            "bank: expected float32, or float64 for float64 logits");
  const std::vector<int64_t> expected = call.shape(call.old_classes());
  BLD_CHECK(bank.dim() == call.logits.dim() &&
                std::equal(expected.begin(), expected.end(), bank.sizes().begin()),
            "bank: expected [N, C_old, *spatial], the shape of logits with ", expected[1],
            " classes");
  call.targets = dense(bank);
}

// The ops; the shapes are those of bld_ext/ops.py.

Tensor head_softmax(const Tensor &logits, std::vector<int64_t> head_sizes,
                    const Tensor &temperature) {
  Call call = begin(logits, std::move(head_sizes), temperature);
  call.bank = call.make_bank();
  dispatch(call);
  return *call.bank;
}

std::tuple<Tensor, Tensor> distillation_loss(const Tensor &logits, const Tensor &bank,
                                             std::vector<int64_t> head_sizes,
                                             const Tensor &temperature) {
  Call call = begin(logits, std::move(head_sizes), temperature);
  set_targets(call, bank);
  call.old_loss = call.make_loss();
  call.old_grad = call.make_grad();
  dispatch(call);
  return {*call.old_loss, *call.old_grad};
}

std::tuple<Tensor, Tensor, Tensor> warm_up_loss(const Tensor &logits, const Tensor &labels,
                                                std::vector<int64_t> head_sizes,
                                                const Tensor &temperature) {
  Call call = begin(logits, std::move(head_sizes), temperature);
  set_labels(call, labels);
  call.bank = call.make_bank();
  call.new_loss = call.make_loss();
  call.new_grad = call.make_grad();
  dispatch(call);
  return {*call.new_loss, *call.bank, *call.new_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> joint_loss(const Tensor &logits, const Tensor &labels,
                                                      const Tensor &bank,
                                                      std::vector<int64_t> head_sizes,
                                                      const Tensor &temperature) {
  Call call = begin(logits, std::move(head_sizes), temperature);
  set_labels(call, labels);
  set_targets(call, bank);
  call.new_loss = call.make_loss();
  call.old_loss = call.make_loss();
  call.new_grad = call.make_grad();
  call.old_grad = call.make_grad();
  dispatch(call);
  return {*call.new_loss, *call.old_loss, *call.new_grad, *call.old_grad};
}

STABLE_TORCH_LIBRARY_IMPL(bld_ext, CPU, m) {
  m.impl("head_softmax", TORCH_BOX(&head_softmax));
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss));
  m.impl("warm_up_loss", TORCH_BOX(&warm_up_loss));
  m.impl("joint_loss", TORCH_BOX(&joint_loss));
}

} // namespace
} // namespace bld_ext
