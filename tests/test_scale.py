"""The model of scale: what is counted, and what follows from it."""

import pytest
from torch import nn

from benchmarks.scale import GPUS, H100, LINKS, NETWORKS, Link, Load, load_of, main, predictions


def test_resnet18_is_counted():
    """11.2 million parameters of four bytes, five times, and its operations."""
    load = load_of(*NETWORKS["ResNet18 at 32×32"])
    assert load.gradient == 4 * 11_176_512
    assert sum(load.reductions()) - load.statistics == 5 * load.gradient
    assert load.flops == pytest.approx(0.074e9, rel=0.02)


def test_operators_are_those_that_compute():
    """A product with a bias forward; a gradient of weight and of bias, and of the sum, backward."""
    load = load_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), 4)
    assert load.operators[0] == 2 and 2 <= load.operators[1] <= 5  # and the sum
    assert load.flops == 2 * 48 * 2 and load.statistics == 0


def test_a_gpu_alone_sends_nothing():
    load = Load(flops=1e9, operators=(1, 1), gradient=10**9, statistics=0)
    for seconds in predictions(load).values():
        assert seconds[1] == load.seconds(H100, 50)
        assert [*seconds] == [*GPUS]


def test_a_reduction_sends_twice_what_others_have():
    link = Link(bandwidth=1e9, latency=1e-3)
    assert link.seconds(10**9, 2) == pytest.approx(1 + 2e-3)
    assert link.seconds(10**9, 4) == pytest.approx(1.5 + 4e-3)


def test_the_table_is_printed(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("sys.argv", ["benchmarks.scale"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*NETWORKS, *LINKS]) and shown.count("| 50 |") == 2
