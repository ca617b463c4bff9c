"""The variants of BLD that the benchmarks try: each does what its docstring says."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from arrange import arranged

from benchmarks import why  # registers the schedule "watched"
from benchmarks.paper.experiment import run
from benchmarks.paper.methods import PRESETS, make_learner
from benchmarks.paper.streams import load_dataset
from benchmarks.paper.variants import (
    VARIANTS,
    Elsewhere,
    added,
    inner_products,
    puzzled,
    turned,
)
from bld_ext import BLDOptimizer, SeededAugment
from bld_ext.api.layers import Layers
from bld_ext.api.schedules import SCHEDULES

AUGMENT = SeededAugment(crop_padding=1, dtype=torch.float64)


@pytest.fixture
def gradients(make_model):
    """Layers of a model, and random gradients of an old and a new loss."""
    model = make_model(heads=(2, 3))
    params = dict(model.named_parameters())
    layers = Layers.of(model, params.values(), "module")
    torch.manual_seed(0)
    old = {p: torch.randn_like(p) for n, p in params.items() if not n.startswith("heads.1")}
    new = {p: torch.randn_like(p) for n, p in params.items() if not n.startswith("heads.0")}
    return layers, old, new


def test_projection_leaves_nothing_against_the_old_gradient(gradients):
    layers, old, new = gradients
    before = inner_products(layers, old, new)
    assert (before < 0).any() and (before > 0).any()
    found = VARIANTS["projected-alone"].combine(layers, old, new)
    after = inner_products(layers, old, found)
    torch.testing.assert_close(after, before.clamp(min=0), rtol=1e-4, atol=1e-3)
    both = VARIANTS["projected"].combine(layers, old, new)
    expected = added(found, old)
    assert both.keys() == expected.keys()
    assert all(torch.equal(both[p], expected[p]) for p in both)


def test_a_gate_is_open_where_both_agree(gradients):
    layers, old, new = gradients
    dots = inner_products(layers, old, new)
    found = VARIANTS["gated"].combine(layers, old, new)
    for param, l in layers.index.items():
        if param in old and param in new:
            expected = new[param] + (old[param] if dots[l] >= 0 else 0)
            torch.testing.assert_close(found[param], expected)


def optimizers(make_model, schedule, **options):
    model = make_model(heads=(2, 3), dtype=torch.float64)
    for name in (schedule, "two_forward"):
        yield arranged(
            copy.deepcopy(model), 0.05, views=4, views_per_pass=2, augment=AUGMENT, seed=1,
            schedule=name, **options,
        )  # fmt: skip


def test_a_step_that_is_watched_is_bld_s(make_model, make_batch):
    watched, plain = optimizers(make_model, "watched")
    why.watched.seen = []
    for number in range(3):
        batch = make_batch(3, number, dtype=torch.float64)
        for optimizer in (watched, plain):
            optimizer.step(*batch)
    for found, expected in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    first = why.watched.seen[4]  # of the third batch
    why.watched.seen = None
    dot, new = (torch.tensor(first[name], dtype=torch.float64) for name in ("dot", "new"))
    found = 1 + dot / new
    torch.testing.assert_close(found, watched.last.new_share, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("name", ["features", "features-and-logits"])
def test_features_are_distilled_to_lambda_times_the_new_norm(name, make_model, make_batch):
    optimizer, _ = optimizers(make_model, name, balance=2.0)
    batch = make_batch(3, 0, dtype=torch.float64)
    optimizer.warm_up(*batch)
    schedule, found = VARIANTS[name], []
    combine = type(schedule).combine
    schedule.combine = lambda *a: found.append(a) or combine(schedule, *a)
    try:
        optimizer.joint(*batch)
    finally:
        del schedule.combine
    (layers, old, _) = found[0]
    norms = inner_products(layers, old, old).sqrt()
    wanted = 2 * optimizer.last.reference_norms.double()
    backbone = [i for i, n in enumerate(layers.names) if n.startswith("backbone")]
    assert backbone and (wanted[backbone] > 0).all()
    if name == "features":
        torch.testing.assert_close(norms[backbone], wanted[backbone])
    else:  # the mean of two gradients of that length
        assert (norms[backbone] <= wanted[backbone] * (1 + 1e-9)).all()
        assert (norms[backbone] > 0).all()


def test_what_is_distilled_elsewhere(make_model, make_batch):
    """Without a change it is BLD; with one, G_d is that of the others and G_w that of the views."""
    for change in (lambda views, generator: views, turned):
        SCHEDULES["elsewhere"] = Elsewhere(change)
        try:
            elsewhere, plain = optimizers(make_model, "elsewhere")
            batch = make_batch(3, 0, dtype=torch.float64)
            for optimizer in (elsewhere, plain):
                optimizer.step(*batch)
        finally:
            del SCHEDULES["elsewhere"]
        found, expected = (torch.stack([*o.last.distillation_loss]) for o in (elsewhere, plain))
        norms = elsewhere.last.reference_norms, plain.last.reference_norms
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
        assert torch.allclose(found, expected, rtol=1e-10) == (change is not turned)


@pytest.mark.parametrize("change", [turned, puzzled])
def test_other_images_are_made_of_the_same_pixels(change):
    images = torch.arange(5 * 3 * 8 * 8.0).view(5, 3, 8, 8)
    seen = set()
    for seed in range(40):
        made = change(images, torch.Generator().manual_seed(seed))
        again = change(images, torch.Generator().manual_seed(seed))
        assert torch.equal(made, again) and not torch.equal(made, images)
        assert made.shape == images.shape and set(made.unique().tolist()) <= {*range(960)}
        assert ((made[:, 1:] - made[:, :-1]) == 64).all()  # channels stay together
        seen.add(tuple(made[0, 0, 0].tolist()))
    assert len(seen) == 6 if change is turned else len(seen) > 20


def test_gradients_that_processes_do_not_add_up_are_refused(monkeypatch):
    monkeypatch.setattr(BLDOptimizer, "views_here", range(0, 12, 2))
    with pytest.raises(ValueError, match="^method: turned .* in one process"):
        make_learner("turned", PRESETS["digits"], 0)
    make_learner("bld", PRESETS["digits"], 0)


def test_ranking_does_not_mind_an_offset():
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([-2.0, -1.0, 1.0, 2.0])  # z_1 - z_0
    for offset, accuracy in ((0, 100), (1.5, 75), (9, 50)):
        shifted = logits + offset
        margins = torch.where(labels == 1, shifted, -shifted)
        found = why.summary([margins], [labels])
        assert found["accuracy"] == [accuracy] and found["ranking"] == [100]
    assert why.ranking(torch.where(labels == 1, -logits, logits), labels) == 0
    assert math.isnan(why.ranking(torch.ones(3), torch.tensor([0, 1, 2])))


def test_a_run_is_followed_to_where_it_ends_unwatched(tmp_path, capsys):
    """Watching changes nothing but the last digits; a table and a picture come of it."""
    options = "--seeds 0 --methods finetune,bld --limit 40 --every 2".split()
    assert why.main([*options, "--out", str(tmp_path)]) == 0
    *_, first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("| bld ") and second.startswith("| bld ")
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    records = json.loads((tmp_path / "why.json").read_text())["runs"]
    settings = replace(PRESETS["digits"], limit=40)
    for record in records:
        plain = run(load_dataset("digits"), record["method"], settings, seed=0)
        assert record["accuracy"][0] == plain["accuracy"][0]  # before anything is watched
        assert record["accuracy"][-1] == pytest.approx(plain["accuracy"][-1], abs=3)
        batches = record["batches"]
        assert [b["task"] for b in batches] == [1, 2, 3, 4] and len(batches[0]["held"]) == 3
    divergence = [b["divergence"] for b in records[1]["batches"]]
    assert all(before < after for before, after, _ in divergence)
