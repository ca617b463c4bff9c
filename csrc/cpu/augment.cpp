// augment on a CPU. A thread takes image after image, and of each image view after view: parameters
// from Philox, one resample into planes that stay in its cache, and from there colour and one write
// in the dtype and layout of the result, a register of pixels at a time. Four channels of uint8 lie
// in one word, so that a neighbour of a point is one load. The arithmetic, and so the bits, are the
// reference's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../check.h"
#include "channels_last.h"
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
  case ScalarType::UInt16:
    return f(uint16_t());
  case ScalarType::Float:
    return f(float());
  case ScalarType::Double:
    return f(double());
  case ScalarType::BFloat16:
    return f(c10::BFloat16());
  case ScalarType::Half:
    return f(c10::Half());
  default:
    BLD_CHECK(false, name, ": expected a floating-point dtype or, for images, uint8 or uint16");
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

constexpr int64_t SUMMED = 2048; // pixels whose levels add up to less than 2^31

template <int64_t W> using Ints = Lanes<int32_t, W>;
template <int64_t W> using Words = Lanes<uint32_t, W>;

// Two choices one after the other, in the order of max and min instructions; nan stays.
template <typename T, typename V> BLD_EXT_INLINE V within(const V &x, T low, T high) {
  const V lowest = V{} + low, greatest = V{} + high;
  const V from_low = lowest > x ? lowest : x;
  return greatest < from_low ? greatest : from_low;
}

template <typename V> BLD_EXT_INLINE V magnitude(const V &x) {
  typedef decltype(x < x) Bits; // of the number's size
  typedef std::remove_cvref_t<decltype(Bits{}[0])> Number;
  return (V)((Bits)x & std::numeric_limits<Number>::max());
}

// ---- geometry ----

// A view that is a window of the mirrored or plain image, moved by whole pixels, zero outside.
template <typename acc_t, typename Word>
BLD_EXT_INLINE void move(const Call &call, const View &view, Image<acc_t, Word> &image, acc_t *to,
                         int64_t plane) {
  const int64_t H = call.H, W = call.W;
  const int64_t dx = view.crop.left - call.policy.crop_padding;
  const int64_t dy = view.crop.top - call.policy.crop_padding;
  // columns [first, last) of the view are inside of the image; column x is read at x + dx, or
  // mirrored at W - 1 - x + dx
  const int64_t first = std::clamp<int64_t>(view.flip ? dx : -dx, 0, W);
  const int64_t last = std::clamp<int64_t>(view.flip ? W + dx : W - dx, first, W);
  for (int64_t c = 0; c < call.C; ++c, to += plane)
    for (int64_t y = 0; y < H; ++y) {
      acc_t *const line = to + y * W;
      std::fill_n(line, W, acc_t(0));
      if (y + dy < 0 || y + dy >= H)
        continue;
      const Word *const from = image.row(c / image.PER_WORD, y + dy) + dx;
      if (view.flip)
        for (int64_t x = first; x < last; ++x)
          line[x] = image.value(from[W - 1 - x], c);
      else
        for (int64_t x = first; x < last; ++x)
          line[x] = image.value(from[x], c);
    }
}

// One coordinate of the points that a view shows, 2^bits a pixel.
struct Axis {
  int32_t bits, half, first, last; // first, last: the middles of a resized crop's border pixels
  int32_t period;                  // of a reflected image
  int32_t lowest, greatest;        // the range of neighbours that are read, in pixels
  float per_period;

  Axis(int32_t bits_, int64_t start, int64_t length, int64_t size)
      : bits(bits_), half(1 << (bits - 1)), first(static_cast<int32_t>(start << bits)),
        last(static_cast<int32_t>((start + length - 1) << bits)),
        period(static_cast<int32_t>((2 * (size - 1)) << bits)), lowest(-BORDER),
        greatest(static_cast<int32_t>(size)), per_period(period ? 1.f / float(period) : 0) {}

  template <typename V> BLD_EXT_INLINE V snap(const V &x) const {
    return (x >= first - half) & (x <= last + half) ? within(x, first, last) : x;
  }

  template <int64_t W> BLD_EXT_INLINE Ints<W> reflect(const Ints<W> &x) const {
    typedef Ints<W> V;
    if (period == 0)
      return V{};
    const Lanes<float, W> quotient = __builtin_convertvector(x, Lanes<float, W>) * per_period;
    const V times = __builtin_convertvector(quotient, V); // off by one at most
    V folded = (V)((Words<W>)x - (Words<W>)times * uint32_t(period));
    folded += folded < 0 ? V{} + period : V{};
    folded += folded < 0 ? V{} + period : V{};
    folded -= folded >= period ? V{} + period : V{};
    return period - folded < folded ? period - folded : folded;
  }

  // The sum may wrap around in lanes behind the end of a row.
  template <typename V> BLD_EXT_INLINE static V plus(const V &x, int32_t y) {
    return (V)((Lanes<uint32_t, sizeof(V) / 4>)x + uint32_t(y));
  }

  // The nearest pixel; of two that are as near the even one, or the upper.
  template <bool even, typename V> BLD_EXT_INLINE V nearest(const V &x) const {
    const V shifted = plus(x, half);
    if constexpr (!even)
      return within(plus(shifted, std::min(greatest, 1 << (bits - FRACTION - 1))) >> bits, lowest,
                    greatest);
    const V upper = shifted >> bits;
    const V odd = (shifted & (2 * half - 1)) == 0 ? upper & 1 : V{};
    return within(upper - odd, lowest, greatest);
  }

  // Rounded to 2^-FRACTION pixels.
  template <typename V> BLD_EXT_INLINE V between(const V &x) const {
    const V rounded = plus(x, 1 << (bits - FRACTION - 1)) >> (bits - FRACTION);
    return within(rounded, lowest << FRACTION, greatest << FRACTION);
  }
};

// Where W points side by side are, and how much their right and lower neighbours count.
template <int64_t W> struct Points {
  Ints<W> where; // the upper left neighbour, or the one that is nearest
  Ints<W> right, low;

  template <bool reflects, bool nearest, bool resized>
  BLD_EXT_INLINE void locate(const Axis &across, const Axis &down, Ints<W> x, Ints<W> y,
                             int32_t stride) {
    if constexpr (resized)
      x = across.snap(x), y = down.snap(y);
    if constexpr (reflects)
      x = across.reflect<W>(x), y = down.reflect<W>(y);
    if constexpr (nearest) {
      where = down.nearest<!resized>(y) * stride + across.nearest<!resized>(x);
    } else {
      x = across.between(x), y = down.between(y);
      where = (y >> FRACTION) * stride + (x >> FRACTION);
      right = x & ((1 << FRACTION) - 1), low = y & ((1 << FRACTION) - 1);
    }
  }
};

constexpr int32_t ONE = 1 << FRACTION;

// Four channels of uint8 at the points of a block, in two steps that are exact: two channels at a
// time from left to right in 16 bits, then one from top to bottom in float32.
template <int64_t W>
BLD_EXT_INLINE void blend(const Points<W> &at, const uint32_t *from, int32_t stride, int64_t C,
                          float *to, int64_t plane) {
  typedef Lanes<uint64_t, W / 2> Pairs; // a neighbour and the one to its right, in one load
  typedef Lanes<uint16_t, 2 * W> Halves;
  typedef Lanes<float, W> Floats;
  // four pixels share 16 bytes of two registers, so that what is left or right of them in both is
  // found without crossing these bytes
  const auto pairs = [&]<size_t... k>(const uint32_t *line, int64_t first,
                                      std::index_sequence<k...>) BLD_EXT_INLINE_LAMBDA {
    const auto pair = [&](int64_t i) BLD_EXT_INLINE_LAMBDA {
      uint64_t found;
      std::memcpy(&found, line + at.where[i], sizeof found);
      return found;
    };
    return Pairs{pair(k / 2 * 4 + k % 2 + first)...};
  };
  Words<W> lefts;
  for (int64_t i = 0; i < W; ++i)
    lefts[i] = static_cast<uint32_t>(i / 4 * 4 + i % 2 * 2 + i % 4 / 2 * W);
  const Halves wr = (Halves)(at.right | at.right << 16), wl = ONE - wr;
  Words<W> even[2], odd[2];
  for (int line = 0; line < 2; ++line) {
    const std::make_index_sequence<W / 2> all;
    const Words<W> first = (Words<W>)pairs(from + line * stride, 0, all);
    const Words<W> second = (Words<W>)pairs(from + line * stride, 2, all);
    const Halves left = (Halves)__builtin_shuffle(first, second, lefts);
    const Halves right = (Halves)__builtin_shuffle(first, second, lefts + 1);
    even[line] = (Words<W>)((left & 255) * wl + (right & 255) * wr);
    odd[line] = (Words<W>)((left >> 8) * wl + (right >> 8) * wr);
  }
  const Floats lower_weight = __builtin_convertvector(at.low, Floats) * (1.f / (ONE * ONE));
  const Floats upper_weight = 1.f / ONE - lower_weight;
  for (int64_t c = 0; c < C; ++c) {
    const Words<W> *const lines = c % 2 ? odd : even;
    const int shift = static_cast<int>(c / 2 * 16);
    const Ints<W> upper = (Ints<W>)(lines[0] >> shift & 0xffff);
    const Ints<W> lower = (Ints<W>)(lines[1] >> shift & 0xffff);
    const Floats value = __builtin_convertvector(upper, Floats) * upper_weight +
                         __builtin_convertvector(lower, Floats) * lower_weight;
    std::memcpy(to + c * plane, &value, sizeof value);
  }
}

// One channel of numbers.
template <int64_t W, typename acc_t>
BLD_EXT_INLINE void blend(const Points<W> &at, const acc_t *from, int32_t stride, int64_t,
                          acc_t *to, int64_t) {
  Lanes<acc_t, W> taps[4] = {};
  for (int64_t i = 0; i < W; ++i) {
    const acc_t *const near = from + at.where[i];
    taps[0][i] = near[0], taps[1][i] = near[1];
    taps[2][i] = near[stride], taps[3][i] = near[stride + 1];
  }
  const Ints<W> right = at.right, left = ONE - right, low = at.low, high = ONE - low;
  const Ints<W> weights[4] = {left * high, right * high, left * low, right * low};
  Lanes<acc_t, W> total = {};
  for (int k = 0; k < 4; ++k) {
    const Lanes<acc_t, W> weight = __builtin_convertvector(weights[k], Lanes<acc_t, W>);
    total = total + taps[k] * (weight * (acc_t(1) / (ONE * ONE)));
  }
  std::memcpy(to, &total, sizeof total);
}

// A view's pixels at the points of the image that they show. A block may run over the end of a row:
// the next row is written later, and behind the last one there is room.
template <int64_t L, typename acc_t, typename Word, bool reflects, bool nearest, bool resized>
BLD_EXT_INLINE void resample(const Call &call, const View &view, Image<acc_t, Word> &image,
                             acc_t *to, int64_t plane) {
  const int64_t H = call.H, W = call.W, P = image.PER_WORD;
  const FixedMatrix matrix(Matrix(view, call.policy, H, W), call.policy, H, W);
  const int64_t padding = call.policy.crop_padding;
  const Axis across(matrix.bits, view.crop.left - padding, view.crop.width, W);
  const Axis down(matrix.bits, view.crop.top - padding, view.crop.height, H);
  const int32_t stride = static_cast<int32_t>(image.stride);
  Points<L> points;
  Words<L> columns; // sums and products may wrap around on the way
  for (int64_t i = 0; i < L; ++i)
    columns[i] = static_cast<uint32_t>(i);
  for (int64_t row = 0; row < H; ++row) {
    Words<L> x = columns * uint32_t(matrix.a) + uint32_t(matrix.b) * uint32_t(row) + matrix.c;
    Words<L> y = columns * uint32_t(matrix.d) + uint32_t(matrix.e) * uint32_t(row) + matrix.f;
    for (int64_t column = 0; column < W; column += L) {
      points.template locate<reflects, nearest, resized>(across, down, (Ints<L>)x, (Ints<L>)y,
                                                         stride);
      x += uint32_t(L * matrix.a), y += uint32_t(L * matrix.d);
      acc_t *const block = to + row * W + column;
      for (int64_t c = 0; c < call.C; c += P) {
        const Word *const from = image.row(c / P, 0);
        if constexpr (!nearest)
          blend<L>(points, from, stride, std::min(P, call.C - c), block + c * plane, plane);
        else
          for (int64_t k = c; k < std::min(c + P, call.C); ++k)
            for (int64_t i = 0; i < L; ++i)
              block[k * plane + i] = image.value(from[points.where[i]], k);
      }
    }
  }
}

template <int64_t L, typename acc_t, typename Word>
BLD_EXT_INLINE void sample(const Call &call, const View &view, Image<acc_t, Word> &image, acc_t *to,
                           int64_t plane) {
  const Policy &policy = call.policy;
  const bool reflects = policy.padding_mode == PaddingMode::reflect;
  const auto with = [&](auto nearest, auto resized) BLD_EXT_INLINE_LAMBDA {
    constexpr bool N = decltype(nearest)::value, R = decltype(resized)::value;
    reflects ? resample<L, acc_t, Word, true, N, R>(call, view, image, to, plane)
             : resample<L, acc_t, Word, false, N, R>(call, view, image, to, plane);
  };
  if (!policy.turns)
    move(call, view, image, to, plane);
  else if (policy.nearest)
    policy.resized ? with(std::true_type(), std::true_type())
                   : with(std::true_type(), std::false_type());
  else
    policy.resized ? with(std::false_type(), std::true_type())
                   : with(std::false_type(), std::false_type());
}

// ---- colour ----

// Luma of ITU-R BT.601 as torchvision rounds it.
template <typename acc_t, typename V> BLD_EXT_INLINE V luma(const V &r, const V &g, const V &b) {
  return acc_t(0.2989) * r + acc_t(0.587) * g + acc_t(0.114) * b;
}

// One channel, by how much less than the value; k and hue are times chroma.
template <typename acc_t, typename V>
BLD_EXT_INLINE V from_hue(const V &hue, acc_t k, const V &value, const V &chroma) {
  const V less = 2 * chroma - magnitude(magnitude(hue + k * chroma) - 3 * chroma);
  const V positive = V{} > less ? V{} : less;
  return value - (positive < chroma ? positive : chroma);
}

// What happens to the colours of a view.
template <int64_t L, typename acc_t> struct Colours {
  typedef Lanes<acc_t, L> Block;
  const Call &call;
  // unit: levels of the mean, a whole number for each pixel; offset: what rounds to them
  const acc_t white, unit, offset;
  acc_t brightness, contrast, saturation, rest = 0, turns[3];
  std::vector<acc_t> scales, shifts;

  explicit Colours(const Call &call_)
      : call(call_), white(call.image_dtype == ScalarType::Byte     ? 255
                           : call.image_dtype == ScalarType::UInt16 ? 65535
                                                                    : 1),
        unit(0x1p19 / (white == 1 ? 1 : white + 1)),
        offset((sizeof(acc_t) == 4 ? 0x1.8p23 : 0x1.8p52) / unit) {
    for (size_t c = 0; c < call.policy.mean.size(); ++c) {
      const double mean = call.policy.mean[c], std = call.policy.std[c];
      scales.push_back(static_cast<acc_t>(1 / (static_cast<double>(white) * std)));
      shifts.push_back(static_cast<acc_t>(mean / std));
    }
  }

  void set(const View &view) {
    brightness = view.brightness, contrast = view.contrast, saturation = view.saturation;
    for (int c = 0; c < 3; ++c) {
      const acc_t k = static_cast<acc_t>(5 - 2 * c) + 6 * static_cast<acc_t>(view.hue);
      turns[c] = (k < 0 ? k + 6 : k >= 6 ? k - 6 : k) - 5;
    }
  }

  template <typename V> BLD_EXT_INLINE V clamp(const V &x) const {
    return within<acc_t>(x, acc_t(0), white);
  }

  typedef std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t> Bits;

  // Adding 1.5 2^p leaves the rounded number in the low bits of a float or a double.
  BLD_EXT_INLINE Bits level(acc_t gray) const {
    const acc_t positive = gray > 0 ? gray : acc_t(0); // nan is black
    const acc_t shifted = (positive < white ? positive : white) + offset;
    return std::bit_cast<Bits>(shifted) - std::bit_cast<Bits>(offset);
  }

  // Brightness, in place, and the mean for contrast, which does not depend on the order of a sum.
  BLD_EXT_INLINE void begin(acc_t *x, int64_t plane) {
    const int64_t size = call.H * call.W;
    if (call.policy.brightens)
      for (int64_t i = 0; i < call.C * plane; ++i)
        x[i] = clamp(brightness * x[i]);
    if (!call.policy.contrasts)
      return;
    int64_t sum = 0;
    for (int64_t first = 0; first < size; first += SUMMED) {
      Bits part = 0;
      const acc_t *const r = x + first, *const g = r + plane, *const b = g + plane;
      const int64_t count = std::min(SUMMED, size - first);
      if (call.C == 1)
        for (int64_t i = 0; i < count; ++i)
          part += level(r[i]);
      else
        for (int64_t i = 0; i < count; ++i)
          part += level(luma<acc_t>(r[i], g[i], b[i]));
      sum += part;
    }
    const double share = 1 / (static_cast<double>(unit) * static_cast<double>(size));
    rest = (1 - contrast) * static_cast<acc_t>(static_cast<double>(sum) * share);
  }

  // The rest of it for a block of pixels; three channels, or the only one.
  template <int channels> BLD_EXT_INLINE void change(Block (&x)[channels]) const {
    if (call.policy.contrasts)
      for (Block &channel : x)
        channel = clamp(contrast * channel + rest);
    if constexpr (channels == 3) {
      if (call.policy.saturates) {
        const Block gray = (1 - saturation) * luma<acc_t>(x[0], x[1], x[2]);
        for (Block &channel : x)
          channel = clamp(saturation * channel + gray);
      }
      if (call.policy.shifts_hue) {
        const Block r = x[0], g = x[1], b = x[2];
        const Block larger = r > g ? r : g, smaller = r < g ? r : g;
        const Block value = larger > b ? larger : b;
        const Block chroma = value - (smaller < b ? smaller : b), twice = 2 * chroma;
        const Block unlike_red = value == g ? twice + (b - r) : 2 * twice + (r - g);
        const Block hue = value == r ? g - b : unlike_red;
        for (int c = 0; c < 3; ++c)
          x[c] = from_hue(hue, turns[c], value, chroma);
      }
    }
  }

  BLD_EXT_INLINE Block normalised(const Block &x, int64_t c) const {
    return !scales.empty() ? x * scales[c] - shifts[c] : white != 1 ? x / white : x;
  }
};

// Colour, normalise and write a view; erase a rectangle of it.
template <int64_t L, typename acc_t>
BLD_EXT_INLINE void finish(const Call &call, const View &view, const Colours<L, acc_t> &colours,
                           const acc_t *from, int64_t plane, int64_t row) {
  const int64_t size = call.H * call.W, C = call.C;
  const int64_t step = call.channels_last ? C : 1, apart = call.channels_last ? 1 : size;
  with_dtype(call.dtype, "dtype", [&](auto kind) BLD_EXT_INLINE_LAMBDA {
    typedef decltype(kind) T;
    T *const to = static_cast<T *>(call.views) + row * C * size;
    typedef Lanes<acc_t, L> Block; // of some channels, from the first of them
    const auto change = [&](auto channels, int64_t c, int64_t first) BLD_EXT_INLINE_LAMBDA {
      Block x[decltype(channels)::value];
      for (int64_t k = 0; k < channels; ++k)
        x[k] = read<L>(from + (c + k) * plane + first);
      colours.change(x);
      for (int64_t k = 0; k < channels; ++k) {
        acc_t values[L];
        const Block value = colours.normalised(x[k], c + k);
        std::memcpy(values, &value, sizeof values);
        T *const out = to + (c + k) * apart + first * step;
        if (step == 1 && first + L <= size)
          for (int64_t i = 0; i < L; ++i)
            out[i] = static_cast<T>(values[i]);
        else
          for (int64_t i = 0; i < std::min(L, size - first); ++i)
            out[i * step] = static_cast<T>(values[i]);
      }
    };
    if (C == 3)
      for (int64_t first = 0; first < size; first += L)
        change(std::integral_constant<int, 3>(), 0, first);
    else
      for (int64_t c = 0; c < C; ++c)
        for (int64_t first = 0; first < size; first += L)
          change(std::integral_constant<int, 1>(), c, first);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t y = view.erased.top; y < view.erased.top + view.erased.height; ++y)
        for (int64_t x = view.erased.left; x < view.erased.left + view.erased.width; ++x)
          to[c * apart + (y * call.W + x) * step] = T(0);
  });
}

// Views [begin, end) in the order image by image, view by view.
template <typename acc_t, typename Word, int64_t BYTES>
BLD_EXT_INLINE void make_views(const Call &call, int64_t begin, int64_t end) {
  const int64_t V = static_cast<int64_t>(call.view_numbers.size());
  constexpr int64_t L = BYTES / sizeof(acc_t); // pixels side by side
  const int64_t plane = (call.H * call.W + 2 * L - 1) / L * L;
  Image<acc_t, Word> image(call);
  Colours<L, acc_t> colours(call);
  std::vector<acc_t> pixels(call.C * plane); // [C, H, W] of a view, in levels or in [0, 1]
  for (int64_t k = begin; k < end; ++k) {
    const int64_t n = k / V, v = k % V;
    if (k == begin || v == 0)
      image.load(call, n);
    const View view(call.policy, call.seed, call.step, static_cast<uint32_t>(call.view_numbers[v]),
                    static_cast<uint32_t>(call.indices ? call.indices[n] : n), call.H, call.W);
    sample<L>(call, view, image, pixels.data(), plane);
    colours.set(view);
    colours.begin(pixels.data(), plane);
    finish(call, view, colours, pixels.data(), plane, v * call.N + n);
  }
}

typedef void (*MakeViews)(const Call &, int64_t begin, int64_t end);

// For registers of so many bytes.
template <int64_t BYTES>
BLD_EXT_INLINE void make_any_views(const Call &call, int64_t begin, int64_t end) {
  if (call.image_dtype == ScalarType::Byte)
    make_views<float, uint32_t, BYTES>(call, begin, end);
  else if (call.image_dtype == ScalarType::Double)
    make_views<double, double, BYTES>(call, begin, end);
  else
    make_views<float, float, BYTES>(call, begin, end);
}

void make_views_baseline(const Call &call, int64_t begin, int64_t end) {
  make_any_views<16>(call, begin, end);
}
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void make_views_avx2(const Call &call, int64_t begin, int64_t end) {
  make_any_views<32>(call, begin, end);
}
[[gnu::target("avx512f,avx512dq,avx512vl,avx512bw")]] void
make_views_avx512(const Call &call, int64_t begin, int64_t end) {
  make_any_views<64>(call, begin, end);
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

// Asks for large pages where malloc nearly always returns memory that was never touched: there a
// fault for each small page takes longer than writing the views. It is advice, and may be ignored.
void use_large_pages(void *memory, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t FRESH = 32 << 20, PAGE = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / PAGE * PAGE;
  if (bytes > FRESH)
    madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Its documentation is in bld_ext/ops.py.
Tensor augment(const Tensor &images_, std::vector<double> policy, const Tensor &seed,
               const Tensor &step, std::vector<int64_t> views,
               const std::optional<Tensor> &indices_, ScalarType dtype, bool channels_last) {
  BLD_CHECK(images_.dim() == 4, "images: expected shape [N, C, H, W]");
  const int64_t N = images_.size(0), C = images_.size(1), H = images_.size(2), W = images_.size(3);
  const Tensor images = torch::stable::contiguous(images_);
  std::optional<Tensor> indices;
  if (indices_) {
    BLD_CHECK(indices_->is_cpu() && indices_->scalar_type() == ScalarType::Long &&
                  indices_->dim() == 1 && indices_->numel() == N,
              "indices: expected ", N, " int64 numbers on the CPU, one an image");
    indices = torch::stable::contiguous(*indices_);
  }
  BLD_CHECK(H <= 1 << 20 && W <= 1 << 20, "images: expected sides of at most 2^20, got ", H, " x ",
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
            indices ? static_cast<const int64_t *>(indices->const_data_ptr()) : nullptr};
  const int64_t channels = static_cast<int64_t>(call.policy.mean.size());
  BLD_CHECK(channels == 0 || channels == C, "policy.mean: expected ", C,
            " values, one a channel, got ", channels);
  const bool jitter = call.policy.contrasts || call.policy.saturates || call.policy.shifts_hue;
  BLD_CHECK(!jitter || C == 1 || C == 3, "images: expected 1 or 3 channels for colour jitter, got ",
            C);
  for (const auto &[name, kind] : {std::pair("images", call.image_dtype), {"dtype", dtype}})
    with_dtype(kind, name, [](auto) {});
  BLD_CHECK(dtype != ScalarType::Byte && dtype != ScalarType::UInt16,
            "dtype: expected a floating-point dtype, got an integer one");

  const std::vector<int64_t> shape{V * N, C, H, W};
  Tensor made = channels_last ? new_channels_last(images, shape, static_cast<int32_t>(dtype))
                              : torch::stable::new_empty(images, shape, dtype);
  if (made.numel() > 0) {
    call.views = made.mutable_data_ptr();
    use_large_pages(call.views, made.numel() * made.element_size());
    const MakeViews run = kernel();
    torch::stable::parallel_for(0, N * V, std::max<int64_t>(1, PARALLEL_ELEMENTS / (C * H * W)),
                                [&](int64_t begin, int64_t end) { run(call, begin, end); });
  }
  return made;
}

STABLE_TORCH_LIBRARY_IMPL(bld_ext, CPU, m) { m.impl("augment", TORCH_BOX(&augment)); }

} // namespace
} // namespace bld_ext
