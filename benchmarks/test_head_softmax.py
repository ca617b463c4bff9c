"""head_softmax against eager PyTorch: `pytest benchmarks --benchmark-enable`.

Each case reads every logit once and writes every probability once, 8 bytes in float32; the table's
`gb_per_s` counts those. Correctness is checked before anything is timed.
"""

import pytest
import torch

from bld_ext import ops, reference

CASES = {
    "1000x4x2": (1_000, [2] * 4),
    "1000x19x5": (1_000, [5] * 19),
    "100000x10x10": (100_000, [10] * 10),
    "20000x2x100": (20_000, [100] * 2),
}


def per_head_loop(logits, head_sizes, temperature):
    """What one writes without the op."""
    out, first = [], 0
    for size in head_sizes:
        out.append(torch.softmax(logits[:, first : first + size] / temperature, 1))
        first += size
    return torch.cat(out, 1)


def equal_heads(logits, head_sizes, temperature):
    """The reshape trick, for heads of one size."""
    heads = logits.view(len(logits), len(head_sizes), head_sizes[0])
    return (heads / temperature).softmax(2).flatten(1)


IMPLEMENTATIONS = {
    "ours": ops.head_softmax,
    "split": reference.head_softmax,
    "loop": per_head_loop,
    "reshape": equal_heads,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_head_softmax(benchmark, case, implementation):
    N, head_sizes = CASES[case]
    logits = torch.randn(N, sum(head_sizes), generator=torch.Generator().manual_seed(0))
    run = IMPLEMENTATIONS[implementation]
    exact = reference.head_softmax(logits.double(), head_sizes, 2.0)
    torch.testing.assert_close(run(logits, head_sizes, 2.0).double(), exact, rtol=2e-6, atol=1e-7)

    benchmark.group = case
    benchmark.extra_info["bytes"] = moved = 8 * logits.numel()
    benchmark(run, logits, head_sizes, 2.0)
    if benchmark.stats is not None:
        benchmark.extra_info["gb_per_s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
