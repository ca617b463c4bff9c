"""augment in one launch, for uint8, float32, bfloat16 and float16 images; float64 runs on the
reference.

A program makes one view of one image, or some tiles of it: parameters from Philox, one resample,
colour in registers, one write. Contrast needs the mean of the view first, so there a program walks
over its view twice. Every operation is rounded by itself and in the order of the reference, sums
are of integers, so that the bits are the reference's.

The policy's numbers are data on the device and seed and step may be; what the policy leaves out is
left out of the kernel.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bld_ext import reference
from bld_ext.reference import GRAY, INTERPOLATIONS, PADDING_MODES, Policy
from bld_ext.triton.device_data import kept

BLOCK = 1024  # pixels of a tile
PIXELS = 4  # of a thread
TILES = 4  # that a program makes of a large view
MOST_PROGRAMS = 65_535  # along the second axis of a grid

OP_GEOMETRY, OP_AFFINE, OP_COLOR, OP_SHAPE, OP_ERASE = map(tl.constexpr, range(5))
(
    ANGLE, SHARE_X, SHARE_Y, SCALE, SHEAR_X, SHEAR_Y, BRIGHTNESS, CONTRAST, SATURATION, HUE,
    CROP_AREA, CROP_RATIO, ERASE_AREA, ERASE_RATIO, RANGES,
) = map(tl.constexpr, range(15))  # fmt: skip
RED, GREEN, BLUE = map(tl.constexpr, GRAY)
ZEROS, REFLECT = (tl.constexpr(PADDING_MODES.index(mode)) for mode in ("zeros", "reflect"))
MEAN_SCALE = tl.constexpr(reference.MEAN_SCALE)
ROUND = tl.constexpr(1.5 * 2.0**52)  # adding it leaves no bits for a fraction
RADIANS = tl.constexpr(math.pi / 180)
UNIT = tl.constexpr(2.0**-24)


def settings(policy: Policy) -> Tensor:
    """What a kernel reads: low, span and high of each range, then mean and std."""
    p = policy
    around = [(-x, x) for x in (p.rotation, *p.translate)]
    ranges = [
        *around, p.scale, *((-x, x) for x in p.shear),
        *((1 - x, 1 + x) for x in (p.brightness, p.contrast, p.saturation)), (-p.hue, p.hue),
        p.resized_crop or (1, 1), tuple(map(math.log, p.resized_crop_ratio)),
        p.erase_area, tuple(map(math.log, p.erase_ratio)),
    ]  # fmt: skip
    numbers = [x for low, high in ranges for x in (low, high - low, high)]
    return torch.tensor([*numbers, *p.mean, *p.std], dtype=torch.float32)


# ---- what is drawn: view_parameters of the reference ----


@triton.jit
def _counter(n, v, seed_ptr, step_ptr, indices_ptr, seed_low, seed_high, step, first_view):
    """Philox's counter of a view of an image, but for the operation, and then its key."""
    if seed_ptr is not None:
        seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
        key_low, key_high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    else:
        key_low = seed_low.to(tl.uint32, bitcast=True)
        key_high = seed_high.to(tl.uint32, bitcast=True)
    if step_ptr is not None:
        step_word = tl.load(step_ptr).to(tl.uint32)
    else:
        step_word = step.to(tl.uint32, bitcast=True)
    if indices_ptr is not None:
        image = tl.load(indices_ptr + n).to(tl.uint32)
    else:
        image = n.to(tl.uint32)
    view = (first_view + v.to(tl.int32)).to(tl.uint32, bitcast=True)
    return image, view, step_word, key_low, key_high


@triton.jit
def _words(counter, OP: tl.constexpr):
    """Four random words, uint32, for one operation."""
    image, view, step, key_low, key_high = counter
    return tl.random.philox_impl(image, view, step, tl.zeros_like(image) + OP, key_low, key_high)


@triton.jit
def _between(word, settings_ptr, RANGE: tl.constexpr):
    low = tl.load(settings_ptr + 3 * RANGE).to(tl.float64)
    span = tl.load(settings_ptr + 3 * RANGE + 1).to(tl.float64)
    high = tl.load(settings_ptr + 3 * RANGE + 2)
    uniform = (word >> 8).to(tl.int32).to(tl.float64) * UNIT
    value = (low + uniform * span).to(tl.float32)
    return tl.where(value > high, high, value)


@triton.jit
def _below(word, n):
    return ((word.to(tl.uint64) * n.to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit
def _exp(x):
    x = x * 0.0625
    y = x * 0 + 1
    for i in tl.static_range(13):
        y = 1 + y * x * (1 / (13 - i))
    for _ in tl.static_range(4):
        y = y * y
    return y


@triton.jit
def _sine(degrees):
    quarters = tl.floor(degrees * (1 / 90) + 0.5)
    x = (degrees - quarters * 90) * RADIANS
    square = x * x
    sin = x * 0 + 1
    cos = sin
    for i in tl.static_range(8):
        sin = 1 - sin * square * (1 / ((16 - 2 * i) * (17 - 2 * i)))
        cos = 1 - cos * square * (1 / ((16 - 2 * i) * (15 - 2 * i)))
    sin = sin * x
    quarter = quarters.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    turned = tl.where(odd, cos, sin)
    cos = tl.where(odd, -sin, cos)
    return tl.where(quarter >= 2, -turned, turned), tl.where(quarter >= 2, -cos, cos)


@triton.jit
def _rectangle(area, ratio, settings_ptr, AREA: tl.constexpr, RATIO: tl.constexpr, H, W):
    """Width and height."""
    pixels = (H.to(tl.int64) * W).to(tl.float64)
    side = tl.sqrt(_between(area, settings_ptr, AREA).to(tl.float64) * pixels)
    root = _exp(_between(ratio, settings_ptr, RATIO).to(tl.float64) * 0.5)
    width = tl.floor(side * root + 0.5).to(tl.int32)
    height = tl.floor(side / root + 0.5).to(tl.int32)
    width = tl.minimum(tl.maximum(width, 1), W)
    return width, tl.minimum(tl.maximum(height, 1), H)


@triton.jit
def _crop(w_geometry, w_shape, settings_ptr, padding, H, W, RESIZED: tl.constexpr):
    """First column and row, width and height of what a view shows of the image."""
    left, top, _, _ = w_geometry
    width, height = W, H
    if RESIZED:
        _, area, ratio, _ = w_shape
        width, height = _rectangle(area, ratio, settings_ptr, CROP_AREA, CROP_RATIO, H, W)
    first_column = _below(left, 2 * padding + 1 + W - width) - padding
    first_row = _below(top, 2 * padding + 1 + H - height) - padding
    return first_column, first_row, width, height


@triton.jit
def _color_jitter(counter, settings_ptr, JITTERS: tl.constexpr):
    """Factors of brightness, contrast and saturation, and by how many turns hue is shifted."""
    brightness, contrast, saturation, turns = 1.0, 1.0, 1.0, 0.0
    if JITTERS:
        w_brightness, w_contrast, w_saturation, w_hue = _words(counter, OP_COLOR)
        brightness = _between(w_brightness, settings_ptr, BRIGHTNESS)
        contrast = _between(w_contrast, settings_ptr, CONTRAST)
        saturation = _between(w_saturation, settings_ptr, SATURATION)
        turns = _between(w_hue, settings_ptr, HUE)
    return brightness, contrast, saturation, turns


@triton.jit
def _erased(counter, w_shape, settings_ptr, erase_below, H, W, ERASES: tl.constexpr):
    """First column and row, width and height of what is erased of a view."""
    column, row, width, height = 0, 0, 0, 0
    if ERASES:
        _, _, _, erase = w_shape
        area, ratio, left, top = _words(counter, OP_ERASE)
        width, height = _rectangle(area, ratio, settings_ptr, ERASE_AREA, ERASE_RATIO, H, W)
        column = _below(left, 1 + W - width)
        row = _below(top, 1 + H - height)
        width = tl.where((erase >> 8).to(tl.int32) < erase_below, width, 0)
    return column, row, width, height


# ---- the matrix: inverse_matrix of the reference ----


@triton.jit
def _inverse_affine(counter, w_geometry, w_shape, settings_ptr, H, W):
    """a, b, d, e of rotation, shear and scale, inverted, and the translation in pixels."""
    _, _, _, turn = w_geometry
    slant, _, _, _ = w_shape
    zoom, move_x, move_y, lean = _words(counter, OP_AFFINE)
    angle = _between(turn, settings_ptr, ANGLE).to(tl.float64)
    shear_y = _between(slant, settings_ptr, SHEAR_Y).to(tl.float64)
    sin, cos = _sine(angle)
    sin_x, cos_x = _sine(_between(lean, settings_ptr, SHEAR_X).to(tl.float64))
    _, cos_y = _sine(shear_y)
    sin_between, cos_between = _sine(angle - shear_y)
    tan_x = sin_x / cos_x
    across, down = cos_between / cos_y, sin_between / cos_y
    scale = _between(zoom, settings_ptr, SCALE).to(tl.float64)
    a, b = (cos - down * tan_x) / scale, (across * tan_x + sin) / scale
    d, e = -down / scale, across / scale
    share_x = _between(move_x, settings_ptr, SHARE_X).to(tl.float64)
    share_y = _between(move_y, settings_ptr, SHARE_Y).to(tl.float64)
    shift_x = (share_x * W.to(tl.float64)).to(tl.float32).to(tl.float64)
    shift_y = (share_y * H.to(tl.float64)).to(tl.float32).to(tl.float64)
    return a, b, d, e, shift_x, shift_y


@triton.jit
def _inverse_matrix(
    counter, w_geometry, w_shape, settings_ptr, crop, flip_below, H, W, AFFINE: tl.constexpr
):
    """a, b, c, d, e, f: a view's pixel (x, y), counted from its centre, shows the point
    (a x + b y + c, d x + e y + f) of the image.
    """
    first_column, first_row, width, height = crop
    _, _, flip, _ = w_geometry
    mirror = tl.where((flip >> 8).to(tl.int32) < flip_below, -1.0, 1.0).to(tl.float64)
    zoom_x = mirror * (width.to(tl.float64) / W.to(tl.float64))
    zoom_y = height.to(tl.float64) / H.to(tl.float64)
    middle_x = first_column.to(tl.float64) + (width - 1).to(tl.float64) * 0.5
    middle_y = first_row.to(tl.float64) + (height - 1).to(tl.float64) * 0.5
    if AFFINE:
        a, b, d, e, shift_x, shift_y = _inverse_affine(
            counter, w_geometry, w_shape, settings_ptr, H, W
        )
        c = (zoom_x * -(a * shift_x + b * shift_y) + middle_x).to(tl.float32)
        f = (zoom_y * -(d * shift_x + e * shift_y) + middle_y).to(tl.float32)
        a, b = (zoom_x * a).to(tl.float32), (zoom_x * b).to(tl.float32)
        d, e = (zoom_y * d).to(tl.float32), (zoom_y * e).to(tl.float32)
    else:
        a, b, c = zoom_x.to(tl.float32), 0.0, middle_x.to(tl.float32)
        d, e, f = 0.0, zoom_y.to(tl.float32), middle_y.to(tl.float32)
    return a, b, c, d, e, f


# ---- pixels ----


@triton.jit
def _clamp(x, low, high):
    """nan stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _reflect(x, size):
    period = (2 * (size - 1)).to(tl.float32)
    safe = tl.where(period > 0, period, 1.0)
    folded = x - period * tl.floor(tl.div_rn(x, tl.zeros_like(x) + safe))
    folded = tl.where(folded < period - folded, folded, period - folded)
    return tl.where(period > 0, folded, 0.0)


@triton.jit
def _whole(x, EVEN: tl.constexpr):
    """The nearest whole number; of two that are as near the upper, or the even one."""
    upper = tl.floor(x + 0.5)
    if EVEN:
        odd = upper - tl.floor(upper * 0.5) * 2
        upper = tl.where(upper - x == 0.5, upper - odd, upper)
    return upper


@triton.jit
def _snap(x, first, size):
    low = first.to(tl.float32)
    high = low + (size - 1).to(tl.float32)
    return tl.where((x >= low - 0.5) & (x <= high + 0.5), _clamp(x, low, high), x)


@triton.jit
def _tap(image_ptr, column, row, H, W, mask, PADDING: tl.constexpr):
    if PADDING == ZEROS:
        mask = mask & (column >= 0) & (column < W) & (row >= 0) & (row < H)
    else:
        column = tl.minimum(tl.maximum(column, 0), W - 1)
        row = tl.minimum(tl.maximum(row, 0), H - 1)
    return tl.load(image_ptr + row * W + column, mask=mask, other=0).to(tl.float32)


@triton.jit
def _sample(image_ptr, points, H, W, mask, NEAREST: tl.constexpr, PADDING: tl.constexpr):
    """One channel of an image at points of it, in [0, 1]."""
    source_x, source_y = points
    left, upper = tl.floor(source_x), tl.floor(source_y)
    column = _clamp(left, -2.0, W.to(tl.float32)).to(tl.int32)
    row = _clamp(upper, -2.0, H.to(tl.float32)).to(tl.int32)
    total = _tap(image_ptr, column, row, H, W, mask, PADDING)
    if not NEAREST:
        right, low = source_x - left, source_y - upper
        total = total * ((1 - right) * (1 - low))
        total += _tap(image_ptr, column + 1, row, H, W, mask, PADDING) * (right * (1 - low))
        total += _tap(image_ptr, column, row + 1, H, W, mask, PADDING) * ((1 - right) * low)
        total += _tap(image_ptr, column + 1, row + 1, H, W, mask, PADDING) * (right * low)
    if image_ptr.dtype.element_ty == tl.uint8:
        total = tl.div_rn(total, tl.full(total.shape, 255.0, tl.float32))
    return total


@triton.jit
def _blend(x, rest, factor):
    return _clamp(factor * x + rest, 0.0, 1.0)


@triton.jit
def _luma(rgb):
    r, g, b = rgb
    return r * RED + g * GREEN + b * BLUE


@triton.jit
def _level_sum(gray, mask):
    """In whole multiples of 2^-30 the sum does not depend on the order."""
    rounded = (gray.to(tl.float64) * MEAN_SCALE + ROUND) - ROUND
    return tl.sum(tl.where(mask, rounded.to(tl.int64), 0))


@triton.jit
def _mean(level_sum, pixels):
    return (level_sum.to(tl.float64) / pixels).to(tl.float32)


@triton.jit
def _from_hue(hue, n, value, chroma):
    k = n + hue
    k = tl.where(k >= 12, k - 12, tl.where(k >= 6, k - 6, tl.where(k < 0, k + 6, k)))
    k = tl.where(k < 4 - k, k, 4 - k)
    return value - chroma * _clamp(k, 0.0, 1.0)


@triton.jit
def _shift_hue(rgb, turns):
    r, g, b = rgb
    value = tl.where(r > g, r, g)
    value = tl.where(value > b, value, b)
    smallest = tl.where(r < g, r, g)
    chroma = value - tl.where(smallest < b, smallest, b)
    numerator = tl.where(value == r, g - b, tl.where(value == g, b - r, r - g))
    start = tl.where(value == r, 0.0, tl.where(value == g, 2.0, 4.0))
    hue = start + tl.div_rn(numerator, tl.where(chroma > 0, chroma, 1.0)) + 6 * turns
    r, g = _from_hue(hue, 5, value, chroma), _from_hue(hue, 3, value, chroma)
    return r, g, _from_hue(hue, 1, value, chroma)


@triton.jit
def _points(
    at, matrix, crop, H, W,
    RESIZED: tl.constexpr, NEAREST: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The points of the image that the pixels `at` of a view show."""
    a, b, c, d, e, f = matrix
    row = at // W
    x = (at - row * W).to(tl.float32) - (W - 1).to(tl.float32) * 0.5
    y = row.to(tl.float32) - (H - 1).to(tl.float32) * 0.5
    source_x, source_y = a * x + (b * y + c), d * x + (e * y + f)
    if RESIZED:
        first_column, first_row, width, height = crop
        source_x = _snap(source_x, first_column, width)
        source_y = _snap(source_y, first_row, height)
    if PADDING == REFLECT:
        source_x, source_y = _reflect(source_x, W), _reflect(source_y, H)
    if NEAREST:
        source_x, source_y = _whole(source_x, not RESIZED), _whole(source_y, not RESIZED)
    return source_x, source_y


@triton.jit
def _channel(
    image_ptr, points, H, W, mask, brightness,
    BRIGHTENS: tl.constexpr, NEAREST: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """One channel of the points, brightened."""
    value = _sample(image_ptr, points, H, W, mask, NEAREST, PADDING)
    if BRIGHTENS:
        value = _blend(value, 0, brightness)
    return value


@triton.jit
def _rgb(
    image_ptr, points, H, W, mask, brightness,
    BRIGHTENS: tl.constexpr, NEAREST: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """The three channels of the points, brightened."""
    plane = H.to(tl.int64) * W
    r = _sample(image_ptr, points, H, W, mask, NEAREST, PADDING)
    g = _sample(image_ptr + plane, points, H, W, mask, NEAREST, PADDING)
    b = _sample(image_ptr + 2 * plane, points, H, W, mask, NEAREST, PADDING)
    if BRIGHTENS:
        r, g, b = _blend(r, 0, brightness), _blend(g, 0, brightness), _blend(b, 0, brightness)
    return r, g, b


@triton.jit
def _view_mean(
    image_ptr, matrix, crop, brightness, pixels, H, W, RGB: tl.constexpr, RESIZED: tl.constexpr,
    BRIGHTENS: tl.constexpr, NEAREST: tl.constexpr, PADDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean of a gray view, of several tiles: what contrast blends with."""
    total = tl.zeros([], tl.int64)
    for tile in range(tl.program_id(1), tl.cdiv(H * W, BLOCK), tl.num_programs(1)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        mask = at < H * W
        points = _points(at, matrix, crop, H, W, RESIZED, NEAREST, PADDING)
        if RGB:
            gray = _luma(
                _rgb(image_ptr, points, H, W, mask, brightness, BRIGHTENS, NEAREST, PADDING)
            )
        else:
            gray = _channel(image_ptr, points, H, W, mask, brightness, BRIGHTENS, NEAREST, PADDING)
        total += _level_sum(gray, mask)
    return _mean(total, pixels)


@triton.jit
def _recolor(
    rgb, mean, contrast, saturation, turns,
    CONTRASTS: tl.constexpr, SATURATES: tl.constexpr, SHIFTS_HUE: tl.constexpr,
):  # fmt: skip
    r, g, b = rgb
    if CONTRASTS:
        rest = (1 - contrast) * mean
        r, g, b = _blend(r, rest, contrast), _blend(g, rest, contrast), _blend(b, rest, contrast)
    if SATURATES:
        rest = (1 - saturation) * _luma((r, g, b))
        r, g = _blend(r, rest, saturation), _blend(g, rest, saturation)
        b = _blend(b, rest, saturation)
    if SHIFTS_HUE:
        r, g, b = _shift_hue((r, g, b), turns)
    return r, g, b


@triton.jit
def _store(
    view_ptr, settings_ptr, value, channel, C, at, mask, erased, H, W,
    NORMALISES: tl.constexpr, ERASES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Normalise, erase, and write a channel of a view's pixels `at`."""
    if NORMALISES:
        mean = tl.load(settings_ptr + 3 * RANGES + channel)
        std = tl.load(settings_ptr + 3 * RANGES + C + channel)
        value = tl.div_rn(value - mean, tl.zeros_like(value) + std)
    if ERASES:
        first_column, first_row, width, height = erased
        row = at // W
        column = at - row * W
        covered = (column >= first_column) & (column < first_column + width)
        covered = covered & (row >= first_row) & (row < first_row + height)
        value = tl.where(covered, 0.0, value)
    if CHANNELS_LAST:
        where = at.to(tl.int64) * C + channel
    else:
        where = at + tl.cast(channel, tl.int64) * (H * W)
    tl.store(view_ptr + where, value, mask=mask)


@triton.jit(
    do_not_specialize=[
        "seed_low", "seed_high", "step", "first_view", "N", "C", "H", "W", "padding",
        "flip_below", "erase_below",
    ],
    do_not_specialize_on_alignment=[
        "images_ptr", "views_ptr", "settings_ptr", "seed_ptr", "step_ptr", "indices_ptr",
    ],
)  # fmt: skip
def views_kernel(
    images_ptr,  # [N, C, H, W]
    views_ptr,  # [V, N, C, H, W], or [V, N, H, W, C]
    settings_ptr,  # as `settings` has them
    seed_ptr,  # int64, or None for what follows
    step_ptr,  # int64, or None
    indices_ptr,  # [N] int64, or None for 0 to N - 1
    seed_low,  # the bits of a uint32, as the three after it
    seed_high,
    step,
    first_view,
    N,
    C,
    H,
    W,
    padding,
    flip_below,  # flipped where 24 random bits are below this
    erase_below,
    RGB: tl.constexpr,  # C = 3
    CHANNELS_LAST: tl.constexpr,
    RESIZED: tl.constexpr,
    AFFINE: tl.constexpr,
    BRIGHTENS: tl.constexpr,
    CONTRASTS: tl.constexpr,
    SATURATES: tl.constexpr,
    SHIFTS_HUE: tl.constexpr,
    NORMALISES: tl.constexpr,
    ERASES: tl.constexpr,
    NEAREST: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_TILE: tl.constexpr,  # holds a view
):
    place = tl.program_id(0).to(tl.int64)
    v = place // N
    n = place - v * N

    counter = _counter(n, v, seed_ptr, step_ptr, indices_ptr, seed_low, seed_high, step, first_view)
    w_geometry, w_shape = _words(counter, OP_GEOMETRY), _words(counter, OP_SHAPE)
    crop = _crop(w_geometry, w_shape, settings_ptr, padding, H, W, RESIZED)
    matrix = _inverse_matrix(
        counter, w_geometry, w_shape, settings_ptr, crop, flip_below, H, W, AFFINE
    )
    brightness, contrast, saturation, turns = _color_jitter(
        counter, settings_ptr, BRIGHTENS or CONTRASTS or SATURATES or SHIFTS_HUE
    )
    erased = _erased(counter, w_shape, settings_ptr, erase_below, H, W, ERASES)

    size = H * W
    image_ptr = images_ptr + n * C * size
    view_ptr = views_ptr + place * C * size
    pixels = size.to(tl.float64) * MEAN_SCALE
    mean = 0.0
    if CONTRASTS and not ONE_TILE:
        mean = _view_mean(
            image_ptr, matrix, crop, brightness, pixels, H, W,
            RGB, RESIZED, BRIGHTENS, NEAREST, PADDING, BLOCK,
        )  # fmt: skip
    for tile in range(tl.program_id(1), tl.cdiv(size, BLOCK), tl.num_programs(1)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        points = _points(at, matrix, crop, H, W, RESIZED, NEAREST, PADDING)
        if RGB:
            rgb = _rgb(image_ptr, points, H, W, mask, brightness, BRIGHTENS, NEAREST, PADDING)
            if CONTRASTS and ONE_TILE:
                mean = _mean(_level_sum(_luma(rgb), mask), pixels)
            rgb = _recolor(rgb, mean, contrast, saturation, turns, CONTRASTS, SATURATES, SHIFTS_HUE)
            for k in tl.static_range(3):
                _store(
                    view_ptr, settings_ptr, rgb[k], k, 3, at, mask, erased, H, W,
                    NORMALISES, ERASES, CHANNELS_LAST,
                )  # fmt: skip
        else:
            for k in range(C):
                channel_ptr = image_ptr + tl.cast(k, tl.int64) * size
                value = _channel(
                    channel_ptr, points, H, W, mask, brightness, BRIGHTENS, NEAREST, PADDING
                )
                if CONTRASTS:
                    if ONE_TILE:
                        mean = _mean(_level_sum(value, mask), pixels)
                    value = _blend(value, (1 - contrast) * mean, contrast)
                _store(
                    view_ptr, settings_ptr, value, k, C, at, mask, erased, H, W,
                    NORMALISES, ERASES, CHANNELS_LAST,
                )  # fmt: skip


# ---- the launch ----


def runs(views: list[int]) -> list[range]:
    """The longest stretches of consecutive numbers, in order."""
    found: list[range] = []
    for v in views:
        if found and found[-1].stop == v:
            found[-1] = range(found[-1].start, v + 1)
        else:
            found.append(range(v, v + 1))
    return found


def flags(policy: Policy, C: int) -> dict[str, object]:
    """What of the kernel a policy needs."""
    affine = policy._replace(resized_crop=None, interpolation="bilinear", padding_mode="zeros")
    return dict(
        RGB=C == 3,
        RESIZED=policy.resized_crop is not None,
        AFFINE=affine.turns,
        BRIGHTENS=policy.brightness > 0,
        CONTRASTS=policy.contrast > 0,
        SATURATES=policy.saturation > 0 and C == 3,
        SHIFTS_HUE=policy.hue > 0 and C == 3,
        NORMALISES=len(policy.mean) > 0,
        ERASES=policy.erase > 0,
        # whole pixels have one neighbour
        NEAREST=policy.interpolation == INTERPOLATIONS[1] or not policy.turns,
        PADDING=PADDING_MODES.index(policy.padding_mode),
    )


def shape(size: int, whole: bool) -> tuple[int, int, int]:
    """(pixels of a tile, warps, programs a view) of views of `size` pixels."""
    block = min(2 * BLOCK if whole else BLOCK, max(128, triton.next_power_of_2(size)))
    programs = triton.cdiv(size, block * (TILES if size > TILES * block else 1))
    warps = max(1, block // (32 * PIXELS))
    return block, warps, 1 if whole else min(programs, MOST_PROGRAMS)


def signed(word: int) -> int:
    """The bits of a uint32 as an int32."""
    return word - 2**32 if word >= 2**31 else word


def on_device(scalar: Tensor, device: torch.device) -> bool:
    """Whether the kernel reads a scalar itself, so that a graph can be replayed with another."""
    return scalar.device == device


def launch(images, made, policy, seed, step, views, indices, channels_last):
    """Writes the views into `made`, in one launch for each stretch of consecutive views."""
    N, C, H, W = images.shape
    settled, device = Policy.unpack(policy), images.device
    wanted = flags(settled, C)
    block, warps, programs = shape(H * W, wanted["CONTRASTS"])
    numbers = kept(("augment", *policy), device, "policy", lambda: settings(settled))
    there = [x if on_device(x, device) else None for x in (seed, step)]
    seed, step = (x.item() if at is None else 0 for x, at in zip((seed, step), there, strict=True))
    guard = torch.cuda.device(device) if images.is_cuda else contextlib.nullcontext()
    first = 0
    for run in runs(views):
        with guard:
            views_kernel[(N * len(run), programs)](
                images,
                made[first * N :],
                numbers,
                *there,
                indices,
                signed(seed & 0xFFFFFFFF),
                seed >> 32,
                signed(step),
                signed(run.start),
                N,
                C,
                H,
                W,
                settled.crop_padding,
                math.ceil(settled.flip * 2**24),
                math.ceil(settled.erase * 2**24),
                CHANNELS_LAST=channels_last,
                BLOCK=block,
                ONE_TILE=H * W <= block,
                **wanted,
                num_warps=warps,
                enable_fp_fusion=False,  # every operation is rounded by itself
            )
        first += len(run)


def augment(images, policy, seed, step, views, indices, dtype, channels_last):
    if images.dtype == torch.float64:
        return reference.augment(images, policy, seed, step, views, indices, dtype, channels_last)
    N = images.shape[0]
    if indices is not None:
        if indices.shape != (N,) or indices.dtype != torch.int64:
            raise ValueError(f"indices: expected int64 [{N}], got {indices.dtype} {indices.shape}")
        indices = indices.contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = torch.empty(
        (len(views) * N, *images.shape[1:]),
        dtype=dtype,
        device=images.device,
        memory_format=layout,
    )
    if made.numel():
        launch(images.contiguous(), made, policy, seed, step, views, indices, channels_last)
    return made
