// augment on a CPU. A thread takes image after image, and of each image view after view: parameters
// from Philox, one resample into planes that stay in its cache, colour in place there, and one
// write in the dtype and layout of the result. Four channels of uint8 lie in one word, so that a
// neighbour of a point is one load. The arithmetic, and so the bits, are the reference's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "../check.h"
#include "lanes.h"
#include "view.h"

namespace bld_ext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t PARALLEL_ELEMENTS = 16384; // fewer are less work than waking a thread
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
  const int64_t *indices; // [N], or null for 0 to N - 1
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
    BLD_CHECK(false, name, ": expected a floating-point dtype or, for images, uint8");
  }
}

constexpr int64_t BORDER = 2; // pixels around an image, where points outside of it end up

// An image with its border: a plane a channel, or words of four channels each.
template <typename acc_t, typename Word> struct Image {
  static constexpr bool packed = std::is_same_v<Word, uint32_t>;
  static constexpr int64_t PER_WORD = packed ? 4 : 1;
  int64_t H, W, stride, plane, planes; // stride: words of a row, with its border
  std::vector<Word> words;             // [planes, H + 2 BORDER, W + 2 BORDER]

  explicit Image(const Call &call)
      : H(call.H), W(call.W), stride(W + 2 * BORDER), plane((H + 2 * BORDER) * stride),
        planes((call.C + PER_WORD - 1) / PER_WORD), words(planes * plane) {}

  Word *row(int64_t p, int64_t y) { return &words[p * plane + (y + BORDER) * stride + BORDER]; }

  // The value of channel c in one of its words.
  BLD_EXT_INLINE static acc_t value(Word word, int64_t c) {
    if constexpr (packed)
      return static_cast<acc_t>(static_cast<int32_t>(word >> (8 * (c % 4)) & 255));
    else
      return word;
  }

  void load(const Call &call, int64_t n) {
    with_dtype(call.image_dtype, "images", [&](auto kind) BLD_EXT_INLINE_LAMBDA {
      typedef decltype(kind) T;
      const T *from = static_cast<const T *>(call.images) + n * call.C * H * W;
      for (int64_t c = 0; c < call.C; ++c)
        for (int64_t y = 0; y < H; ++y, from += W) {
          Word *const to = row(c / PER_WORD, y);
          for (int64_t x = 0; x < W; ++x)
            if constexpr (!packed)
              to[x] = static_cast<Word>(from[x]);
            else if constexpr (std::is_same_v<T, uint8_t>)
              to[x] = (c % 4 ? to[x] : 0) | uint32_t(from[x]) << (8 * (c % 4));
        }
    });
    if (call.policy.padding_mode != PaddingMode::zeros)
      for (int64_t p = 0; p < planes; ++p)
        extend(p);
  }

  void extend(int64_t p) { // the border pixels outwards
    for (int64_t y = 0; y < H; ++y) {
      Word *const line = row(p, y);
      std::fill(line - BORDER, line, line[0]);
      std::fill(line + W, line + W + BORDER, line[W - 1]);
    }
    for (int64_t k = 1; k <= BORDER; ++k) {
      std::copy_n(row(p, 0) - BORDER, stride, row(p, -k) - BORDER);
      std::copy_n(row(p, H - 1) - BORDER, stride, row(p, H - 1 + k) - BORDER);
    }
  }
};

// Memory of one thread besides.
template <typename acc_t> struct Planes {
  std::vector<acc_t> view; // [C, H, W], in levels or in [0, 1]
  std::vector<acc_t> gray; // [H, W]

  explicit Planes(const Call &call) : view(call.C * call.H * call.W), gray(call.H * call.W) {}
};

// ---- geometry ----

// A view that is a window of the mirrored or plain image, moved by whole pixels, zero outside.
template <typename acc_t, typename Word>
BLD_EXT_INLINE void move(const Call &call, const View &view, Image<acc_t, Word> &image,
                         Planes<acc_t> &planes) {
  const int64_t H = call.H, W = call.W;
  const int64_t dx = view.crop.left - call.policy.crop_padding;
  const int64_t dy = view.crop.top - call.policy.crop_padding;
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
      const Word *const from = image.row(c / image.PER_WORD, y + dy) + dx;
      std::fill_n(to, first, acc_t(0));
      if (view.flip)
        for (int64_t x = first; x < last; ++x)
          to[x] = image.value(from[W - 1 - x], c);
      else
        for (int64_t x = first; x < last; ++x)
          to[x] = image.value(from[x], c);
      std::fill(to + last, to + W, acc_t(0));
    }
}

// Two choices one after the other, which vectorise; nan stays.
template <typename acc_t> BLD_EXT_INLINE acc_t within(acc_t x, acc_t low, acc_t high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// The nearest whole number; of two that are as near the upper, or the even one.
template <typename acc_t, bool even> BLD_EXT_INLINE acc_t whole(acc_t x) {
  const acc_t upper = std::floor(x + acc_t(0.5));
  if constexpr (even) {
    const acc_t odd = upper - std::floor(upper * acc_t(0.5)) * 2; // 0 or 1
    return upper - x == acc_t(0.5) ? upper - odd : upper;
  }
  return upper;
}

// One coordinate of the points that a view shows.
template <typename acc_t> struct Axis {
  acc_t first, last;      // the middles of a resized crop's border pixels
  acc_t before, after;    // half a pixel beyond them; an empty interval where nothing is resized
  acc_t period;           // of a reflected image
  acc_t lowest, greatest; // the range of neighbours that are read

  Axis(const Policy &policy, int64_t start, int64_t length, int64_t size)
      : first(static_cast<acc_t>(start - policy.crop_padding)),
        last(first + static_cast<acc_t>(length - 1)), before(first - acc_t(0.5)),
        after(policy.resized ? last + acc_t(0.5) : before - 1),
        period(static_cast<acc_t>(2 * (size - 1))), lowest(-BORDER),
        greatest(static_cast<acc_t>(size)) {}

  BLD_EXT_INLINE acc_t readable(acc_t x) const { // not even nan is outside
    x = x > lowest ? x : lowest;
    return x < greatest ? x : greatest;
  }

  BLD_EXT_INLINE acc_t snap(acc_t x) const {
    return x >= before ? (x <= after ? within<acc_t>(x, first, last) : x) : x;
  }

  BLD_EXT_INLINE acc_t reflect(acc_t x) const {
    if (period == 0)
      return 0;
    const acc_t folded = x - period * std::floor(x / period), other = period - folded;
    return folded < other ? folded : other;
  }
};

constexpr int64_t BLOCK = 16; // points of a row side by side

// Where the points of a block are, and how much each of four neighbours counts.
template <typename acc_t> struct Points {
  int32_t where[BLOCK]; // the upper left neighbour, of the one that is nearest
  acc_t weights[4][BLOCK];

  template <bool reflects, bool nearest, bool resized>
  BLD_EXT_INLINE void locate(const Axis<acc_t> &across, const Axis<acc_t> &down, acc_t first_x,
                             acc_t a, acc_t shift_x, acc_t d, acc_t shift_y, int32_t stride) {
    for (int32_t i = 0; i < BLOCK; ++i) {
      const acc_t x = first_x + static_cast<acc_t>(i);
      acc_t source_x = a * x + shift_x, source_y = d * x + shift_y;
      if constexpr (resized)
        source_x = across.snap(source_x), source_y = down.snap(source_y);
      if constexpr (reflects)
        source_x = across.reflect(source_x), source_y = down.reflect(source_y);
      if constexpr (nearest)
        source_x = whole<acc_t, !resized>(source_x), source_y = whole<acc_t, !resized>(source_y);
      const acc_t left = std::floor(source_x), upper = std::floor(source_y);
      // what is far outside is read in the border
      const acc_t column = across.readable(left), line = down.readable(upper);
      where[i] = static_cast<int32_t>(line) * stride + static_cast<int32_t>(column);
      const acc_t right = source_x - left, low = source_y - upper;
      weights[0][i] = (1 - right) * (1 - low);
      weights[1][i] = right * (1 - low);
      weights[2][i] = (1 - right) * low;
      weights[3][i] = right * low;
    }
  }
};

// A view's pixels at the points of the image that they show.
template <typename acc_t, typename Word, bool reflects, bool nearest, bool resized>
BLD_EXT_INLINE void resample(const Call &call, const View &view, Image<acc_t, Word> &image,
                             Planes<acc_t> &planes) {
  const int64_t H = call.H, W = call.W;
  const Matrix matrix(view, call.policy, H, W);
  const acc_t a = acc_t(matrix.a), b = acc_t(matrix.b), c0 = acc_t(matrix.c);
  const acc_t d = acc_t(matrix.d), e = acc_t(matrix.e), f = acc_t(matrix.f);
  const Axis<acc_t> across(call.policy, view.crop.left, view.crop.width, W);
  const Axis<acc_t> down(call.policy, view.crop.top, view.crop.height, H);
  const int32_t stride = static_cast<int32_t>(image.stride);
  Points<acc_t> points;
  for (int64_t row = 0; row < H; ++row) {
    const acc_t y = static_cast<acc_t>(row) - static_cast<acc_t>((H - 1) / 2.);
    const acc_t shift_x = b * y + c0, shift_y = e * y + f;
    for (int64_t first = 0; first < W; first += BLOCK) {
      const acc_t first_x = static_cast<acc_t>(first) - static_cast<acc_t>((W - 1) / 2.);
      points.template locate<reflects, nearest, resized>(across, down, first_x, a, shift_x, d,
                                                         shift_y, stride);
      Word taps[4][BLOCK];
      for (int64_t c = 0; c < call.C; ++c) {
        if (c % image.PER_WORD == 0) {
          const Word *const upper = image.row(c / image.PER_WORD, 0), *const lower = upper + stride;
          for (int64_t i = 0; i < BLOCK; ++i) {
            taps[0][i] = upper[points.where[i]];
            if constexpr (!nearest) {
              taps[1][i] = upper[points.where[i] + 1];
              taps[2][i] = lower[points.where[i]];
              taps[3][i] = lower[points.where[i] + 1];
            }
          }
        }
        acc_t values[BLOCK];
        for (int64_t i = 0; i < BLOCK; ++i) {
          values[i] = image.value(taps[0][i], c);
          if constexpr (!nearest) {
            values[i] = values[i] * points.weights[0][i];
            values[i] = values[i] + image.value(taps[1][i], c) * points.weights[1][i];
            values[i] = values[i] + image.value(taps[2][i], c) * points.weights[2][i];
            values[i] = values[i] + image.value(taps[3][i], c) * points.weights[3][i];
          }
        }
        acc_t *const to = planes.view.data() + (c * H + row) * W + first;
        if (first + BLOCK <= W)
          std::memcpy(to, values, sizeof values);
        else
          std::copy_n(values, W - first, to);
      }
    }
  }
}

template <typename acc_t, typename Word>
BLD_EXT_INLINE void sample(const Call &call, const View &view, Image<acc_t, Word> &image,
                           Planes<acc_t> &planes) {
  const Policy &policy = call.policy;
  const bool reflects = policy.padding_mode == PaddingMode::reflect;
  if (!policy.turns)
    move(call, view, image, planes);
  else if (policy.nearest && policy.resized)
    reflects ? resample<acc_t, Word, true, true, true>(call, view, image, planes)
             : resample<acc_t, Word, false, true, true>(call, view, image, planes);
  else if (policy.nearest)
    reflects ? resample<acc_t, Word, true, true, false>(call, view, image, planes)
             : resample<acc_t, Word, false, true, false>(call, view, image, planes);
  else if (reflects)
    resample<acc_t, Word, true, false, true>(call, view, image, planes);
  else if (policy.resized)
    resample<acc_t, Word, false, false, true>(call, view, image, planes);
  else
    resample<acc_t, Word, false, false, false>(call, view, image, planes);
  if constexpr (image.packed)
    for (acc_t &x : planes.view)
      x = x / 255;
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
  if (policy.brightens)
    brighten<acc_t>(x, call.C * size, view.brightness);
  if (policy.contrasts) {
    luma(x, call.C, size, gray);
    contrast<acc_t>(x, call.C * size, view.contrast, mean_of(gray, size));
  }
  if (call.C == 3 && policy.saturates) {
    luma(x, call.C, size, gray);
    saturate<acc_t>(x, size, view.saturation, gray);
  }
  if (call.C == 3 && policy.shifts_hue)
    shift_hue<acc_t>(x, size, view.hue);
  for (int64_t c = 0; c < static_cast<int64_t>(policy.mean.size()); ++c) {
    const acc_t mean = static_cast<acc_t>(policy.mean[c]), std = static_cast<acc_t>(policy.std[c]);
    for (int64_t i = c * size; i < (c + 1) * size; ++i)
      x[i] = (x[i] - mean) / std;
  }
  for (int64_t c = 0; c < call.C; ++c)
    for (int64_t y = view.erased.top; y < view.erased.top + view.erased.height; ++y)
      std::fill_n(x + c * size + y * call.W + view.erased.left, view.erased.width, acc_t(0));
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
template <typename acc_t, typename Word>
BLD_EXT_INLINE void make_views(const Call &call, int64_t begin, int64_t end) {
  const int64_t V = static_cast<int64_t>(call.view_numbers.size());
  Image<acc_t, Word> image(call);
  Planes<acc_t> planes(call);
  for (int64_t k = begin; k < end; ++k) {
    const int64_t n = k / V, v = k % V;
    if (k == begin || v == 0)
      image.load(call, n);
    const View view(call.policy, call.seed, call.step, static_cast<uint32_t>(call.view_numbers[v]),
                    static_cast<uint32_t>(call.indices ? call.indices[n] : n), call.H, call.W);
    sample(call, view, image, planes);
    recolor(call, view, planes);
    store_view(call, v * call.N + n, planes);
  }
}

typedef void (*MakeViews)(const Call &, int64_t begin, int64_t end);

BLD_EXT_INLINE void make_any_views(const Call &call, int64_t begin, int64_t end) {
  if (call.image_dtype == ScalarType::Byte)
    make_views<float, uint32_t>(call, begin, end);
  else if (call.image_dtype == ScalarType::Double)
    make_views<double, double>(call, begin, end);
  else
    make_views<float, float>(call, begin, end);
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
  BLD_CHECK(tensor.dim() == 0 && tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long, name,
            ": expected an int64 scalar on the CPU");
  return *static_cast<const int64_t *>(tensor.const_data_ptr());
}

// Its documentation is in bld_ext/ops.py.
Tensor augment(const Tensor &images_, std::vector<double> policy, const Tensor &seed,
               const Tensor &step, std::vector<int64_t> views,
               const std::optional<Tensor> &indices_, ScalarType dtype, bool channels_last) {
  BLD_CHECK(images_.dim() == 4, "images: expected shape [N, C, H, W]");
  const int64_t N = images_.size(0), C = images_.size(1), H = images_.size(2), W = images_.size(3);
  const Tensor images = torch::stable::contiguous(images_);
  const Tensor indices = torch::stable::contiguous(indices_.value_or(images));
  BLD_CHECK(!indices_ || (indices.is_cpu() && indices.scalar_type() == ScalarType::Long &&
                          indices.dim() == 1 && indices.numel() == N),
            "indices: expected ", N, " int64 numbers on the CPU, one an image");
  BLD_CHECK(H <= 1 << 24 && W <= 1 << 24, "images: expected sides of at most 2^24, got ", H, " x ",
            W);
  BLD_CHECK((H + 2 * BORDER) < INT32_MAX / (W + 2 * BORDER),
            "images: expected fewer than 2^31 pixels with a border of ", BORDER, ", got ", H, " x ",
            W);
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
            indices_ ? static_cast<const int64_t *>(indices.const_data_ptr()) : nullptr};
  const int64_t channels = static_cast<int64_t>(call.policy.mean.size());
  BLD_CHECK(channels == 0 || channels == C, "policy.mean: expected ", C,
            " values, one a channel, got ", channels);
  const bool jitter = call.policy.contrasts || call.policy.saturates || call.policy.shifts_hue;
  BLD_CHECK(!jitter || C == 1 || C == 3, "images: expected 1 or 3 channels for colour jitter, got ",
            C);
  for (const auto &[name, kind] : {std::pair("images", call.image_dtype), {"dtype", dtype}})
    with_dtype(kind, name, [](auto) {});
  BLD_CHECK(dtype != ScalarType::Byte, "dtype: expected a floating-point dtype, got uint8");

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
