"""The contact sheet: views that are made again are the same, and it would show if they were not."""

import errno
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image, write_png

from benchmarks import views
from bld_ext import SeededAugment


def test_digits(tmp_path, capsys):
    path = tmp_path / "new" / "sheet.png"
    assert views.main(["--images", "2", "--views", "3", "--out", str(path)]) == 0
    assert decode_image(str(path)).float().std() > 0
    assert "difference=0\n" in capsys.readouterr().out


def test_folder(tmp_path, capsys):
    for i, shape in enumerate([(3, 20, 31), (1, 40, 25)]):
        write_png(torch.randint(256, shape, dtype=torch.uint8), str(tmp_path / f"{i}.png"))
    whole = (tmp_path / "0.png").read_bytes()
    for name, data in (("broken", b"no picture"), ("cut", whole[:500]), ("none", b"")):
        (tmp_path / f"{name}.png").write_bytes(data)
    path = tmp_path / "sheet.png"
    options = ["--dataset", str(tmp_path), "--size", "16", "--views", "1", "--out", str(path)]
    assert views.main(options) == 0
    assert path.stat().st_size > 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for name, line in zip(("broken", "cut", "none"), lines, strict=True):
        assert line.startswith(f"{tmp_path / name}.png is left out: ")


# ---- images of every kind ----


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(values, depth, colour=0):
    """A PNG file of `depth` bits a channel; values: [H, W], or [H, W, C] of 8 or 16 bits."""
    height, width = values.shape[:2]
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


GRAY, COLOUR, GRAY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6  # as PNG numbers them
CHANNELS = {GRAY: 1, COLOUR: 3, GRAY_ALPHA: 2, COLOUR_ALPHA: 4}
DEPTHS = [(GRAY, depth) for depth in (1, 2, 4)]  # of the others, PNG has 8 and 16 bits
DEPTHS += [(colour, depth) for colour in CHANNELS for depth in (8, 16)]


@pytest.mark.parametrize("colour, depth", DEPTHS)
def test_a_png_of_any_depth_is_taken_in_its_whole_range(colour, depth, tmp_path):
    channels = CHANNELS[colour]
    most = 2**depth - 1
    values = np.linspace(0, most, 20 * 24 * channels).round().reshape(20, 24, channels)
    (tmp_path / "a.png").write_bytes(
        png(values.squeeze(-1) if channels == 1 else values, depth, colour)
    )
    image, transparent = views.decode(tmp_path / "a.png")
    assert image.shape == (3, 20, 24) and image.dtype == torch.uint8
    assert transparent == (channels in (2, 4))
    expected = torch.from_numpy(values[..., :3] if channels > 2 else values[..., :1])
    wrong = image - expected.permute(2, 0, 1) * (255 / most)
    assert wrong.abs().max() <= 1


def test_a_sheet_of_16_bits(tmp_path, capsys):
    values = (np.arange(48 * 40) * 30).reshape(40, 48)
    (tmp_path / "a.png").write_bytes(png(values, 16))
    options = ["--dataset", str(tmp_path), "--views", "1", "--out", str(tmp_path / "sheet.pdf")]
    assert views.main(options) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "16-bit"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation, kind, tmp_path):
    upright = np.zeros((16, 24), np.uint8)
    upright[:8, :8], upright[8:, 16:] = 250, 120  # a corner, and another one less bright
    stored = {  # how a camera stores it that asks for this orientation
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = stored.astype(np.uint16) * 257 if kind == "16-bit" else stored
    file = tmp_path / f"a.{'png' if kind == '16-bit' else kind}"
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, exif=exif)
    image, _ = views.decode(file)
    assert image.shape == (3, 16, 24)
    assert (image[0].float() - torch.from_numpy(upright).float()).abs().mean() < 3


def test_transparency_is_dropped_with_a_word(tmp_path, capsys):
    plain = Image.fromarray(np.full((20, 20, 3), 90, np.uint8))
    plain.save(tmp_path / "0.png")
    plain.convert("RGBA").save(tmp_path / "1.png")
    plain.convert("LA").save(tmp_path / "2.png")
    plain.quantize(2).save(tmp_path / "3.png", transparency=b"\0\x80")
    plain.save(tmp_path / "4.png", transparency=(90, 90, 90))
    plain.convert("CMYK").save(tmp_path / "5.jpg")
    options = ["--dataset", str(tmp_path), "--images", "6", "--views", "1"]
    assert views.main([*options, "--out", str(tmp_path / "sheet.svg")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{tmp_path / str(i)}.png: its transparency is left out" for i in range(1, 5)]
    for file in tmp_path.glob("?.*"):
        assert (views.decode(file)[0].float() - 90).abs().max() <= 2


# ---- what is refused ----


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_no_images(tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    options = ["--dataset", str(tmp_path / name), "--out", str(tmp_path / "sheet.png")]
    assert views.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --dataset: expected ") and line.endswith(f"/{name}")


@pytest.mark.parametrize("option", ["--images", "--views", "--size"])
def test_bad_number(option, capsys):
    with pytest.raises(SystemExit):
        views.main([option, "0"])
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v.xyz", "v", "v.", "v.XYZ", "folder.png"])
def test_an_output_that_no_writer_knows_is_refused_before_any_work(
    name, tmp_path, capsys, monkeypatch
):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(views, "digits", lambda *_: 1 / 0)
    assert views.main(["--out", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out: ") and str(tmp_path / name) in line and "give " in line
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


def test_an_output_that_cannot_be_written_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    options = ["--images", "1", "--views", "1", "--out", str(tmp_path / "file" / "v.png")]
    assert views.main(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(tmp_path / "file") in line


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_the_sheet_does_not_depend_on_where_is_printed_to(number, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys.stdout, "write", fail)
    path = tmp_path / "sheet.JPG"
    options = ["--images", "1", "--views", "1", "--out", str(path)]
    assert views.main(options) == (0 if number == errno.EPIPE else 2)
    assert path.stat().st_size > 0
    said = capsys.readouterr().err
    assert said == "" if number == errno.EPIPE else said.startswith("error: stdout: ")


def test_another_picture_fails_the_command(tmp_path):
    right = SeededAugment(rotation=15)

    def forgetful(images, views, **coordinates):  # as if the view were drawn from its position
        return right(images, views=range(len(views)), **coordinates)

    options = ["--images", "1", "--views", "2", "--out", str(tmp_path / "sheet.png")]
    assert views.main(options, augment=forgetful) == 1
