// view_batch_norm and view_batch_norm_backward on a CPU. An item of work is one view of sixteen
// channels, or of one channel where positions are next to each other: its statistics, then the
// output, while it is still in the cache. Items do not depend on each other, so a view's results do
// not depend on the views beside it, on threads or on registers.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "channels_last.h"
#include "lanes.h"

namespace bld_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t SIDE = 16; // channels, or positions of one channel, computed side by side
constexpr int64_t FEW = 32;  // vectors that are added up in float before they join a sum in double
constexpr int64_t SERIAL_ELEMENTS = 1 << 14; // where waking a thread takes longer than the work

// How the elements of [V·B, C, S] lie.
struct Shape {
  int64_t V, B, C, S;
  bool channels_last; // [V·B, S, C]

  int64_t blocks() const { return channels_last ? (C + SIDE - 1) / SIDE : C; }
  int64_t first_channel(int64_t block) const { return channels_last ? block * SIDE : block; }
  int64_t channels(int64_t block) const {
    return channels_last ? std::min(SIDE, C - block * SIDE) : 1;
  }
};

// SIDE numbers, in registers of W.
template <typename T, int64_t W> struct Side {
  static constexpr int64_t K = SIDE / W;
  Lanes<T, W> part[K];
};

// result[k] = function(k), for each register.
template <typename T, int64_t W, typename Function>
BLD_EXT_INLINE Side<T, W> each(Function function) {
  Side<T, W> result;
  for (int64_t k = 0; k < Side<T, W>::K; ++k)
    result.part[k] = function(k);
  return result;
}

typedef std::integral_constant<int64_t, SIDE> All;

// function(offset, stride, count, lanes): `count` vectors of an item, `stride` elements apart;
// lanes is a constant where they are whole.
template <typename Function>
BLD_EXT_INLINE void visit(const Shape &shape, int64_t view, int64_t block, Function function) {
  if (shape.channels_last) {
    const int64_t rows = shape.B * shape.S, lanes = shape.channels(block);
    for (int64_t r = 0; r < rows; r += FEW) {
      const int64_t at = (view * rows + r) * shape.C + block * SIDE;
      if (lanes == SIDE)
        function(at, shape.C, std::min(FEW, rows - r), All{});
      else
        function(at, shape.C, std::min(FEW, rows - r), lanes);
    }
    return;
  }
  for (int64_t b = 0; b < shape.B; ++b) {
    const int64_t plane = ((view * shape.B + b) * shape.C + block) * shape.S;
    const int64_t whole = shape.S / SIDE;
    for (int64_t i = 0; i < whole; i += FEW)
      function(plane + i * SIDE, SIDE, std::min(FEW, whole - i), All{});
    if (whole * SIDE < shape.S)
      function(plane + whole * SIDE, SIDE, 1, shape.S - whole * SIDE);
  }
}

// Lanes that are not there become 0.
template <typename acc_t, int64_t W, typename Count>
BLD_EXT_INLINE Side<acc_t, W> load(const acc_t *from, Count lanes) {
  if constexpr (std::is_same_v<Count, All>) {
    return each<acc_t, W>([&](int64_t k) BLD_EXT_INLINE_LAMBDA {
      Lanes<acc_t, W> part; // one register a copy, so that none goes through memory
      std::memcpy(&part, from + k * W, sizeof part);
      return part;
    });
  } else {
    alignas(64) acc_t buffer[SIDE] = {};
    for (int64_t i = 0; i < lanes; ++i)
      buffer[i] = from[i];
    return load<acc_t, W>(buffer, All{});
  }
}

template <typename acc_t, int64_t W, typename Count>
BLD_EXT_INLINE void store(const Side<acc_t, W> &x, acc_t *to, Count lanes) {
  if constexpr (std::is_same_v<Count, All>) {
    for (int64_t k = 0; k < Side<acc_t, W>::K; ++k)
      std::memcpy(to + k * W, &x.part[k], sizeof x.part[k]);
  } else {
    alignas(64) acc_t buffer[SIDE];
    store(x, buffer, All{});
    for (int64_t i = 0; i < lanes; ++i)
      to[i] = buffer[i];
  }
}

// A sum of many vectors: a few in acc_t, those in double.
template <typename acc_t, int64_t W> struct Sum {
  Side<acc_t, W> few{};
  double all[SIDE] = {};
  int64_t pending = 0;

  BLD_EXT_INLINE void flush() {
    alignas(64) acc_t lanes[SIDE];
    store(few, lanes, All{});
    for (int64_t i = 0; i < SIDE; ++i)
      all[i] += static_cast<double>(lanes[i]);
    few = Side<acc_t, W>{};
    pending = 0;
  }
  BLD_EXT_INLINE void added(const Side<acc_t, W> &sum, int64_t count) {
    few = sum;
    pending += count;
    if (pending >= FEW)
      flush();
  }
  // Of each channel; or of the one channel, pairwise, in every lane.
  BLD_EXT_INLINE void total(const Shape &shape) {
    flush();
    if (shape.channels_last)
      return;
    for (int64_t half = SIDE / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i)
        all[i] += all[i + half];
    for (int64_t i = 1; i < SIDE; ++i)
      all[i] = all[0];
  }
};

// The channels of an item, from an array [C] or a row of [V, C]: one channel in every lane.
template <typename acc_t>
BLD_EXT_INLINE void read(const acc_t *values, const Shape &shape, int64_t block, acc_t *to) {
  const int64_t first = shape.first_channel(block), count = shape.channels(block);
  for (int64_t i = 0; i < SIDE; ++i)
    to[i] = shape.channels_last ? (i < count ? values[first + i] : acc_t(0)) : values[first];
}

// 1 / sqrt(variance + ε)
template <typename acc_t> BLD_EXT_INLINE void inverse_deviation(acc_t *variance, double eps) {
  // GCC 12 otherwise takes some variances as they were before they were rounded to acc_t
  asm volatile("" : : "r"(variance) : "memory");
  for (int64_t i = 0; i < SIDE; ++i)
    variance[i] = static_cast<acc_t>(1 / std::sqrt(static_cast<double>(variance[i]) + eps));
}

template <typename T> struct Forward {
  using acc_t = T;
  Shape shape;
  const acc_t *x, *residual;  // residual, weight, bias: or null
  const acc_t *weight, *bias; // [C]
  acc_t *y;
  acc_t *mean, *variance; // [V, C]
  double eps;
  bool relu;

  template <int64_t W> BLD_EXT_INLINE void run(int64_t view, int64_t block) const {
    using Numbers = Side<acc_t, W>;
    const double n = static_cast<double>(shape.B * shape.S);
    const int64_t first = view * shape.C + shape.first_channel(block);
    const int64_t channels = shape.channels(block);
    alignas(64) acc_t means[SIDE], scales[SIDE], shifts[SIDE] = {};

    Sum<acc_t, W> sum;
    visit(shape, view, block,
          [&](int64_t at, int64_t stride, int64_t count, auto lanes) BLD_EXT_INLINE_LAMBDA {
            Numbers few = sum.few; // in registers
            for (int64_t i = 0; i < count; ++i) {
              const Numbers now = load<acc_t, W>(x + at + i * stride, lanes);
              for (int64_t k = 0; k < Numbers::K; ++k)
                few.part[k] += now.part[k];
            }
            sum.added(few, count);
          });
    sum.total(shape);
    for (int64_t i = 0; i < SIDE; ++i)
      means[i] = static_cast<acc_t>(sum.all[i] / n);
    std::memcpy(mean + first, means, channels * sizeof(acc_t));
    const Numbers m = load<acc_t, W>(means, All{});

    Sum<acc_t, W> squares;
    visit(shape, view, block,
          [&](int64_t at, int64_t stride, int64_t count, auto lanes) BLD_EXT_INLINE_LAMBDA {
            Numbers few = squares.few;
            for (int64_t i = 0; i < count; ++i) {
              const Numbers now = load<acc_t, W>(x + at + i * stride, lanes);
              Numbers apart = each<acc_t, W>(
                  [&](int64_t k) BLD_EXT_INLINE_LAMBDA { return now.part[k] - m.part[k]; });
              if constexpr (!std::is_same_v<decltype(lanes), All>) {
                alignas(64) acc_t there[SIDE] = {};
                store(apart, there, lanes);
                apart = load<acc_t, W>(there, All{});
              }
              for (int64_t k = 0; k < Numbers::K; ++k)
                few.part[k] += apart.part[k] * apart.part[k];
            }
            squares.added(few, count);
          });
    squares.total(shape);
    for (int64_t i = 0; i < SIDE; ++i)
      scales[i] = static_cast<acc_t>(squares.all[i] / n);
    std::memcpy(variance + first, scales, channels * sizeof(acc_t));

    inverse_deviation(scales, eps);
    if (weight) {
      read(weight, shape, block, shifts);
      for (int64_t i = 0; i < SIDE; ++i)
        scales[i] *= shifts[i];
    }
    std::fill(shifts, shifts + SIDE, acc_t(0));
    if (bias)
      read(bias, shape, block, shifts);
    const Numbers scale = load<acc_t, W>(scales, All{}), shift = load<acc_t, W>(shifts, All{});
    visit(shape, view, block,
          [&](int64_t at, int64_t stride, int64_t count, auto lanes) BLD_EXT_INLINE_LAMBDA {
            for (int64_t i = 0; i < count; ++i) {
              const Numbers now = load<acc_t, W>(x + at + i * stride, lanes);
              Numbers out = each<acc_t, W>([&](int64_t k) BLD_EXT_INLINE_LAMBDA {
                return (now.part[k] - m.part[k]) * scale.part[k] + shift.part[k];
              });
              if (residual) {
                const Numbers beside = load<acc_t, W>(residual + at + i * stride, lanes);
                for (int64_t k = 0; k < Numbers::K; ++k)
                  out.part[k] += beside.part[k];
              }
              if (relu)
                for (int64_t k = 0; k < Numbers::K; ++k) // nan stays, -0 does not
                  out.part[k] = out.part[k] <= 0 ? Lanes<acc_t, W>{} : out.part[k];
              store(out, y + at + i * stride, lanes);
            }
          });
  }
};

template <typename T> struct Backward {
  using acc_t = T;
  Shape shape;
  const acc_t *grad_y, *x, *y;     // y, weight and bias: or null
  const acc_t *weight, *bias;      // [C]
  const acc_t *mean, *variance;    // [V, C]
  acc_t *grad_x, *grad_residual;   // grad_residual: or null
  double *grad_weight, *grad_bias; // [V, C], of each view
  double eps;
  bool relu;

  // x - mean
  template <int64_t W, typename Count>
  BLD_EXT_INLINE Side<acc_t, W> away(int64_t at, Count lanes, const Side<acc_t, W> &m) const {
    const Side<acc_t, W> now = load<acc_t, W>(x + at, lanes);
    return each<acc_t, W>([&](int64_t k) BLD_EXT_INLINE_LAMBDA { return now.part[k] - m.part[k]; });
  }

  // The gradient where the ReLU let y through; without y, it is computed again as in Forward.
  template <int64_t W, typename Count>
  BLD_EXT_INLINE Side<acc_t, W> incoming(int64_t at, Count lanes, const Side<acc_t, W> &apart,
                                         const Side<acc_t, W> &scale,
                                         const Side<acc_t, W> &shift) const {
    Side<acc_t, W> grad = load<acc_t, W>(grad_y + at, lanes);
    if (relu) {
      const Side<acc_t, W> out =
          y ? load<acc_t, W>(y + at, lanes) : each<acc_t, W>([&](int64_t k) BLD_EXT_INLINE_LAMBDA {
            return apart.part[k] * scale.part[k] + shift.part[k];
          });
      for (int64_t k = 0; k < Side<acc_t, W>::K; ++k)
        grad.part[k] = out.part[k] <= 0 ? Lanes<acc_t, W>{} : grad.part[k];
    }
    return grad;
  }

  template <int64_t W> BLD_EXT_INLINE void run(int64_t view, int64_t block) const {
    using Numbers = Side<acc_t, W>;
    const double n = static_cast<double>(shape.B * shape.S);
    const int64_t first = view * shape.C + shape.first_channel(block);
    alignas(64) acc_t means[SIDE], inverses[SIDE], averages[SIDE], slopes[SIDE];
    alignas(64) acc_t scales[SIDE], shifts[SIDE] = {};
    read(mean + view * shape.C, shape, block, means);
    read(variance + view * shape.C, shape, block, inverses);
    inverse_deviation(inverses, eps);
    const Numbers m = load<acc_t, W>(means, All{});
    if (weight)
      read(weight, shape, block, shifts);
    for (int64_t i = 0; i < SIDE; ++i)
      scales[i] = weight ? inverses[i] * shifts[i] : inverses[i];
    std::fill(shifts, shifts + SIDE, acc_t(0));
    if (bias)
      read(bias, shape, block, shifts);
    const Numbers scale = load<acc_t, W>(scales, All{}), shift = load<acc_t, W>(shifts, All{});

    Sum<acc_t, W> sum, product;
    visit(shape, view, block,
          [&](int64_t at, int64_t stride, int64_t count, auto lanes) BLD_EXT_INLINE_LAMBDA {
            Numbers few = sum.few, products = product.few;
            for (int64_t i = 0; i < count; ++i) {
              const Numbers apart = away(at + i * stride, lanes, m);
              const Numbers grad = incoming<W>(at + i * stride, lanes, apart, scale, shift);
              for (int64_t k = 0; k < Numbers::K; ++k) {
                few.part[k] += grad.part[k];
                products.part[k] += grad.part[k] * apart.part[k];
              }
            }
            sum.added(few, count);
            product.added(products, count);
          });
    sum.total(shape);
    product.total(shape);
    for (int64_t i = 0; i < SIDE; ++i) {
      const double inverse = n > 0 ? static_cast<double>(inverses[i]) : 0; // nan without elements
      const double gain = product.all[i] * inverse;
      averages[i] = static_cast<acc_t>(sum.all[i] / n);
      slopes[i] = static_cast<acc_t>(gain * inverse / n);
      if (i < shape.channels(block)) {
        grad_weight[first + i] = gain;
        grad_bias[first + i] = sum.all[i];
      }
    }

    const Numbers average = load<acc_t, W>(averages, All{}), slope = load<acc_t, W>(slopes, All{});
    visit(shape, view, block,
          [&](int64_t at, int64_t stride, int64_t count, auto lanes) BLD_EXT_INLINE_LAMBDA {
            for (int64_t i = 0; i < count; ++i) {
              const Numbers apart = away(at + i * stride, lanes, m);
              const Numbers grad = incoming<W>(at + i * stride, lanes, apart, scale, shift);
              store(each<acc_t, W>([&](int64_t k) BLD_EXT_INLINE_LAMBDA {
                      return (grad.part[k] - average.part[k] - apart.part[k] * slope.part[k]) *
                             scale.part[k];
                    }),
                    grad_x + at + i * stride, lanes);
              if (grad_residual)
                store(grad, grad_residual + at + i * stride, lanes);
            }
          });
  }
};

template <int64_t BYTES, typename Pass>
BLD_EXT_INLINE void run_items(const Pass &pass, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    pass.template run<BYTES / sizeof(typename Pass::acc_t)>(i / pass.shape.blocks(),
                                                            i % pass.shape.blocks());
}
template <typename Pass> void run_baseline(const Pass &pass, int64_t begin, int64_t end) {
  run_items<16>(pass, begin, end);
}
#if defined(__x86_64__)
template <typename Pass>
[[gnu::target("avx2")]] void run_avx2(const Pass &pass, int64_t begin, int64_t end) {
  run_items<32>(pass, begin, end);
}
template <typename Pass>
[[gnu::target("avx512f,avx512dq,avx512vl")]] void run_avx512(const Pass &pass, int64_t begin,
                                                             int64_t end) {
  run_items<64>(pass, begin, end);
}
#endif

template <typename Pass> void run(const Pass &pass) {
  auto run_some = run_baseline<Pass>;
#if defined(__x86_64__)
  if (registers() == Registers::avx512)
    run_some = run_avx512<Pass>;
  else if (registers() == Registers::avx2)
    run_some = run_avx2<Pass>;
#endif
  const Shape &shape = pass.shape;
  const int64_t items = shape.V * shape.blocks();
  if (shape.V * shape.B * shape.C * shape.S <= SERIAL_ELEMENTS)
    run_some(pass, 0, items);
  else
    torch::stable::parallel_for(0, items, 1,
                                [&](int64_t begin, int64_t end) { run_some(pass, begin, end); });
}

// ---- the ops; their documentation is in bld_ext/ops.py ----

// A tensor [N, C, *] seen as [N, *, C].
Tensor rows_of_channels(Tensor tensor) {
  for (int64_t d = 1; d < tensor.dim() - 1; ++d)
    tensor = torch::stable::transpose(tensor, d, d + 1);
  return tensor;
}

// Tensors of one shape and layout: contiguous, or with the channels last where the first of them
// is.
class Layout {
  bool permuted;

public:
  Shape shape;

  Layout(const Tensor &input, int64_t views) {
    BLD_CHECK(input.dim() >= 2, "input: expected [V·B, C, *], got ", input.dim(), " dimensions");
    BLD_CHECK(views >= 1 && input.size(0) % views == 0, "views: expected a divisor of ",
              input.size(0), " images, got ", views);
    const int64_t C = input.size(1);
    int64_t S = 1;
    for (int64_t d = 2; d < input.dim(); ++d)
      S *= input.size(d);
    permuted = !input.is_contiguous() && rows_of_channels(input).is_contiguous();
    shape = {views, input.size(0) / views, C, S, permuted || S == 1};
  }
  Tensor in(const Tensor &tensor) const {
    const Tensor t = permuted ? rows_of_channels(tensor) : tensor;
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }
  std::optional<Tensor> in(const std::optional<Tensor> &tensor) const {
    return tensor ? std::optional(in(*tensor)) : std::nullopt;
  }
  // The input in float, in the layout that results have.
  Tensor wide(const Tensor &input) const {
    const bool kept = permuted || input.is_contiguous();
    return torch::stable::to(kept ? input : torch::stable::contiguous(input), ScalarType::Float);
  }
  Tensor make(const Tensor &input) const {
    const std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
    if (!permuted)
      return torch::stable::new_empty(input, sizes);
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
    return new_channels_last(input, sizes, dtype);
  }
};

ScalarType acc_dtype(const Tensor &input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_channels(const char *name, const std::optional<Tensor> &tensor, const Tensor &input) {
  BLD_CHECK(
      !tensor || (tensor->is_contiguous() && tensor->is_cpu() && tensor->dim() == 1 &&
                  tensor->size(0) == input.size(1) && tensor->scalar_type() == acc_dtype(input)),
      name, ": expected [", input.size(1), "], contiguous, float32, or float64 for float64 input");
}

void check_statistics(const char *name, const Tensor &tensor, const Shape &shape,
                      const Tensor &input) {
  BLD_CHECK(tensor.is_contiguous() && tensor.is_cpu() && tensor.dim() == 2 &&
                tensor.size(0) == shape.V && tensor.size(1) == shape.C &&
                tensor.scalar_type() == acc_dtype(input),
            name, ": expected [", shape.V, ", ", shape.C, "], what view_batch_norm returned");
}

void check_same(const char *name, const std::optional<Tensor> &tensor, const Tensor &input) {
  BLD_CHECK(!tensor ||
                (tensor->is_cpu() && tensor->scalar_type() == input.scalar_type() &&
                 tensor->dim() == input.dim() &&
                 std::equal(tensor->sizes().begin(), tensor->sizes().end(), input.sizes().begin())),
            name, ": expected the shape and dtype of input");
}

template <typename T> const T *in(const std::optional<Tensor> &tensor) {
  return tensor ? static_cast<const T *>(tensor->const_data_ptr()) : nullptr;
}
template <typename T> T *out(const Tensor &tensor) {
  return static_cast<T *>(tensor.mutable_data_ptr());
}

// Half precision is computed in float: converted before and after, as it is too rare on a CPU to
// have kernels of its own.
bool is_half(const Tensor &tensor) {
  return tensor.scalar_type() == ScalarType::Half || tensor.scalar_type() == ScalarType::BFloat16;
}
Tensor wide(const Tensor &tensor) { return torch::stable::to(tensor, ScalarType::Float); }
std::optional<Tensor> wide(const std::optional<Tensor> &tensor) {
  return tensor ? std::optional(wide(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> view_batch_norm(const Tensor &input,
                                                   const std::optional<Tensor> &weight,
                                                   const std::optional<Tensor> &bias,
                                                   const std::optional<Tensor> &residual,
                                                   int64_t views, double eps, bool relu) {
  const Layout layout(input, views);
  const Shape &shape = layout.shape;
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_same("residual", residual, input);
  if (is_half(input)) {
    const auto [y, mean, variance] =
        view_batch_norm(layout.wide(input), weight, bias, wide(residual), views, eps, relu);
    return {torch::stable::to(y, input.scalar_type()), mean, variance};
  }
  const Tensor x = layout.in(input);
  const std::optional<Tensor> beside = layout.in(residual);
  const std::vector<int64_t> each{shape.V, shape.C};
  Tensor mean = torch::stable::new_empty(x, each, acc_dtype(x));
  Tensor variance = torch::stable::new_empty(x, each, acc_dtype(x)), y = layout.make(input);
  const auto launch = [&](auto zero) {
    using acc_t = decltype(zero);
    run(Forward<acc_t>{shape, in<acc_t>(x), in<acc_t>(beside), in<acc_t>(weight), in<acc_t>(bias),
                       out<acc_t>(y), out<acc_t>(mean), out<acc_t>(variance), eps, relu});
  };
  THO_DISPATCH_V2(x.scalar_type(), "view_batch_norm", AT_WRAP([&] { launch(scalar_t{}); }),
                  AT_EXPAND(AT_FLOATING_TYPES));
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> view_batch_norm_backward(
    const Tensor &grad_output, const Tensor &input, const std::optional<Tensor> &output,
    const std::optional<Tensor> &weight, const std::optional<Tensor> &bias, const Tensor &mean,
    const Tensor &variance, int64_t views, double eps, bool relu, bool residual) {
  const Layout layout(input, views);
  const Shape &shape = layout.shape;
  check_same("grad_output", grad_output, input);
  check_same("output", output, input);
  check_channels("weight", weight, input);
  check_channels("bias", bias, input);
  check_statistics("mean", mean, shape, input);
  check_statistics("variance", variance, shape, input);
  if (is_half(input)) {
    const auto [grad_x, grad_weight, grad_bias, grad_residual] =
        view_batch_norm_backward(wide(grad_output), layout.wide(input), wide(output), weight, bias,
                                 mean, variance, views, eps, relu, residual);
    return {torch::stable::to(grad_x, input.scalar_type()), grad_weight, grad_bias,
            torch::stable::to(grad_residual, input.scalar_type())};
  }
  const Tensor x = layout.in(input), grad = layout.in(grad_output);
  const std::optional<Tensor> y = layout.in(output);
  Tensor grad_x = layout.make(input), grad_residual = residual ? layout.make(input) : grad;
  Tensor grad_weight = torch::stable::new_empty(mean, std::vector<int64_t>{shape.C});
  Tensor grad_bias = torch::stable::new_empty(mean, std::vector<int64_t>{shape.C});
  const std::unique_ptr<double[]> parts(new double[2 * shape.V * shape.C]);
  const auto launch = [&](auto zero) {
    using acc_t = decltype(zero);
    run(Backward<acc_t>{shape, in<acc_t>(grad), in<acc_t>(x), in<acc_t>(y), in<acc_t>(weight),
                        in<acc_t>(bias), in<acc_t>(mean), in<acc_t>(variance), out<acc_t>(grad_x),
                        residual ? out<acc_t>(grad_residual) : nullptr, parts.get(),
                        parts.get() + shape.V * shape.C, eps, relu});
    for (int64_t c = 0; c < shape.C; ++c) {
      double gain = 0, shift = 0;
      for (int64_t v = 0; v < shape.V; ++v) {
        gain += parts[v * shape.C + c];
        shift += parts[(shape.V + v) * shape.C + c];
      }
      out<acc_t>(grad_weight)[c] = static_cast<acc_t>(gain);
      out<acc_t>(grad_bias)[c] = static_cast<acc_t>(shift);
    }
  };
  THO_DISPATCH_V2(x.scalar_type(), "view_batch_norm_backward", AT_WRAP([&] { launch(scalar_t{}); }),
                  AT_EXPAND(AT_FLOATING_TYPES));
  if (!residual)
    grad_residual = torch::stable::new_empty(grad_x, std::vector<int64_t>{0});
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

STABLE_TORCH_LIBRARY_IMPL(bld_ext, CPU, m) {
  m.impl("view_batch_norm", TORCH_BOX(&view_batch_norm));
  m.impl("view_batch_norm_backward", TORCH_BOX(&view_batch_norm_backward));
}

} // namespace
} // namespace bld_ext
