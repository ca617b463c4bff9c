"""The contact sheet: views that are made again are the same, and it would show if they were not."""

import pytest
import torch
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
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = tmp_path / "sheet.png"
    options = ["--dataset", str(tmp_path), "--size", "16", "--views", "1", "--out", str(path)]
    assert views.main(options) == 0
    assert path.stat().st_size > 0
    assert "broken.png is left out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_no_images(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=f"^--dataset: expected .* got .*{name}$"):
        views.main(["--dataset", str(tmp_path / name)])


@pytest.mark.parametrize("option", ["--images", "--views", "--size"])
def test_bad_number(option, capsys):
    with pytest.raises(SystemExit):
        views.main([option, "0"])
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err


def test_another_picture_fails_the_command(tmp_path):
    right = SeededAugment(rotation=15)

    def forgetful(images, views, **coordinates):  # as if the view were drawn from its position
        return right(images, views=range(len(views)), **coordinates)

    options = ["--images", "1", "--views", "2", "--out", str(tmp_path / "sheet.png")]
    assert views.main(options, augment=forgetful) == 1
