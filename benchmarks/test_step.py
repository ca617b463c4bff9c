"""Times a whole step beside plain PyTorch, and beside the forward and backward passes in it.

Run it with `pytest benchmarks/test_step.py --benchmark-enable`; the most important rows come first.

- A "straight line" is the paper's two algorithms as one would write them in PyTorch: one pass for
  each view, one softmax for each head, a Python loop over the layers' norms, and views drawn by
  torchvision or kornia from a seed that is set again in each stage.
- The floor is the network's bare forward and backward passes, as many as the schedule has, with the
  number of views in a pass and the memory format that are fastest.

On a CPU the setting is the digits preset; on a GPU it is ResNet18 at 32×32, 20 images, 50 views.
"Views a second" counts V · B views for each step. Times are the minimum over all rounds, and bare
passes alternate with each row, because other work on a shared machine only ever adds time.
"""

import functools
import time

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from benchmarks import measure
from benchmarks.paper.networks import make_model
from bld_ext import BLDOptimizer, SeededAugment
from bld_ext.api.precision import exact_float32

ON_GPU = measure.DEVICE.type == "cuda"
NETWORK, SIZE, VIEWS = ("resnet18", 32, 50) if ON_GPU else ("slim", 8, 12)
if measure.SMALLEST:
    VIEWS = 2
PADDING, ROTATION, JITTER = SIZE // 8, 15, 0.2
BATCH, HEADS, LR, TEMPERATURE, BALANCE = 20, 3, 1e-4, 2.0, 2.0
AUGMENT = SeededAugment(crop_padding=PADDING, rotation=ROTATION, jitter=JITTER)
PASSES = {  # forward and backward passes of all views in a step
    "two_forward": (5, 5),
    "shared_forward": (3, 5),
    "in_backward": (5, 5),
}
LAST = torch.channels_last
ALL = dict(views_per_pass=VIEWS)
SHARED = dict(views_per_pass=VIEWS, schedule="shared_forward")
ON_A_GPU = {  # steps replayed as a CUDA graph
    "shared_forward, captured": SHARED | dict(capture=True),
    "shared_forward, mixed, captured": SHARED | dict(capture=True, precision="mixed"),
}
MORE_ON_A_GPU = {
    "shared_forward, channels last, captured": SHARED | dict(capture=True, layout=LAST),
    "shared_forward, mixed, channels last, captured": SHARED
    | dict(capture=True, layout=LAST, precision="mixed"),
    "two_forward, captured": ALL | dict(capture=True),
}
SETTINGS = {  # options beside the paper's defaults; None: the row does not use BLDOptimizer
    "straight line, torchvision-batch": None,
    "defaults": {},
    "shared_forward": SHARED,
    **(ON_A_GPU if ON_GPU else {}),
    "bare passes": None,
    "ours": dict(views_per_pass="auto", schedule="shared_forward", capture=ON_GPU),
    "two_forward": ALL,
    "two_forward, mixed": ALL | dict(precision="mixed"),
    "shared_forward, a view a pass": dict(schedule="shared_forward"),
    "two_forward, 4 views a pass": dict(views_per_pass=4),
    "two_forward, weights in channels last": ALL | dict(layout=LAST),
    "in_backward": ALL | dict(schedule="in_backward"),
    **(MORE_ON_A_GPU if ON_GPU else {}),
    "straight line, kornia": None,
    "straight line, torchvision-image": None,
}


def model():
    torch.manual_seed(0)
    made = make_model(NETWORK)
    for _ in range(HEADS):
        made.add_head(2)
    return made.to(measure.DEVICE, memory_format=torch.contiguous_format)


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(2, (BATCH,), generator=generator)
    return images.to(measure.DEVICE), labels.to(measure.DEVICE)


@functools.cache
def policy(way):
    if way == "kornia":
        import kornia.augmentation as K

        return K.AugmentationSequential(
            K.RandomCrop((SIZE, SIZE), padding=PADDING),
            K.RandomRotation(ROTATION, p=1.0),
            K.ColorJitter(JITTER, JITTER, JITTER, JITTER / 4, p=1.0),
            data_keys=["input"],
        ).to(measure.DEVICE)
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomCrop(SIZE, padding=PADDING),
            v2.RandomRotation(ROTATION, interpolation=bilinear),
            v2.ColorJitter(JITTER, JITTER, JITTER, JITTER / 4),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def view_of(images, way, v):
    """Return view v, which is the same each time."""
    torch.manual_seed(v)
    if way == "kornia":
        return policy(way)(images.float() / 255)
    if way == "torchvision-image":
        return torch.stack([policy(way)(image) for image in images])
    return policy(way)(images)


def straight_line(network, way):
    """Return a step of Algorithms 1 and 2, as one would write it in PyTorch."""
    params = list(network.parameters())
    layers = [m for m in network.modules() if next(m.parameters(recurse=False), None) is not None]
    sizes = list(network.head_sizes)

    def norm(module, grads):
        return sum(grads[p].square().sum() for p in module.parameters(recurse=False)).sqrt()

    def gradient(loss_of_view):
        grads = {p: torch.zeros_like(p) for p in params}
        for v in range(VIEWS):
            loss = loss_of_view(v) / VIEWS
            found = torch.autograd.grad(loss, params, allow_unused=True)
            for p, grad in zip(params, found, strict=True):
                if grad is not None:
                    grads[p] += grad
        return grads

    @torch.no_grad()
    def update(grads, lr):
        for p in params:
            p -= lr * grads[p]

    def step(images, labels):
        bank = []

        def heads(v):
            return network(view_of(images, way, v)).split(sizes, 1)

        def warm_up(v):
            *old, new = heads(v)
            bank.append([(z / TEMPERATURE).softmax(1).detach() for z in old])
            return F.cross_entropy(new, labels, reduction="sum")

        def new_task(v):
            return F.cross_entropy(heads(v)[-1], labels, reduction="sum")

        def distillation(v):
            *old, _ = heads(v)
            return sum(
                -(target * (z / TEMPERATURE).log_softmax(1)).sum()
                for z, target in zip(old, bank[v], strict=True)
            )

        warm = gradient(warm_up)
        norms = [norm(layer, warm) for layer in layers]
        update(warm, LR / 100)
        for _ in range(2):
            distilled = gradient(distillation)
            for layer, reference in zip(layers, norms, strict=True):
                size = norm(layer, distilled).item()
                if size > 0:
                    for p in layer.parameters(recurse=False):
                        distilled[p] *= BALANCE * reference.item() / size
            new = gradient(new_task)
            update({p: distilled[p] + new[p] for p in params}, LR)

    return step


def wait():
    if ON_GPU:
        torch.cuda.synchronize()


def least(call, rounds=20):
    """Return the seconds of the fastest of `rounds` calls."""
    call()
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def bare_passes(count, layout):
    """Return functions that run a forward pass of `count` views, with 0, 1 or 2 backward passes."""
    network = model().train().to(memory_format=layout)
    shape = (BATCH * count, 3, SIZE, SIZE)
    images = torch.rand(shape, device=measure.DEVICE).contiguous(memory_format=layout)

    def forward():
        network(images)

    def both():
        network(images).sum().backward()

    def twice():
        out = network(images).sum()
        out.backward(retain_graph=True)
        out.backward()

    return forward, both, twice


LAYOUTS = (torch.contiguous_format, LAST)
SIZES = (VIEWS,) if measure.SMALLEST else tuple(dict.fromkeys((1, 4, 12, VIEWS)))


@functools.cache
def best():
    """Return the number of views and the layout with which the bare passes are fastest."""
    with exact_float32():
        cost = {
            (count, layout): least(bare_passes(count, layout)[1]) / count
            for count in SIZES
            for layout in LAYOUTS
        }
    return min(cost, key=cost.get)


class Floor:
    """The bare passes, timed in turns with the row that is compared with them."""

    def __init__(self):
        self.count, layout = best()
        self.calls = bare_passes(self.count, layout)[:2]
        self.seconds = [float("inf")] * 2

    def time(self):
        with exact_float32():
            found = [least(call, rounds=2) for call in self.calls]
        self.seconds = [min(pair) for pair in zip(self.seconds, found, strict=True)]

    def of(self, schedule):
        """Return the seconds of all passes of a step."""
        forward, both = (t * VIEWS / self.count for t in self.seconds)
        forwards, backwards = PASSES[schedule]
        return forwards * forward + backwards * (both - forward)


def flops(schedule):
    """Return the FLOPs of the convolutions and matrix products in a step, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    network, counts = model(), []
    images = torch.rand(BATCH, 3, SIZE, SIZE, device=measure.DEVICE)
    for backward in (False, True):
        with FlopCounterMode(display=False) as counter:
            out = network(images)
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    forwards, backwards = PASSES[schedule]
    return VIEWS * (forwards * counts[0] + backwards * (counts[1] - counts[0]))


def time_and_record(benchmark, call, schedule, rounds):
    def finished():
        call()
        wait()

    call()
    start = time.perf_counter()
    finished()
    slow = ON_GPU and time.perf_counter() - start > 1
    if slow or measure.SMALLEST:  # slow: thousands of kernels, too many events for a trace
        rounds = 3
    floor = Floor() if benchmark.enabled else None
    benchmark.pedantic(finished, setup=floor and floor.time, rounds=rounds)
    if floor is None:
        return
    elapsed, bare = benchmark.stats.stats.min, floor.of(schedule)
    benchmark.extra_info.update(
        us=elapsed * 1e6,
        views_per_s=VIEWS * BATCH / elapsed,
        bare_us=bare * 1e6,
        against_bare=elapsed / bare,
        bare_best=f"{best()[0]} views a pass, {str(best()[1])[6:]}",
        gflops=flops(schedule) / 1e9,
        peak_extra_bytes=measure.peak_extra_bytes(call),
        launches=None if slow else measure.launches(call),
        **measure.machine(),
    )


def straight_line_on(name):
    """Return the step of a straight line, checked to move the parameters."""
    way = name.rpartition(" ")[2]
    if way == "kornia":
        pytest.importorskip("kornia")
    if ON_GPU and way == "torchvision-image":
        pytest.skip("takes minutes: 5,000 images a step, one at a time")
    network = model()
    step, before = straight_line(network, way), [p.detach().clone() for p in network.parameters()]
    step(*batch())
    moved = [not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True)]
    assert any(moved) and all(p.isfinite().all() for p in network.parameters())
    return step


def bare_step():
    """Return a step that runs the passes of "shared_forward" and nothing else."""
    count, layout = best()
    _, both, twice = bare_passes(count, layout)

    def step(images, labels):
        for _ in range(-(-VIEWS // count)):
            for passes in (both, twice, twice):  # the warm-up, and two joint repetitions
                passes()

    return step


def our_step(layout=None, **settings):
    optimizer = BLDOptimizer(
        model(), LR, temperature=TEMPERATURE, balance=BALANCE, views=VIEWS, augment=AUGMENT,
        **settings,
    )  # fmt: skip
    if layout is not None:
        optimizer.model.to(memory_format=layout)
    for _ in range(3 if settings.get("capture") else 1):  # the second step records the graph
        optimizer.step(*batch())
    assert optimizer.last.distillation_norms[0].max() > 0  # it really distils
    return optimizer.step


@pytest.mark.parametrize("op, name", [("step", name) for name in SETTINGS])
def test_step(benchmark, op, name):
    settings, straight = SETTINGS[name], name.startswith("straight line")
    if straight and not benchmark.enabled and not name.endswith("batch"):
        pytest.skip("takes seconds, and is timed only")
    benchmark.group = f"step, {NETWORK}"
    if settings is not None:
        schedule = settings.get("schedule", "two_forward")
        call = functools.partial(our_step(**settings), *batch())
        time_and_record(benchmark, call, schedule, rounds=30)
        return
    with exact_float32():
        step = straight_line_on(name) if straight else bare_step()
        call = functools.partial(step, *batch())
        schedule, rounds = ("two_forward", 5) if straight else ("shared_forward", 30)
        time_and_record(benchmark, call, schedule, rounds)
