"""Options of BLDOptimizer together, as Hypothesis draws them, with errors, resuming and copies.

BLD_EXT_HYPOTHESIS=N tries N other runs.
"""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import (
    BASES,
    SCHEDULES,
    Failure,
    batch,
    everything,
    hand_over,
    learn,
    let_go,
    make,
    set_up_failure,
    world,
)
from test_hypothesis import EXAMPLES, examples

pytestmark = [
    pytest.mark.usefixtures("surroundings", "one_thread"),
    pytest.mark.filterwarnings("ignore:BLDOptimizer. .* keeps state"),
]
runs = examples if EXAMPLES else settings(examples, max_examples=60)
FUSED = {"fused-momentum": partial(torch.optim.SGD, momentum=0.9, fused=True)}
switch = st.booleans()


@st.composite
def options(draw):
    schedule, views = draw(st.sampled_from(SCHEDULES)), draw(st.integers(1, 4))
    found = {
        "schedule": schedule,
        "views": views,
        "views_per_pass": draw(st.sampled_from([1, 2, views, "auto", "5 kB", "11 kB"])),
        "channels_last": draw(st.sampled_from([None, True, False])),
        "statistics": draw(st.sampled_from(["once", "every_pass"])),
        "layer": draw(st.sampled_from(["module", "tensor", "network"])),
        "precision": draw(st.sampled_from(["fp32", "mixed"])),
        "joint_steps": draw(st.integers(0, 2)),
        "balance": draw(st.sampled_from([0.0, 0.5, 1.0, None])),
        "dropout": draw(st.sampled_from([0.0, 0.3])),
        "base": (BASES | FUSED)[draw(st.sampled_from([*BASES, *FUSED]))],
        "heads": draw(st.sampled_from([(2,), (2, 2), (2, 3, 2)])),
    }
    return found


@runs
@given(st.data())
def test_errors_are_undone_and_a_run_that_resumes_goes_on_as_its_copies_do(data):
    draw = data.draw
    chosen, frozen = draw(options()), draw(st.sampled_from([None, 0, 1, 2]))

    def fresh(**others):
        optimizer = make(check_finite=True, **chosen | others)
        if frozen is not None:
            [*optimizer.model.parameters()][frozen].requires_grad_(False)
        return optimizer

    optimizer, twin = fresh(), fresh()
    new_task = draw(st.sampled_from([(), (1,)]))
    for each in (optimizer, twin):
        learn(each, [0, 1], new_task)
    if draw(switch):
        chosen["channels_last"] = not chosen["channels_last"]
        layout = torch.channels_last if chosen["channels_last"] else torch.contiguous_format
        for each in (optimizer, twin):
            each.model.to(memory_format=layout)
            each._format.possible = chosen["channels_last"]

    places = ["forward", "base", "augment", *(["backward"] if frozen != 0 else [])]
    where = draw(st.sampled_from(places))
    error = draw(st.sampled_from([Failure, KeyboardInterrupt, RuntimeError]))
    before = world(optimizer), everything(optimizer)
    hook = set_up_failure(optimizer, where, draw(st.integers(0, 12)), error)
    raised, gone = let_go(optimizer.step, error, 9, 5)
    hook.remove()
    assert gone == [True, True]
    if raised:
        assert (world(optimizer), everything(optimizer)) == before
    else:
        twin.step(*batch(9, size=5))

    resumed = fresh()
    for number in new_task:
        torch.manual_seed(number)
        resumed.model.add_head(2)
    hand_over((optimizer.model, resumed.model), (optimizer, resumed))
    losses = [learn(each, [5, 6]) for each in (optimizer, twin, resumed)]
    assert losses[1:] == losses[:1] * 2
    assert everything(twin) == everything(resumed) == everything(optimizer)
    again = copy.deepcopy(optimizer)
    assert learn(again, [7]) == learn(optimizer, [7])
    assert everything(again) == everything(optimizer)
