"""augment in two or three launches, for uint8, uint16, float32, bfloat16 and float16 images; those
of float64 run on the reference.

The first draws the parameters of all views, a thread each, and packs images of up to four channels
of uint8 into words with a border, so that a neighbour of a point is one load. In the second a
program makes one view of one image, or some tiles of it: one resample, colour in registers, one
write. Contrast needs the mean of the view first: where a view is larger than a tile, a launch
before adds up its levels.

Points and weights are whole numbers. Colours are float32, of which every operation is rounded by
itself and in the order of the reference; sums are of integers. So the bits are the reference's.

The policy's numbers are data on the device and seed and step may be; what the policy leaves out is
left out of the kernel.
"""

import contextlib
import math
import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bld_ext import reference
from bld_ext.reference import GRAY, INTERPOLATIONS, PADDING_MODES, Policy
from bld_ext.triton.device_data import kept, on_device

BLOCK = 1024  # pixels of a tile
PIXELS = 8  # of a tile that a thread has, or half as many of images that are not packed
TILES = 4  # that a program makes of a large view
MOST_PROGRAMS = 65_535  # along the second axis of a grid
BORDER = tl.constexpr(2)  # pixels around a packed image, where points outside of it end up
PREPARED = 128  # views, or words of an image, that a program of the first launch has

OP_GEOMETRY, OP_AFFINE, OP_COLOR, OP_SHAPE, OP_ERASE = map(tl.constexpr, range(5))
(
    ANGLE, SHARE_X, SHARE_Y, SCALE, SHEAR_X, SHEAR_Y, BRIGHTNESS, CONTRAST, SATURATION, HUE,
    CROP_AREA, CROP_RATIO, ERASE_AREA, ERASE_RATIO, RANGES,
) = map(tl.constexpr, range(15))  # fmt: skip
# where the numbers of a view are kept
MATRIX, BITS, CROP, COLORS, TURNS, ERASED = map(tl.constexpr, (0, 6, 7, 11, 14, 17))
IMAGE, LEVEL_SUM, WORDS = map(tl.constexpr, (21, 22, 24))  # the sum is an int64
RED, GREEN, BLUE = map(tl.constexpr, GRAY)
ZEROS, REFLECT = (tl.constexpr(PADDING_MODES.index(mode)) for mode in ("zeros", "reflect"))
FRACTION = tl.constexpr(reference.FRACTION)
ONE = tl.constexpr(1 << reference.FRACTION)
LEVELS = tl.constexpr(reference.LEVELS)
RADIANS = tl.constexpr(math.pi / 180)
UNIT = tl.constexpr(2.0**-24)


def settings(policy: Policy, white: int) -> Tensor:
    """What a kernel reads: low, span and high of each range, then scale and shift a channel."""
    p = policy
    around = [(-x, x) for x in (p.rotation, *p.translate)]
    ranges = [
        *around, p.scale, *((-x, x) for x in p.shear),
        *((1 - x, 1 + x) for x in (p.brightness, p.contrast, p.saturation)), (-p.hue, p.hue),
        p.resized_crop or (1, 1), tuple(map(math.log, p.resized_crop_ratio)),
        p.erase_area, tuple(map(math.log, p.erase_ratio)),
    ]  # fmt: skip
    numbers = [x for low, high in ranges for x in (low, high - low, high)]
    numbers += [1 / (white * std) for std in p.std]
    numbers += [mean / std for mean, std in zip(p.mean, p.std, strict=True)]
    return torch.tensor(numbers, dtype=torch.float32)


# ---- what is drawn: view_parameters of the reference ----


@triton.jit
def _counter(
    n, v, exists, seed_ptr, step_ptr, indices_ptr, seed_low, seed_high, step, first_view
):  # fmt: skip
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
        image = tl.load(indices_ptr + n, mask=exists, other=0).to(tl.uint32)
    else:
        image = n.to(tl.uint32)
    view = (first_view + v.to(tl.int32)).to(tl.uint32, bitcast=True)
    return image, view, step_word, key_low, key_high


@triton.jit
def _words(counter, OP: tl.constexpr):
    """Four random words, uint32, for one operation."""
    image, view, step, key_low, key_high = counter
    zeros = tl.zeros_like(image)
    return tl.random.philox_impl(
        image, view, zeros + step, zeros + OP, zeros + key_low, zeros + key_high
    )


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
def _color_jitter(counter, settings_ptr):
    """Factors of brightness, contrast and saturation, and by how many turns hue is shifted."""
    w_brightness, w_contrast, w_saturation, w_hue = _words(counter, OP_COLOR)
    brightness = _between(w_brightness, settings_ptr, BRIGHTNESS)
    contrast = _between(w_contrast, settings_ptr, CONTRAST)
    saturation = _between(w_saturation, settings_ptr, SATURATION)
    return brightness, contrast, saturation, _between(w_hue, settings_ptr, HUE)


@triton.jit
def _erased(counter, w_shape, settings_ptr, erase_below, H, W):
    """First column and row, width and height of what is erased of a view."""
    _, _, _, erase = w_shape
    area, ratio, left, top = _words(counter, OP_ERASE)
    width, height = _rectangle(area, ratio, settings_ptr, ERASE_AREA, ERASE_RATIO, H, W)
    column, row = _below(left, 1 + W - width), _below(top, 1 + H - height)
    return column, row, tl.where((erase >> 8).to(tl.int32) < erase_below, width, 0), height


# ---- the matrix: inverse_matrix and fixed_point of the reference ----


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
        c = zoom_x * -(a * shift_x + b * shift_y) + middle_x
        f = zoom_y * -(d * shift_x + e * shift_y) + middle_y
        return zoom_x * a, zoom_x * b, c, zoom_y * d, zoom_y * e, f
    else:
        zeros = zoom_x * 0
        return zoom_x, zeros, middle_x, zeros, zoom_y + zeros, middle_y


@triton.jit
def _whole_number(x, one):
    return tl.floor(x * one + 0.5).to(tl.int32)


@triton.jit
def _fixed_point(matrix, padding, H, W):
    """The matrix in int32, for pixels counted from the view's corner, and its fractional bits."""
    a, b, c, d, e, f = matrix
    across, down = (W - 1).to(tl.float64) * 0.5, (H - 1).to(tl.float64) * 0.5
    reach_x = tl.abs(a) * across + tl.abs(b) * down + tl.abs(c)
    reach_y = tl.abs(d) * across + tl.abs(e) * down + tl.abs(f)
    reach = tl.maximum(reach_x, reach_y) + (W + H + padding).to(tl.float64)
    exponent = ((reach.to(tl.int64, bitcast=True) >> 52) & 2047).to(tl.int32) - 1022
    bits = tl.maximum(29 - exponent, FRACTION + 1)
    one = ((bits + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    c, f = c - (a * across + b * down), f - (d * across + e * down)
    a, b, c = _whole_number(a, one), _whole_number(b, one), _whole_number(c, one)
    return a, b, c, _whole_number(d, one), _whole_number(e, one), _whole_number(f, one), bits


@triton.jit
def _from_five(turns, n):
    """Where a channel lies on the colour wheel, in sextants from the fifth."""
    k = n + 6 * turns
    return tl.where(k < 0, k + 6, tl.where(k >= 6, k - 6, k)) - 5


@triton.jit
def _keep(drawn_ptr, at, FIRST: tl.constexpr, values, exists):
    for k in tl.static_range(len(values)):
        value = values[k]
        if value.dtype == tl.float32:
            value = value.to(tl.int32, bitcast=True)
        tl.store(drawn_ptr + at + (FIRST + k), value, mask=exists)


@triton.jit
def _draw(
    place, drawn_ptr, settings_ptr, seed_ptr, step_ptr, indices_ptr, seed_low, seed_high, step,
    first_view, N, H, W, padding, flip_below, erase_below,
    RESIZED: tl.constexpr, AFFINE: tl.constexpr, JITTERS: tl.constexpr, ERASES: tl.constexpr,
    exists,
):  # fmt: skip
    """What a view is made from, for the views at `place` of all."""
    v = place // N
    n = place - v * N
    counter = _counter(
        n, v, exists, seed_ptr, step_ptr, indices_ptr, seed_low, seed_high, step, first_view
    )
    w_geometry, w_shape = _words(counter, OP_GEOMETRY), _words(counter, OP_SHAPE)
    crop = _crop(w_geometry, w_shape, settings_ptr, padding, H, W, RESIZED)
    matrix = _inverse_matrix(
        counter, w_geometry, w_shape, settings_ptr, crop, flip_below, H, W, AFFINE
    )
    at = place * WORDS
    _keep(drawn_ptr, at, MATRIX, _fixed_point(matrix, padding, H, W), exists)
    _keep(drawn_ptr, at, IMAGE, (n.to(tl.int32),), exists)
    if RESIZED:
        _keep(drawn_ptr, at, CROP, crop, exists)
    if JITTERS:
        brightness, contrast, saturation, turns = _color_jitter(counter, settings_ptr)
        _keep(drawn_ptr, at, COLORS, (brightness, contrast, saturation), exists)
        wheel = (_from_five(turns, 5), _from_five(turns, 3), _from_five(turns, 1))
        _keep(drawn_ptr, at, TURNS, wheel, exists)
        _keep(drawn_ptr, at, LEVEL_SUM, (place * 0, place * 0), exists)
    if ERASES:
        erased = _erased(counter, w_shape, settings_ptr, erase_below, H, W)
        _keep(drawn_ptr, at, ERASED, erased, exists)


@triton.jit
def _pack(images_ptr, words_ptr, at, n, C, H, W, PADDING: tl.constexpr):
    """Words of an image with its border: a channel a byte."""
    columns = W + 2 * BORDER
    row = at // columns - BORDER
    column = at - (row + BORDER) * columns - BORDER
    exists = row < H + BORDER
    if PADDING == ZEROS:
        inside = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    else:  # the border pixels outwards
        inside = exists
        row = tl.minimum(tl.maximum(row, 0), H - 1)
        column = tl.minimum(tl.maximum(column, 0), W - 1)
    pixel_ptr = images_ptr + n * C * H * W + row * W + column
    word = tl.zeros_like(at)
    for k in range(C):
        channel_ptr = pixel_ptr + tl.cast(k, tl.int64) * H * W
        word |= tl.load(channel_ptr, mask=inside, other=0).to(tl.int32) << (8 * k)
    tl.store(words_ptr + n * (columns * (H + 2 * BORDER)) + at, word, mask=exists)


@triton.jit(
    do_not_specialize=[
        "seed_low", "seed_high", "step", "first_view", "views", "N", "C", "H", "W", "padding",
        "flip_below", "erase_below", "draws",
    ],
    do_not_specialize_on_alignment=[
        "images_ptr", "words_ptr", "drawn_ptr", "settings_ptr", "seed_ptr", "step_ptr",
        "indices_ptr",
    ],
)  # fmt: skip
def prepare_kernel(
    images_ptr,  # [N, C, H, W] uint8, or None where nothing is packed
    words_ptr,  # [N, H + 4, W + 4]
    drawn_ptr,  # [views · N, WORDS]
    settings_ptr,  # as `settings` has them
    seed_ptr,  # int64, or None for what follows
    step_ptr,  # int64, or None
    indices_ptr,  # [N] int64, or None for 0 to N - 1
    seed_low,  # the bits of a uint32, as the three after it
    seed_high,
    step,
    first_view,
    views,
    N,
    C,
    H,
    W,
    padding,
    flip_below,  # flipped where 24 random bits are below this
    erase_below,
    draws,  # programs that draw; the others pack
    RESIZED: tl.constexpr,
    AFFINE: tl.constexpr,
    JITTERS: tl.constexpr,
    ERASES: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    each = tl.arange(0, BLOCK)
    if program < draws:
        place = program.to(tl.int64) * BLOCK + each
        _draw(
            place, drawn_ptr, settings_ptr, seed_ptr, step_ptr, indices_ptr, seed_low, seed_high,
            step, first_view, N, H, W, padding, flip_below, erase_below,
            RESIZED, AFFINE, JITTERS, ERASES, place < tl.cast(N, tl.int64) * views,
        )  # fmt: skip
    elif images_ptr is not None:
        tiles = tl.cdiv((H + 2 * BORDER) * (W + 2 * BORDER), BLOCK)
        n = (program - draws) // tiles
        tile = program - draws - n * tiles
        _pack(images_ptr, words_ptr, tile * BLOCK + each, n.to(tl.int64), C, H, W, PADDING)


# ---- pixels ----


@triton.jit
def _clamp(x, low, high):
    """nan stays."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reflect(x, size, bits):
    period = (2 * (size - 1)) << bits
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), tl.maximum(period, 1).to(tl.float32))
    times = (x.to(tl.float32) * inverse).to(tl.int32)  # off by one at most
    folded = x - times * period
    folded = tl.where(folded < 0, folded + period, folded)
    folded = tl.where(folded < 0, folded + period, folded)
    folded = tl.where(folded >= period, folded - period, folded)
    return tl.where(period > 0, tl.minimum(folded, period - folded), 0)


@triton.jit
def _whole(x, size, bits, EVEN: tl.constexpr):
    """The nearest whole number; of two that are as near the even one, or the upper."""
    shifted = x + (1 << (bits - 1))
    if EVEN:
        upper = shifted >> bits
        tie = (shifted & ((1 << bits) - 1)) == 0
        return tl.where(tie, upper - (upper & 1), upper)
    else:
        return (shifted + tl.minimum(size, 1 << (bits - FRACTION - 1))) >> bits


@triton.jit
def _snap(x, first, size, bits):
    low, half = first << bits, 1 << (bits - 1)
    high = low + ((size - 1) << bits)
    return tl.where((x >= low - half) & (x <= high + half), _clamp(x, low, high), x)


@triton.jit
def _coordinate(x, first, length, size, bits, F: tl.constexpr):
    """The pixel before a point of the image, or nearest to it, and the weight of the next one."""
    if F.RESIZED:
        x = _snap(x, first, length, bits)
    if F.PADDING == REFLECT:
        x = _reflect(x, size, bits)
    if F.NEAREST:
        return _clamp(_whole(x, size, bits, not F.RESIZED), -BORDER, size), 0
    else:
        if not F.ROUNDS_FIRST:
            x += 1 << (bits - FRACTION - 1)
        rounded = _clamp(x >> (bits - FRACTION), -BORDER * ONE, size * ONE)
        return rounded >> FRACTION, rounded & (ONE - 1)


@triton.jit
def _points(row, column, view_ptr, H, W, F: tl.constexpr):
    """The points of the image that pixels of a view show: column, row, right and low weight."""
    a, b, c = tl.load(view_ptr), tl.load(view_ptr + 1), tl.load(view_ptr + 2)
    d, e, f = tl.load(view_ptr + 3), tl.load(view_ptr + 4), tl.load(view_ptr + 5)
    bits = tl.load(view_ptr + BITS)
    left, top, width, height = 0, 0, 0, 0
    if F.RESIZED:
        left, top = tl.load(view_ptr + CROP), tl.load(view_ptr + (CROP + 1))
        width, height = tl.load(view_ptr + (CROP + 2)), tl.load(view_ptr + (CROP + 3))
    if F.ROUNDS_FIRST:
        c, f = c + (1 << (bits - FRACTION - 1)), f + (1 << (bits - FRACTION - 1))
    x, y = a * column + (b * row + c), d * column + (e * row + f)
    x, right = _coordinate(x, left, width, W, bits, F)
    y, low = _coordinate(y, top, height, H, bits, F)
    return x, y, right, low


@triton.jit
def _near(words_ptr, points, W, F: tl.constexpr):
    """The words of the four neighbours, or of the nearest one."""
    x, y, _, _ = points
    stride = W + 2 * BORDER
    at = words_ptr + BORDER * (stride + 1) + (y * stride + x)
    if F.NEAREST:
        return (tl.load(at),)
    else:
        return tl.load(at), tl.load(at + 1), tl.load(at + stride), tl.load(at + stride + 1)


@triton.jit
def _byte(words, points, channel, F: tl.constexpr):
    """A channel of packed pixels, times 65,536 where it is blended; products and sums are exact."""
    if F.NEAREST:
        return ((words[0] >> (8 * channel)) & 255).to(tl.float32)
    else:
        _, _, right, low = points
        left, high, two = -right + ONE, -low + ONE, 0xFF00FF
        shift = 8 * (channel % 2)  # two channels at a time, 0 and 2 or 1 and 3, in 16 bits each
        upper = ((words[0] >> shift) & two) * left + ((words[1] >> shift) & two) * right
        lower = ((words[2] >> shift) & two) * left + ((words[3] >> shift) & two) * right
        half = 16 * (channel // 2)
        blended = ((upper >> half) & 0xFFFF) * high + ((lower >> half) & 0xFFFF) * low
        return blended.to(tl.float32)


@triton.jit
def _tap(channel_ptr, x, y, H, W, F: tl.constexpr):
    if F.PADDING == ZEROS:
        mask = (x >= 0) & (x < W) & (y >= 0) & (y < H)
        return tl.load(channel_ptr + (y * W + x), mask=mask, other=0).to(tl.float32)
    else:
        x, y = tl.minimum(tl.maximum(x, 0), W - 1), tl.minimum(tl.maximum(y, 0), H - 1)
        return tl.load(channel_ptr + (y * W + x)).to(tl.float32)


@triton.jit
def _sample(channel_ptr, points, H, W, F: tl.constexpr):
    """A channel of pixels that are not packed."""
    x, y, right, low = points
    total = _tap(channel_ptr, x, y, H, W, F)
    if not F.NEAREST:
        unit = 1.0 / (ONE * ONE)
        left, high = -right + ONE, -low + ONE
        total = total * ((left * high).to(tl.float32) * unit)
        weight = (right * high).to(tl.float32) * unit
        total += _tap(channel_ptr, x + 1, y, H, W, F) * weight
        weight = (left * low).to(tl.float32) * unit
        total += _tap(channel_ptr, x, y + 1, H, W, F) * weight
        weight = (right * low).to(tl.float32) * unit
        total += _tap(channel_ptr, x + 1, y + 1, H, W, F) * weight
    return total


@triton.jit
def _channel(image_ptr, points, channel, view_ptr, H, W, F: tl.constexpr):
    """One channel of the points, brightened."""
    factor = tl.load(view_ptr + COLORS).to(tl.float32, bitcast=True) if F.BRIGHTENS else 1.0
    if F.PACKED:
        # a power of two, so that the product with the factor is exact
        unit: tl.constexpr = 1.0 if F.NEAREST else 1.0 / (ONE * ONE)
        value = _byte(_near(image_ptr, points, W, F), points, channel, F)
        value = value * (factor * unit)
        return tl.minimum(value, F.WHITE) if F.BRIGHTENS else value
    else:
        channel_ptr = image_ptr + tl.cast(channel, tl.int64) * H * W
        value = _sample(channel_ptr, points, H, W, F)
        return _clamp(factor * value, 0.0, F.WHITE) if F.BRIGHTENS else value


@triton.jit
def _channels(image_ptr, points, channel, view_ptr, H, W, F: tl.constexpr):
    """All three channels, or else one. The compiler loads each word once."""
    if F.RGB:
        return (
            _channel(image_ptr, points, 0, view_ptr, H, W, F),
            _channel(image_ptr, points, 1, view_ptr, H, W, F),
            _channel(image_ptr, points, 2, view_ptr, H, W, F),
        )
    else:
        return (_channel(image_ptr, points, channel, view_ptr, H, W, F),)


@triton.jit
def _luma(x):
    """Of three channels, or of the only one."""
    return x[0] if len(x) == 1 else x[0] * RED + x[1] * GREEN + x[2] * BLUE


@triton.jit
def _level_sum(gray, mask, F: tl.constexpr):
    """Of whole numbers, so that the order of the sum does not matter."""
    unit: tl.constexpr = LEVELS if F.WHITE == 1 else LEVELS / (F.WHITE + 1)
    offset: tl.constexpr = 1.5 * 2**23 / unit  # adding it leaves the rounded number in the low bits
    if not F.PACKED:  # bytes are between black and white
        gray = tl.minimum(tl.maximum(gray, 0.0), F.WHITE)  # nan is black
    rounded = gray + offset
    levels = rounded.to(tl.int32, bitcast=True) - tl.full([], offset, tl.float32).to(
        tl.int32, bitcast=True
    )
    return tl.sum(tl.where(mask, levels, 0))


@triton.jit
def _mean(level_sum, share):
    return (level_sum.to(tl.float64) * share.to(tl.float64, bitcast=True)).to(tl.float32)


@triton.jit
def _shift_hue(rgb, view_ptr):
    """By how much less than the value a channel is, times the chroma, so without a division."""
    r, g, b = rgb
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    twice, thrice = 2 * chroma, 3 * chroma
    unlike_red = tl.where(value == g, twice + (b - r), 2 * twice + (r - g))
    hue = tl.where(value == r, g - b, unlike_red)
    shifted = ()
    for k in tl.static_range(3):
        turns = tl.load(view_ptr + (TURNS + k)).to(tl.float32, bitcast=True)
        less = twice - tl.abs(tl.abs(hue + turns * chroma) - thrice)
        shifted = shifted + (value - tl.minimum(tl.maximum(less, 0.0), chroma),)
    return shifted


@triton.jit
def _recolor(rgb, mean, view_ptr, F: tl.constexpr):
    """Contrast, saturation and hue of one channel or three."""
    if F.CONTRASTS:
        contrast = tl.load(view_ptr + (COLORS + 1)).to(tl.float32, bitcast=True)
        rest, changed = (1 - contrast) * mean, ()
        for k in tl.static_range(len(rgb)):
            changed = changed + (_clamp(contrast * rgb[k] + rest, 0.0, F.WHITE),)
        rgb = changed
    if F.SATURATES:
        saturation = tl.load(view_ptr + (COLORS + 2)).to(tl.float32, bitcast=True)
        rest, changed = (1 - saturation) * _luma(rgb), ()
        for k in tl.static_range(3):
            changed = changed + (_clamp(saturation * rgb[k] + rest, 0.0, F.WHITE),)
        rgb = changed
    if F.SHIFTS_HUE:
        rgb = _shift_hue(rgb, view_ptr)
    return rgb


@triton.jit
def _store(
    made_ptr, settings_ptr, value, channel, C, row, column, mask, view_ptr, H, W, F: tl.constexpr
):
    """Normalise, erase, and write a channel of a view."""
    if F.NORMALISES:
        scale = tl.load(settings_ptr + 3 * RANGES + channel)
        value = value * scale - tl.load(settings_ptr + 3 * RANGES + C + channel)
    elif F.WHITE != 1:
        value = tl.div_rn(value, tl.full(value.shape, F.WHITE, tl.float32))
    if F.ERASES:
        left, top = tl.load(view_ptr + ERASED), tl.load(view_ptr + (ERASED + 1))
        width, height = tl.load(view_ptr + (ERASED + 2)), tl.load(view_ptr + (ERASED + 3))
        covered = (column >= left) & (column < left + width)
        value = tl.where(covered & (row >= top) & (row < top + height), 0.0, value)
    if F.CHANNELS_LAST:
        where = (row * W + column).to(tl.int64) * C + channel
    else:
        where = row * W + column + tl.cast(channel, tl.int64) * (H * W)
    tl.store(made_ptr + where, value, mask=mask)


@triton.jit
def _pixels(tile, H, W, F: tl.constexpr):
    """Rows and columns of a tile, and which exist."""
    first_row, first_column = 0, 0
    if not F.ONE_TILE:
        across = tl.cdiv(W, F.COLUMNS)
        first_row = tile // across
        first_column = (tile - first_row * across) * F.COLUMNS
    row = first_row * F.ROWS + tl.arange(0, F.ROWS)[:, None]
    column = first_column + tl.arange(0, F.COLUMNS)[None, :]
    if F.FULL:
        mask = tl.full([F.ROWS, F.COLUMNS], True, tl.int1)
    else:
        mask = (row < H) & (column < W)
    return row, column, mask


@triton.jit(
    do_not_specialize=["C", "H", "W", "share"],
    do_not_specialize_on_alignment=["images_ptr", "made_ptr", "drawn_ptr", "settings_ptr"],
)
def views_kernel(
    images_ptr,  # [N, C, H, W], or [N, H + 4, W + 4] of packed ones
    made_ptr,  # [V, N, C, H, W], or [V, N, H, W, C]
    drawn_ptr,  # [V, N, WORDS]
    settings_ptr,  # as `settings` has them
    C,
    H,
    W,
    share,  # of a level in the mean: the bits of a float64
    SUMS: tl.constexpr,  # adds up the levels of the views, for their mean, and makes none
    F: tl.constexpr,  # a Form
):
    place = tl.program_id(0).to(tl.int64)
    size = tl.cast(C, tl.int64) * (H * W)
    view_ptr = drawn_ptr + place * WORDS
    n = tl.load(view_ptr + IMAGE).to(tl.int64)
    if F.PACKED:
        image_ptr = images_ptr + n * ((H + 2 * BORDER) * (W + 2 * BORDER))
    else:
        image_ptr = images_ptr + n * size
    made_ptr += place * size
    tiles = 1 if F.ONE_TILE else tl.cdiv(H, F.ROWS) * tl.cdiv(W, F.COLUMNS)

    sum_ptr = (view_ptr + LEVEL_SUM).to(tl.pointer_type(tl.int64))
    total, mean = tl.zeros([], tl.int64), 0.0
    if F.CONTRASTS and not (F.ONE_TILE or SUMS):
        mean = _mean(tl.load(sum_ptr), share)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row, column, mask = _pixels(tile, H, W, F)
        points = _points(row, column, view_ptr, H, W, F)
        for part in range(1 if F.RGB else C):
            x = _channels(image_ptr, points, part, view_ptr, H, W, F)
            if SUMS or (F.CONTRASTS and F.ONE_TILE):
                levels = _level_sum(_luma(x), mask, F)
                total += levels
                mean = _mean(levels, share)
            if not SUMS:
                x = _recolor(x, mean, view_ptr, F)
                for k in tl.static_range(len(x)):
                    _store(
                        made_ptr, settings_ptr, x[k], k if F.RGB else part, 3 if F.RGB else C,
                        row, column, mask, view_ptr, H, W, F,
                    )  # fmt: skip
    if SUMS:
        tl.atomic_add(sum_ptr, total)


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


def draw_flags(policy: Policy) -> dict[str, object]:
    """What of the first kernel a policy needs."""
    affine = policy._replace(resized_crop=None, interpolation="bilinear", padding_mode="zeros")
    return dict(
        RESIZED=policy.resized_crop is not None,
        AFFINE=affine.turns,
        JITTERS=any((policy.brightness, policy.contrast, policy.saturation, policy.hue)),
        ERASES=policy.erase > 0,
        PADDING=PADDING_MODES.index(policy.padding_mode),
    )


@dataclass(frozen=True)
class Form:
    """What is known of views when the second kernel is compiled."""

    ROWS: int  # of a tile
    COLUMNS: int
    ONE_TILE: bool  # holds a view
    FULL: bool  # every pixel of every tile exists
    PACKED: bool  # images are in words
    WHITE: int
    CHANNELS_LAST: bool
    RGB: bool
    RESIZED: bool
    BRIGHTENS: bool
    CONTRASTS: bool
    SATURATES: bool
    SHIFTS_HUE: bool
    NORMALISES: bool
    ERASES: bool
    NEAREST: bool
    PADDING: int

    @property
    def ROUNDS_FIRST(self) -> bool:
        """Whether what rounds a point can be added once a view: nothing else is done to points."""
        return not (self.NEAREST or self.RESIZED or self.PADDING == REFLECT.value)

    @property
    def warps(self) -> int:
        each = PIXELS if self.PACKED else PIXELS // 2
        return max(1, self.ROWS * self.COLUMNS // (32 * each))


def form(
    policy: Policy, dtype: torch.dtype, C: int, H: int, W: int, channels_last: bool
) -> tuple[Form, int]:
    """The form of views of such images, and how many programs share a view.

    A tile is a whole view, or has 32 of its columns, or more of a view with few rows.
    """
    rows, columns = triton.next_power_of_2(H), triton.next_power_of_2(W)
    if rows * columns > 2 * BLOCK:
        columns = min(columns, max(32, BLOCK // rows))
        rows = min(rows, BLOCK // columns)
        if H % rows and H % rows <= rows // 2:  # the last tiles would be half empty
            rows //= 2
    tiles = triton.cdiv(H, rows) * triton.cdiv(W, columns)
    programs = triton.cdiv(tiles, TILES) if tiles > TILES else tiles
    made = Form(
        ROWS=rows,
        COLUMNS=columns,
        ONE_TILE=tiles == 1,
        FULL=H % rows == 0 and W % columns == 0,
        PACKED=dtype == torch.uint8 and C <= 4,
        WHITE=reference.WHITE.get(dtype, 1),
        CHANNELS_LAST=channels_last,
        RGB=C == 3,
        RESIZED=policy.resized_crop is not None,
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
    return made, min(programs, MOST_PROGRAMS)


def signed(word: int) -> int:
    """The bits of a uint32 as an int32."""
    return word - 2**32 if word >= 2**31 else word


def launch(images, made, policy, seed, step, views, indices, channels_last):
    """Writes the views into `made`, in a launch for each stretch of consecutive views, and one."""
    N, C, H, W = images.shape
    settled, device = Policy.unpack(policy), images.device
    shape, programs = form(settled, images.dtype, C, H, W, channels_last)
    white, packed = shape.WHITE, shape.PACKED
    levels = reference.level_unit(white) * H * W
    (share,) = struct.unpack("<q", struct.pack("<d", 1 / levels))
    numbers = kept(("augment", white, *policy), device, "policy", lambda: settings(settled, white))
    there = [x if on_device(x, device) else None for x in (seed, step)]
    seed, step = (x.item() if at is None else 0 for x, at in zip((seed, step), there, strict=True))
    border = 2 * BORDER.value
    words = images.new_empty((N, H + border, W + border), dtype=torch.int32) if packed else None
    drawn = images.new_empty((len(views) * N, WORDS.value), dtype=torch.int32)
    guard = torch.cuda.device(device) if images.is_cuda else contextlib.nullcontext()
    first = 0
    with guard:
        for run in runs(views):
            draws = triton.cdiv(N * len(run), PREPARED)
            packs = N * triton.cdiv(words[0].numel(), PREPARED) if packed and not first else 0
            prepare_kernel[(draws + packs,)](
                images if packed else None,
                words,
                drawn[first * N :],
                numbers,
                *there,
                indices,
                signed(seed & 0xFFFFFFFF),
                seed >> 32,
                signed(step),
                signed(run.start),
                len(run),
                N,
                C,
                H,
                W,
                settled.crop_padding,
                math.ceil(settled.flip * 2**24),
                math.ceil(settled.erase * 2**24),
                draws,
                BLOCK=PREPARED,
                **draw_flags(settled),
                num_warps=PREPARED // 32,
                enable_fp_fusion=False,  # every operation is rounded by itself
            )
            first += len(run)
        for sums in (True, False) if shape.CONTRASTS and not shape.ONE_TILE else (False,):
            views_kernel[(N * len(views), programs)](
                words if packed else images,
                made,
                drawn,
                numbers,
                C,
                H,
                W,
                share,
                SUMS=sums,
                F=shape,
                num_warps=shape.warps,
                enable_fp_fusion=False,
            )


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
