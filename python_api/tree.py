"""Sums over views in a fixed order, so that any power-of-two number of processes has the same bits.

T(1, 0) is the sum over all V views, where T(s, v) = T(2s, v) + T(2s, v + s) adds up the views v,
v + s, v + 2s, ... Process r of R makes exactly the views of T(R, r), whatever power of two R is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from bld_ext.api.processes import Processes

Gradients = list[Tensor | None]


class TreeSum:
    """Collects the gradient of each view from .grad and adds them up, first here, then over ranks.

    What .grad held before is added at the end.
    """

    def __init__(self, params: Sequence[Tensor], processes: Processes, count: int):
        self.params = [p for p in params if p.requires_grad]
        self.processes, self.count = processes, count
        self.leaf = 1 << (count - 1).bit_length()  # T(leaf, v) is view v alone
        self.waiting: list[Gradients] = []  # of left halves
        self.before: Gradients = []

    def order(self) -> list[int]:
        """Return the views of this process in the order in which they are to be made."""
        return self._leaves(self.processes.size, self.processes.rank)

    def _leaves(self, step: int, view: int) -> list[int]:
        if view >= self.count:
            return []
        if step == self.leaf:
            return [view]
        return self._leaves(2 * step, view) + self._leaves(2 * step, view + step)

    def begin(self) -> None:
        self.before, self.waiting = self._taken(), []

    def _taken(self) -> Gradients:
        grads = [p.grad for p in self.params]
        for param in self.params:
            param.grad = None
        return grads

    def take(self, view: int) -> None:
        """Add the gradient of a view, which is in .grad."""
        total, step = self._taken(), self.leaf
        while step > self.processes.size:
            step //= 2  # of the parent, whose left half begins at view % step
            if view >= step:
                total, view = _added(self.waiting.pop(), total), view - step
            elif view + step < self.count:
                break  # the right half comes next
        self.waiting.append(total)

    def finish(self) -> None:
        """Put the sum over all processes, and what was there before, into .grad."""
        (total,) = self.waiting
        if not self.processes.alone:
            total = self._over_ranks(total)
        for param, grad in zip(self.params, _added(self.before, total), strict=True):
            param.grad = grad
        self.before, self.waiting = [], []

    def _over_ranks(self, total: Gradients) -> Gradients:
        """Give each rank a part of all sums, let it add these up as the tree does, and share."""
        size, found = self.processes.size, dict[int, Tensor]()
        flags = self.processes.sum_flags([g is not None for g in total], self.params[0], [])
        pairs = zip(self.params, total, strict=True)
        own = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        for dtype in dict.fromkeys(g.dtype for g in own):
            where = [i for i, g in enumerate(own) if g.dtype == dtype]
            flat = torch.cat([own[i].reshape(-1) for i in where])
            length = -(-len(flat) // size) * size
            flat = torch.nn.functional.pad(flat, (0, length - len(flat)))
            parts = torch.empty_like(flat)
            distributed.all_to_all_single(parts, flat, group=self.processes.group)
            parts = list(parts.view(size, -1))
            while len(parts) > 1:
                half = len(parts) // 2
                parts = [parts[r] + parts[r + half] for r in range(half)]
            distributed.all_gather_into_tensor(flat, parts[0], group=self.processes.group)
            sizes = [own[i].numel() for i in where]
            pieces = flat[: sum(sizes)].split(sizes)
            found |= {i: p.view(own[i].shape) for i, p in zip(where, pieces, strict=True)}
        return [found[i].clone() if there else None for i, there in enumerate(flags)]


def _added(left: Gradients, right: Gradients) -> Gradients:
    """left + right, in the memory of the left ones."""
    return [
        b if a is None else a if b is None else a.add_(b) for a, b in zip(left, right, strict=True)
    ]
