"""How many operators a step calls, each of which is a kernel or a copy on a GPU."""

import torch
from torch import nn

from benchmarks.scale import Operators
from bld_ext import BLDOptimizer, MultiHead, SeededAugment


def network(norms):
    layers = []
    for _ in range(norms):
        layers += [nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()]
    model = MultiHead(nn.Sequential(*layers, nn.Flatten()), 48)
    for _ in range(3):
        model.add_head(2)
    return model


def calls_of_a_step(norms, views=4, **options):
    torch.manual_seed(0)
    augment = SeededAugment(crop_padding=1)
    optimizer = BLDOptimizer(network(norms), views=views, augment=augment, **options)
    images, labels = torch.randint(256, (4, 3, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    for _ in range(3):
        optimizer.step(images, labels)
    with Operators() as recorder:
        optimizer.step(images, labels)
    return recorder.calls


ONE_PASS = {"views_per_pass": 4, "schedule": "shared_forward"}


def test_a_step_without_layers():
    """Three heads in one product; the rest is the method's."""
    calls = calls_of_a_step(0, **ONE_PASS)
    assert calls["bld_ext.warm_up_loss.default"] == 1 and calls["bld_ext.joint_loss.default"] == 2
    assert calls["bld_ext.augment.default"] == 3
    assert calls["bld_ext.balance_layers_.default"] == 2
    assert calls["bld_ext.layer_norms.default"] == 2  # of G_w, and of G in the first repetition
    assert sum(calls.values()) <= 110  # 102 with torch 2.14


def test_a_layer_with_batch_norm():
    """Forward and backward of two modules, gradients that add up, updates, running statistics."""
    few, many = (sum(calls_of_a_step(norms, **ONE_PASS).values()) for norms in (2, 12))
    assert (many - few) / 10 <= 32  # 31


def test_another_pass_of_each_stage():
    """Five forward and backward passes of two layers and three heads."""
    few, many = (sum(calls_of_a_step(2, views).values()) for views in (2, 6))
    assert (many - few) / 4 <= 210  # 199
