// What is drawn for one view of one image, and where its pixels come from: Policy, view_parameters
// and inverse_matrix of bld_ext/reference.py, with the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../check.h"
#include "../philox.h"

namespace bld_ext {

enum Op : uint32_t { GEOMETRY, AFFINE, COLOR, SHAPE, ERASE }; // the last word of a Philox counter
constexpr int32_t FRACTION = 8; // bits of a point's position between two pixels
enum class PaddingMode { zeros, reflect, edge };

// As it comes packed: 24 numbers, then mean and std of each channel.
struct Policy {
  int64_t crop_padding;
  bool resized;
  Interval crop_area, crop_log_ratio;
  double flip;
  Interval angle, share_x, share_y, scale, shear_x, shear_y;
  Interval brightness, contrast, saturation, hue;
  bool brightens, contrasts, saturates, shifts_hue;
  double erase;
  Interval erase_area, erase_log_ratio;
  bool nearest;
  PaddingMode padding_mode;
  std::vector<double> mean, std;
  bool turns; // whether views are more than windows of the image or of its mirror image

  explicit Policy(const std::vector<double> &values)
      : Policy(checked(values).data(), (values.size() - 24) / 2) {}

private:
  static const std::vector<double> &checked(const std::vector<double> &values) {
    BLD_CHECK(values.size() >= 24 && values.size() % 2 == 0,
              "policy: expected 24 numbers, then mean and std of each channel, got ", values.size(),
              " numbers; use Policy.pack()");
    for (const double value : values)
      BLD_CHECK(std::isfinite(value), "policy: expected finite numbers, got ", value);
    // As checks.py has them: beyond, some numbers would not fit into the integers made of them.
    const auto check = [&](const char *name, size_t first, size_t last, double low, double high) {
      for (size_t i = first; i <= last; ++i)
        BLD_CHECK(low <= values[i] && values[i] <= high, "policy.", name, ": expected ", low,
                  " to ", high, ", got ", values[i]);
    };
    check("crop_padding", 0, 0, 0, 1 << 20);
    if (values[2] != 0)
      check("resized_crop", 1, 2, 1e-6, 1);
    check("resized_crop_ratio", 3, 4, 1e-3, 1e3);
    check("flip", 5, 5, 0, 1);
    check("rotation", 6, 6, 0, 180);
    check("translate", 7, 8, 0, 1);
    check("scale", 9, 10, 1e-3, 1e3);
    check("shear", 11, 12, 0, 80);
    check("brightness", 13, 13, 0, 1);
    check("contrast", 14, 14, 0, 1);
    check("saturation", 15, 15, 0, 1);
    check("hue", 16, 16, 0, 0.5);
    check("erase", 17, 17, 0, 1);
    check("erase_area", 18, 19, 1e-6, 1);
    check("erase_ratio", 20, 21, 1e-3, 1e3);
    check("interpolation", 22, 22, 0, 1);
    check("padding_mode", 23, 23, 0, 2);
    return values;
  }

  Policy(const double *v, size_t channels)
      : crop_padding(static_cast<int64_t>(v[0])), resized(v[2] != 0), crop_area(v[1], v[2]),
        crop_log_ratio(std::log(v[3]), std::log(v[4])), flip(v[5]),
        angle(Interval::around(0, v[6])), share_x(Interval::around(0, v[7])),
        share_y(Interval::around(0, v[8])), scale(v[9], v[10]), shear_x(Interval::around(0, v[11])),
        shear_y(Interval::around(0, v[12])), brightness(Interval::around(1, v[13])),
        contrast(Interval::around(1, v[14])), saturation(Interval::around(1, v[15])),
        hue(Interval::around(0, v[16])), brightens(v[13] != 0), contrasts(v[14] != 0),
        saturates(v[15] != 0), shifts_hue(v[16] != 0), erase(v[17]), erase_area(v[18], v[19]),
        erase_log_ratio(std::log(v[20]), std::log(v[21])), nearest(v[22] != 0),
        padding_mode(static_cast<PaddingMode>(static_cast<int>(v[23]))),
        mean(v + 24, v + 24 + channels), std(v + 24 + channels, v + 24 + 2 * channels),
        turns(resized || v[6] || v[7] || v[8] || v[9] != 1 || v[10] != 1 || v[11] || v[12] ||
              nearest || padding_mode != PaddingMode::zeros) {}
};

// e^x for x within ± 8, in products and sums that every device rounds alike.
inline double exp_by_products(double x) {
  x *= 0.0625;
  double y = 1;
  for (int n = 13; n > 0; --n)
    y = 1 + y * x * (1. / n);
  for (int i = 0; i < 4; ++i)
    y = y * y;
  return y;
}

struct Angle {
  double sin, cos;
};

// Exact at multiples of 90 degrees, likewise.
inline Angle sine(double degrees) {
  const double quarters = std::floor(degrees * (1. / 90) + 0.5);
  const double x = (degrees - quarters * 90) * (M_PI / 180), square = x * x;
  double sin = 1, cos = 1;
  for (int n = 16; n > 1; n -= 2) {
    sin = 1 - sin * square * (1. / (n * (n + 1)));
    cos = 1 - cos * square * (1. / (n * (n - 1)));
  }
  sin = sin * x;
  switch (static_cast<int64_t>(quarters) & 3) {
  case 0:
    return {sin, cos};
  case 1:
    return {cos, -sin};
  case 2:
    return {-sin, -cos};
  default:
    return {-cos, sin};
  }
}

struct Rectangle {
  int64_t left, top, width, height;
};

// Its size; it is cut to an image that it does not fit into.
inline Rectangle rectangle(uint32_t area, uint32_t ratio, const Interval &areas,
                           const Interval &log_ratios, int64_t H, int64_t W) {
  const double side = std::sqrt(between(area, areas) * static_cast<double>(H * W));
  const double root = exp_by_products(between(ratio, log_ratios) * 0.5);
  const double width = std::floor(side * root + 0.5), height = std::floor(side / root + 0.5);
  return {0, 0, std::clamp<int64_t>(static_cast<int64_t>(width), 1, W),
          std::clamp<int64_t>(static_cast<int64_t>(height), 1, H)};
}

struct View {
  Rectangle crop, erased; // of the padded image; of the view, with no width if nothing is erased
  bool flip;
  float angle, translate_x, translate_y, scale, shear_x, shear_y;
  float brightness, contrast, saturation, hue;

  View(const Policy &policy, uint64_t seed, uint32_t step, uint32_t view, uint32_t image, int64_t H,
       int64_t W) {
    const auto words = [&](Op op) { return philox({image, view, step, op}, seed); };
    const auto [w_left, w_top, w_flip, w_angle] = words(GEOMETRY);
    const auto [w_scale, w_translate_x, w_translate_y, w_shear_x] = words(AFFINE);
    const auto [w_shear_y, w_area, w_ratio, w_erase] = words(SHAPE);
    const auto [w_brightness, w_contrast, w_saturation, w_hue] = words(COLOR);
    crop = {0, 0, W, H};
    if (policy.resized)
      crop = rectangle(w_area, w_ratio, policy.crop_area, policy.crop_log_ratio, H, W);
    crop.left = below(w_left, 2 * policy.crop_padding + 1 + W - crop.width);
    crop.top = below(w_top, 2 * policy.crop_padding + 1 + H - crop.height);
    flip = uniform(w_flip) < policy.flip;
    angle = between(w_angle, policy.angle);
    const double share_x = between(w_translate_x, policy.share_x);
    const double share_y = between(w_translate_y, policy.share_y);
    translate_x = static_cast<float>(share_x * static_cast<double>(W));
    translate_y = static_cast<float>(share_y * static_cast<double>(H));
    scale = between(w_scale, policy.scale);
    shear_x = between(w_shear_x, policy.shear_x), shear_y = between(w_shear_y, policy.shear_y);
    brightness = between(w_brightness, policy.brightness);
    contrast = between(w_contrast, policy.contrast);
    saturation = between(w_saturation, policy.saturation);
    hue = between(w_hue, policy.hue);
    erased = {0, 0, 0, 0};
    if (uniform(w_erase) < policy.erase) {
      const auto [area, ratio, left, top] = words(ERASE);
      erased = rectangle(area, ratio, policy.erase_area, policy.erase_log_ratio, H, W);
      erased.left = below(left, 1 + W - erased.width);
      erased.top = below(top, 1 + H - erased.height);
    }
  }
};

// A view's pixel (x, y), counted from its centre, shows the point (a x + b y + c, d x + e y + f) of
// the image.
struct Matrix {
  double a, b, c, d, e, f;

  Matrix(const View &view, const Policy &policy, int64_t H, int64_t W) {
    const auto [sin, cos] = sine(view.angle);
    const Angle x = sine(view.shear_x), y = sine(view.shear_y);
    const Angle between = sine(double(view.angle) - view.shear_y);
    const double tan_x = x.sin / x.cos, across = between.cos / y.cos, down = between.sin / y.cos;
    a = (cos - down * tan_x) / view.scale, b = (across * tan_x + sin) / view.scale;
    d = -down / view.scale, e = across / view.scale;
    c = -(a * view.translate_x + b * view.translate_y);
    f = -(d * view.translate_x + e * view.translate_y);
    const Rectangle &crop = view.crop;
    const double zoom_x = (view.flip ? -1. : 1.) * (double(crop.width) / double(W));
    const double zoom_y = double(crop.height) / double(H);
    a *= zoom_x, b *= zoom_x, d *= zoom_y, e *= zoom_y;
    c = zoom_x * c + (double(crop.left - policy.crop_padding) + double(crop.width - 1) * 0.5);
    f = zoom_y * f + (double(crop.top - policy.crop_padding) + double(crop.height - 1) * 0.5);
  }
};

// The same in whole numbers, 2^bits of them a pixel, with x and y counted from the view's corner.
struct FixedMatrix {
  int32_t a, b, c, d, e, f, bits;

  FixedMatrix(const Matrix &m, const Policy &policy, int64_t H, int64_t W) {
    const double across = double(W - 1) * 0.5, down = double(H - 1) * 0.5;
    const double reach_x = std::abs(m.a) * across + std::abs(m.b) * down + std::abs(m.c);
    const double reach_y = std::abs(m.d) * across + std::abs(m.e) * down + std::abs(m.f);
    const double reach = std::max(reach_x, reach_y) + double(W + H + policy.crop_padding);
    std::frexp(reach, &bits);
    bits = std::max(29 - bits, FRACTION + 1); // every position is below 2^29
    const auto whole = [&](double x) {
      x = std::floor(x * double(int64_t(1) << bits) + 0.5);
      return static_cast<int32_t>(std::clamp(x, -0x1p30, 0x1p30));
    };
    a = whole(m.a), b = whole(m.b), c = whole(m.c - (m.a * across + m.b * down));
    d = whole(m.d), e = whole(m.e), f = whole(m.f - (m.d * across + m.e * down));
  }
};

} // namespace bld_ext
