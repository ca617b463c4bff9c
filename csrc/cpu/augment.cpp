// augment on a CPU. A thread takes image after image, and of each image view after view: parameters
// from Philox, one resample into planes that stay in its cache, colour in place there, and one
// write in the dtype and layout of the result. The arithmetic, and so the bits, are the
// reference's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "../philox.h"
#include "lanes.h"

namespace bld_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t PARALLEL_ELEMENTS = 16384;  // fewer are less work than waking a thread
enum Op : uint32_t { GEOMETRY, ZOOM, COLOR }; // the last word of the Philox counter

// bld_ext.reference.Policy, as it comes packed: nine numbers, then mean and std a channel.
struct Policy {
  int64_t crop_padding;
  double flip, rotation, scale_min, scale_max, brightness, contrast, saturation, hue;
  std::vector<double> mean, std;

  explicit Policy(const std::vector<double> &values) {
    STD_TORCH_CHECK(values.size() >= 9 && values.size() % 2 == 1,
                    "policy: expected nine numbers, then mean and std of each channel, got ",
                    values.size(), " numbers; use Policy.pack()");
    crop_padding = static_cast<int64_t>(values[0]);
    flip = values[1], rotation = values[2], scale_min = values[3], scale_max = values[4];
    brightness = values[5], contrast = values[6], saturation = values[7], hue = values[8];
    STD_TORCH_CHECK(0 <= hue && hue <= 0.5, "policy.hue: expected 0 to 0.5, got ", hue);
    const auto middle = values.begin() + 9 + (values.size() - 9) / 2;
    mean.assign(values.begin() + 9, middle);
    std.assign(middle, values.end());
  }
};

// What is drawn for one view of one image: bld_ext.reference.ViewParameters.
struct View {
  int64_t left, top;
  bool flip;
  float angle, scale, brightness, contrast, saturation, hue;

  View(const Policy &policy, uint64_t seed, uint32_t step, uint32_t view, uint32_t image) {
    const auto words = [&](Op op) { return philox({image, view, step, op}, seed); };
    const auto [w_left, w_top, w_flip, w_angle] = words(GEOMETRY);
    left = below(w_left, 2 * policy.crop_padding + 1);
    top = below(w_top, 2 * policy.crop_padding + 1);
    flip = uniform(w_flip) < policy.flip;
    angle = between(w_angle, -policy.rotation, policy.rotation);
    scale = between(words(ZOOM)[0], policy.scale_min, policy.scale_max);
    const Words color = words(COLOR);
    brightness = between(color[0], 1 - policy.brightness, 1 + policy.brightness);
    contrast = between(color[1], 1 - policy.contrast, 1 + policy.contrast);
    saturation = between(color[2], 1 - policy.saturation, 1 + policy.saturation);
    hue = between(color[3], -policy.hue, policy.hue);
  }
};

struct Call {
  const void *images; // [N, C, H, W], contiguous
  ScalarType image_dtype, dtype;
  void *views; // [V·N, C, H, W], or [V·N, H, W, C] where channels_last
  bool channels_last;
  int64_t N, C, H, W;
  Policy policy;
  uint64_t seed;
  uint32_t step;
  std::vector<int64_t> view_numbers;
  const int64_t *indices; // [N]
};

template <typename F>
BLD_EXT_INLINE void with_dtype(ScalarType dtype, const char *name, const F &f) {
  switch (dtype) {
  case ScalarType::Byte:
    return f(uint8_t());
  case ScalarType::Float:
    return f(float());
  case ScalarType::Double:
    return f(double());
  case ScalarType::BFloat16:
    return f(c10::BFloat16());
  case ScalarType::Half:
    return f(c10::Half());
  default:
    STD_TORCH_CHECK(false, name, ": expected a floating-point dtype or, for images, uint8");
  }
}

constexpr int64_t BORDER = 2; // zeros around an image, where samples outside of it end up

// Memory of one thread, all in the dtype that is computed in.
template <typename acc_t> struct Planes {
  int64_t stride, plane;    // elements of a row and of a channel of the image, with its border
  std::vector<acc_t> image; // [C, H + 2 BORDER, W + 2 BORDER] in [0, 1]
  std::vector<acc_t> view;  // [C, H, W], the same
  std::vector<acc_t> gray;  // [H, W]
  // Of a row's samples: the upper left one of four neighbours, and the weights of all.
  std::vector<int32_t> where;
  std::vector<acc_t> weights; // [4, W]

  explicit Planes(const Call &call)
      : stride(call.W + 2 * BORDER), plane((call.H + 2 * BORDER) * stride), image(call.C * plane),
        view(call.C * call.H * call.W), gray(call.H * call.W), where(call.W), weights(4 * call.W) {}

  acc_t *row(int64_t c, int64_t y) { return &image[c * plane + (y + BORDER) * stride + BORDER]; }
};

template <typename acc_t>
BLD_EXT_INLINE void load_image(const Call &call, int64_t n, Planes<acc_t> &planes) {
  with_dtype(call.image_dtype, "images", [&](auto kind) BLD_EXT_INLINE_LAMBDA {
    typedef decltype(kind) T;
    const T *from = static_cast<const T *>(call.images) + n * call.C * call.H * call.W;
    for (int64_t c = 0; c < call.C; ++c)
      for (int64_t y = 0; y < call.H; ++y, from += call.W) {
        acc_t *const to = planes.row(c, y);
        for (int64_t x = 0; x < call.W; ++x)
          if constexpr (std::is_same_v<T, uint8_t>)
            to[x] = static_cast<acc_t>(from[x]) / acc_t(255);
          else
            to[x] = static_cast<acc_t>(from[x]);
      }
  });
}

// ---- geometry ----

// A view that is a window of the mirrored or plain image, moved by whole pixels.
template <typename acc_t>
BLD_EXT_INLINE void move(const Call &call, const View &view, Planes<acc_t> &planes) {
  const int64_t H = call.H, W = call.W;
  const int64_t dx = view.left - call.policy.crop_padding, dy = view.top - call.policy.crop_padding;
  // columns [first, last) of the view are inside of the image; column x is read at x + dx, or
  // mirrored at W - 1 - x + dx
  const int64_t first = std::clamp<int64_t>(view.flip ? dx : -dx, 0, W);
  const int64_t last = std::clamp<int64_t>(view.flip ? W + dx : W - dx, first, W);
  for (int64_t c = 0; c < call.C; ++c)
    for (int64_t y = 0; y < H; ++y) {
      acc_t *const to = planes.view.data() + (c * H + y) * W;
      if (y + dy < 0 || y + dy >= H) {
        std::fill_n(to, W, acc_t(0));
        continue;
      }
      const acc_t *const from = planes.row(c, y + dy) + dx;
      std::fill_n(to, first, acc_t(0));
      if (view.flip)
        for (int64_t x = first; x < last; ++x)
          to[x] = from[W - 1 - x];
      else
        std::copy(from + first, from + last, to + first);
      std::fill(to + last, to + W, acc_t(0));
    }
}

// Two choices one after the other, which vectorise; nan stays.
template <typename acc_t> BLD_EXT_INLINE acc_t within(acc_t x, acc_t low, acc_t high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// Bilinear samples at the inverse map of every pixel of the view, zero outside of the image.
template <typename acc_t>
BLD_EXT_INLINE void resample(const Call &call, const View &view, Planes<acc_t> &planes) {
  const int32_t H = static_cast<int32_t>(call.H), W = static_cast<int32_t>(call.W);
  const double theta = view.angle * (M_PI / 180);
  const acc_t cos = static_cast<acc_t>(std::cos(theta) / view.scale);
  const acc_t sin = static_cast<acc_t>(std::sin(theta) / view.scale);
  const acc_t mirror = view.flip ? -1 : 1;
  const acc_t center_x = static_cast<acc_t>((W - 1) / 2.), center_y = (H - 1) / 2.;
  const acc_t dx = static_cast<acc_t>(view.left - call.policy.crop_padding);
  const acc_t dy = static_cast<acc_t>(view.top - call.policy.crop_padding);
  const int32_t stride = static_cast<int32_t>(planes.stride);
  int32_t *const where = planes.where.data();
  acc_t *const weights = planes.weights.data();
  for (int32_t row = 0; row < H; ++row) {
    const acc_t y = static_cast<acc_t>(row) - center_y;
    const acc_t sin_y = sin * y, cos_y = cos * y;
#pragma GCC ivdep
    for (int32_t i = 0; i < W; ++i) {
      const acc_t x = static_cast<acc_t>(i) - center_x;
      const acc_t source_x = mirror * (cos * x + sin_y) + center_x + dx;
      const acc_t source_y = cos_y - sin * x + center_y + dy;
      const acc_t left = std::floor(source_x), upper = std::floor(source_y);
      const acc_t right = source_x - left, low = source_y - upper;
      // what is far outside is read in the border
      const acc_t column = within<acc_t>(left, -BORDER, static_cast<acc_t>(W));
      const acc_t line = within<acc_t>(upper, -BORDER, static_cast<acc_t>(H));
      where[i] = static_cast<int32_t>(line) * stride + static_cast<int32_t>(column);
      weights[i] = (1 - right) * (1 - low);
      weights[W + i] = right * (1 - low);
      weights[2 * W + i] = (1 - right) * low;
      weights[3 * W + i] = right * low;
    }
    for (int64_t c = 0; c < call.C; ++c) {
      const acc_t *const upper = planes.row(c, 0), *const lower = upper + stride;
      acc_t *const to = planes.view.data() + (c * H + row) * W;
#pragma GCC ivdep
      for (int32_t i = 0; i < W; ++i) {
        acc_t total = upper[where[i]] * weights[i];
        total = total + upper[where[i] + 1] * weights[W + i];
        total = total + lower[where[i]] * weights[2 * W + i];
        to[i] = total + lower[where[i] + 1] * weights[3 * W + i];
      }
    }
  }
}

// ---- colour ----

template <typename acc_t> BLD_EXT_INLINE acc_t clamp01(acc_t x) { return within<acc_t>(x, 0, 1); }

template <typename acc_t> BLD_EXT_INLINE void brighten(acc_t *x, int64_t size, acc_t factor) {
  for (int64_t i = 0; i < size; ++i)
    x[i] = clamp01(factor * x[i]);
}

// Luma of ITU-R BT.601 as torchvision rounds it; images of one channel are their own.
template <typename acc_t>
BLD_EXT_INLINE void luma(const acc_t *x, int64_t C, int64_t size, acc_t *gray) {
  const acc_t red = 0.2989, green = 0.587, blue = 0.114;
  for (int64_t i = 0; i < size; ++i)
    gray[i] = C == 1 ? x[i] : red * x[i] + green * x[size + i] + blue * x[2 * size + i];
}

// In whole multiples of 2^-30 the mean does not depend on the order of summation.
template <typename acc_t> BLD_EXT_INLINE acc_t mean_of(const acc_t *gray, int64_t size) {
  const double to_integer = 0x1.8p52; // adding it leaves the rounded number in the low bits
  int64_t offset, sum = 0;
  std::memcpy(&offset, &to_integer, sizeof offset);
  for (int64_t i = 0; i < size; ++i) {
    const double shifted = static_cast<double>(gray[i]) * 0x1p30 + to_integer;
    int64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    sum += bits - offset;
  }
  return static_cast<acc_t>(static_cast<double>(sum) / (0x1p30 * static_cast<double>(size)));
}

template <typename acc_t>
BLD_EXT_INLINE void contrast(acc_t *x, int64_t size, acc_t factor, acc_t mean) {
  const acc_t rest = (1 - factor) * mean;
  for (int64_t i = 0; i < size; ++i)
    x[i] = clamp01(factor * x[i] + rest);
}

template <typename acc_t>
BLD_EXT_INLINE void saturate(acc_t *x, int64_t size, acc_t factor, const acc_t *gray) {
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t i = 0; i < size; ++i)
      x[c * size + i] = clamp01(factor * x[c * size + i] + (1 - factor) * gray[i]);
}

// One channel of hue (in sextants), chroma and value. hue + n is within -3 to 13.
template <typename acc_t>
BLD_EXT_INLINE acc_t from_hue(acc_t hue, acc_t n, acc_t value, acc_t chroma) {
  const acc_t k = n + hue;
  const acc_t r = k >= 12 ? k - 12 : k >= 6 ? k - 6 : k < 0 ? k + 6 : k;
  return value - chroma * clamp01(r < 4 - r ? r : 4 - r);
}

template <typename acc_t> BLD_EXT_INLINE void shift_hue(acc_t *x, int64_t size, acc_t turns) {
  acc_t *const red = x, *const green = x + size, *const blue = x + 2 * size;
#pragma GCC ivdep
  for (int64_t i = 0; i < size; ++i) {
    const acc_t r = red[i], g = green[i], b = blue[i];
    const acc_t larger = r > g ? r : g, smaller = r < g ? r : g;
    const acc_t value = larger > b ? larger : b;
    const acc_t chroma = value - (smaller < b ? smaller : b);
    const acc_t unlike_red = value == g ? b - r : r - g, sextant = value == g ? acc_t(2) : acc_t(4);
    const acc_t numerator = value == r ? g - b : unlike_red, start = value == r ? 0 : sextant;
    const acc_t hue = start + numerator / (chroma > 0 ? chroma : acc_t(1)) + 6 * turns;
    red[i] = from_hue<acc_t>(hue, 5, value, chroma);
    green[i] = from_hue<acc_t>(hue, 3, value, chroma);
    blue[i] = from_hue<acc_t>(hue, 1, value, chroma);
  }
}

template <typename acc_t>
BLD_EXT_INLINE void recolor(const Call &call, const View &view, Planes<acc_t> &planes) {
  const Policy &policy = call.policy;
  const int64_t size = call.H * call.W;
  acc_t *const x = planes.view.data(), *const gray = planes.gray.data();
  if (policy.brightness)
    brighten<acc_t>(x, call.C * size, view.brightness);
  if (policy.contrast) {
    luma(x, call.C, size, gray);
    contrast<acc_t>(x, call.C * size, view.contrast, mean_of(gray, size));
  }
  if (call.C == 3 && policy.saturation) {
    luma(x, call.C, size, gray);
    saturate<acc_t>(x, size, view.saturation, gray);
  }
  if (call.C == 3 && policy.hue)
    shift_hue<acc_t>(x, size, view.hue);
  for (int64_t c = 0; c < static_cast<int64_t>(policy.mean.size()); ++c) {
    const acc_t mean = static_cast<acc_t>(policy.mean[c]), std = static_cast<acc_t>(policy.std[c]);
    for (int64_t i = c * size; i < (c + 1) * size; ++i)
      x[i] = (x[i] - mean) / std;
  }
}

template <typename acc_t>
BLD_EXT_INLINE void store_view(const Call &call, int64_t row, const Planes<acc_t> &planes) {
  const int64_t size = call.H * call.W, C = call.C;
  const acc_t *const from = planes.view.data();
  with_dtype(call.dtype, "dtype", [&](auto kind) BLD_EXT_INLINE_LAMBDA {
    typedef decltype(kind) T;
    T *const to = static_cast<T *>(call.views) + row * C * size;
    if (!call.channels_last)
      for (int64_t i = 0; i < C * size; ++i)
        to[i] = static_cast<T>(from[i]);
    else
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < size; ++i)
          to[i * C + c] = static_cast<T>(from[c * size + i]);
  });
}

// Views [begin, end) in the order image by image, view by view.
template <typename acc_t>
BLD_EXT_INLINE void make_views(const Call &call, int64_t begin, int64_t end) {
  const int64_t V = static_cast<int64_t>(call.view_numbers.size());
  const bool turns =
      call.policy.rotation || call.policy.scale_min != 1 || call.policy.scale_max != 1;
  Planes<acc_t> planes(call);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t n = k / V, v = k % V;
    if (k == begin || v == 0)
      load_image(call, n, planes);
    const View view(call.policy, call.seed, call.step, static_cast<uint32_t>(call.view_numbers[v]),
                    static_cast<uint32_t>(call.indices[n]));
    if (turns)
      resample(call, view, planes);
    else
      move(call, view, planes);
    recolor(call, view, planes);
    store_view(call, v * call.N + n, planes);
  }
}

typedef void (*MakeViews)(const Call &, int64_t begin, int64_t end);

BLD_EXT_INLINE void make_any_views(const Call &call, int64_t begin, int64_t end) {
  if (call.image_dtype == ScalarType::Double)
    make_views<double>(call, begin, end);
  else
    make_views<float>(call, begin, end);
}

void make_views_baseline(const Call &call, int64_t begin, int64_t end) {
  make_any_views(call, begin, end);
}
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void make_views_avx2(const Call &call, int64_t begin, int64_t end) {
  make_any_views(call, begin, end);
}
[[gnu::target("avx512f,avx512dq,avx512vl,avx512bw")]] void
make_views_avx512(const Call &call, int64_t begin, int64_t end) {
  make_any_views(call, begin, end);
}
#endif

MakeViews kernel() {
#if defined(__x86_64__)
  if (registers() == Registers::avx512)
    return make_views_avx512;
  if (registers() == Registers::avx2)
    return make_views_avx2;
#endif
  return make_views_baseline;
}

int64_t scalar(const char *name, const Tensor &tensor) {
  STD_TORCH_CHECK(tensor.dim() == 0 && tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long,
                  name, ": expected an int64 scalar on the CPU");
  return *static_cast<const int64_t *>(tensor.const_data_ptr());
}

// Its documentation is in bld_ext/ops.py.
Tensor augment(const Tensor &images_, std::vector<double> policy, const Tensor &seed,
               const Tensor &step, std::vector<int64_t> views, const Tensor &indices_,
               ScalarType dtype, bool channels_last) {
  STD_TORCH_CHECK(images_.dim() == 4, "images: expected shape [N, C, H, W]");
  const int64_t N = images_.size(0), C = images_.size(1), H = images_.size(2), W = images_.size(3);
  const Tensor images = torch::stable::contiguous(images_);
  const Tensor indices = torch::stable::contiguous(indices_);
  STD_TORCH_CHECK(indices.is_cpu() && indices.scalar_type() == ScalarType::Long &&
                      indices.dim() == 1 && indices.numel() == N,
                  "indices: expected ", N, " int64 numbers on the CPU, one an image");
  STD_TORCH_CHECK((H + 2 * BORDER) < INT32_MAX / (W + 2 * BORDER),
                  "images: expected fewer than 2^31 pixels with a border of ", BORDER, ", got ", H,
                  " x ", W);
  const int64_t V = static_cast<int64_t>(views.size());
  Call call{images.const_data_ptr(),
            images.scalar_type(),
            dtype,
            nullptr,
            channels_last,
            N,
            C,
            H,
            W,
            Policy(policy),
            static_cast<uint64_t>(scalar("seed", seed)),
            static_cast<uint32_t>(scalar("step", step)),
            std::move(views),
            static_cast<const int64_t *>(indices.const_data_ptr())};
  const int64_t channels = static_cast<int64_t>(call.policy.mean.size());
  STD_TORCH_CHECK(channels == 0 || channels == C, "policy.mean: expected ", C,
                  " values, one a channel, got ", channels);
  const bool jitter = call.policy.contrast || call.policy.saturation || call.policy.hue;
  STD_TORCH_CHECK(!jitter || C == 1 || C == 3,
                  "images: expected 1 or 3 channels for colour jitter, got ", C);
  for (const auto &[name, kind] : {std::pair("images", call.image_dtype), {"dtype", dtype}})
    with_dtype(kind, name, [](auto) {});
  STD_TORCH_CHECK(dtype != ScalarType::Byte, "dtype: expected a floating-point dtype, got uint8");

  const std::vector<int64_t> shape =
      channels_last ? std::vector<int64_t>{V * N, H, W, C} : std::vector<int64_t>{V * N, C, H, W};
  Tensor made = torch::stable::new_empty(images, shape, dtype);
  if (made.numel() > 0) {
    call.views = made.mutable_data_ptr();
    const MakeViews run = kernel();
    torch::stable::parallel_for(0, N * V, std::max<int64_t>(1, PARALLEL_ELEMENTS / (C * H * W)),
                                [&](int64_t begin, int64_t end) { run(call, begin, end); });
  }
  if (channels_last) // [N, H, W, C] to [N, C, H, W]
    made = torch::stable::transpose(torch::stable::transpose(made, 1, 3), 2, 3);
  return made;
}

STABLE_TORCH_LIBRARY_IMPL(bld_ext, CPU, m) { m.impl("augment", TORCH_BOX(&augment)); }

} // namespace
} // namespace bld_ext
