"""The segmentation benchmark: its pictures, its metric, and that BLD runs in it as by hand."""

import json

import pytest
import torch

from benchmarks import segmentation
from bld_ext import MultiHead


@pytest.mark.parametrize("task", [0, 1])
def test_pictures_show_what_their_masks_say(task):
    images, masks = segmentation.make_images(task, 40, torch.Generator().manual_seed(0))
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8
    assert set(masks.unique().tolist()) == {0, 1, 2, segmentation.RIM}
    found = [(masks == label).float().mean() for label in (0, 1, 2, segmentation.RIM)]
    assert 0.5 < found[0] < 0.9 and all(0.01 < share < 0.3 for share in found[1:])
    again, _ = segmentation.make_images(task, 40, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


def test_shapes_have_their_areas():
    places = torch.arange(64) - 31.5
    areas = {
        kind: segmentation.inside(kind, places, places.unsqueeze(1), torch.tensor(20.0)).sum()
        for kind in ("disc", "ring", "square", "cross")
    }
    assert areas["disc"] == pytest.approx(torch.pi * 400, rel=0.02)
    assert areas["square"] == pytest.approx(36**2, rel=0.02)
    assert areas["ring"] == pytest.approx(torch.pi * (400 - 121), rel=0.02)
    assert areas["cross"] == pytest.approx(2 * 40 * 12 - 12**2, rel=0.05)


class Says(MultiHead):
    """Predicts what it is told."""

    def __init__(self, answer):
        super().__init__(torch.nn.Identity(), 1)
        self.answer = answer

    def predict(self, images, task=None):
        part, self.answer = self.answer.split((len(images), len(self.answer) - len(images)))
        return part


def test_mean_iou_is_that_of_the_definition():
    masks = torch.tensor([[[0, 0, 1], [1, 2, 255]]])
    found = torch.tensor([[[0, 1, 1], [1, 2, 0]]])
    # class 0: 1 of 2 pixels, class 1: 2 of 3, class 2: 1 of 1; the rim does not count
    expected = (1 / 2 + 2 / 3 + 1) / 3
    images = torch.zeros(1, 3, 2, 3, dtype=torch.uint8)
    assert segmentation.mean_iou(Says(found), images, masks, 0) == pytest.approx(expected)
    assert segmentation.mean_iou(Says(masks.clamp(max=2)), images, masks, 0) == 1


def test_the_command_writes_results_and_a_picture(tmp_path, capsys):
    small = ["--images", "20", "--views", "2", "--seeds", "0", "--out", str(tmp_path)]
    assert segmentation.main(small) == 0
    printed = capsys.readouterr().out
    assert "| finetuning |" in printed and "| BLD " in printed
    found = json.loads((tmp_path / "results.json").read_text())
    for record in (*found["records"]["BLD"], *found["records"]["finetuning"]):
        (first,), (old, new) = record["iou"]
        assert all(0 < x < 1 for x in (first, old, new))
    # the first task is the same, as there is nothing to distil yet
    assert found["records"]["BLD"][0]["iou"][0] == found["records"]["finetuning"][0]["iou"][0]
    assert found["records"]["BLD"][0]["iou"][1] != found["records"]["finetuning"][0]["iou"][1]
    assert (tmp_path / "segmentation.png").stat().st_size > 10_000


def test_an_output_that_is_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert segmentation.main(["--images", "1", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
