"""Views: makes the views of one batch and runs the network on them, pass by pass.

Every iteration over the same batch gives the same views and replays the same random numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bld_ext.api import labels as targets
from bld_ext.api.augment import is_seeded
from bld_ext.api.batch_norm import ViewBatchNorm
from bld_ext.api.images import channels_come_last
from bld_ext.api.memory_format import NeedsContiguousError, needs_contiguous
from bld_ext.api.out_of_memory import is_out_of_memory
from bld_ext.api.outputs import head_sizes, side_by_side
from bld_ext.api.pooled import gather, not_gathered
from bld_ext.api.precision import dtype_of, no_random_numbers, replayable_rng
from bld_ext.api.tree import TreeSum
from bld_ext.philox import stream_seed

# the op words of the Philox counter, for the seeds of an augmentation of your own and of a pass
AUGMENT_RNG, FORWARD_RNG = 254, 255


class Pass(NamedTuple):
    """Some views that went through the network as one batch."""

    rows: slice  # among those of all views that are made here
    logits: Tensor
    labels: Tensor
    is_last: bool
    counts: bool  # False: repeats an earlier pass, to have as many as the other processes


@dataclass(frozen=True)
class Views:
    """V views of a batch of B images, of which `numbers` are made here.

    Iterating makes them and runs the network on them.
    """

    model: nn.Module
    norms: list[ViewBatchNorm]  # all of the model
    images: Tensor  # [B, ...]
    labels: Tensor  # [B, *], as they were given
    ignore_index: int
    sizes: list[int]  # classes of each head
    number: int | Tensor  # the batch's number in the stream; a device scalar in a captured step
    count: int  # V, of all processes
    numbers: range  # of the views that are made here
    per_pass: int
    augment: Callable[..., Tensor] | None
    seed: int | Tensor
    precision: str = "fp32"  # arithmetic of the backward passes
    channels_last: bool = False
    first_image: int = 0  # number of the first image, among those of all processes
    passes: int = 0  # the least number of them
    tree: TreeSum | None = None  # adds up what the views contribute, one view a pass
    lane: int = 0  # distinguishes the random numbers of processes with images of their own

    def __iter__(self) -> Iterator[Pass]:
        """Make the views of each pass, and run the network on them."""
        B = len(self.images)
        if self.tree is not None:
            self.tree.begin()
        own = self._passes()
        all_passes = own + own[-1:] * (self.passes - len(own))
        for i, views in enumerate(all_passes):
            begin, counts = self.numbers.index(views[0]), i < len(own)
            for norm in self.norms:
                norm.views = len(views)
            made, labels = self.make(views)
            with nullcontext() if counts else not_gathered(self.norms):
                output = self._run(made, views[0])
            gather(self.norms)
            logits = side_by_side(output)
            if (found := head_sizes(output)) not in (None, self.sizes):
                raise ValueError(
                    f"model: expected heads of {self.sizes} classes, got {found}. Heads that "
                    "change without new parameters need a head_sizes of the model"
                )
            self._check(logits, labels)
            rows = slice(begin * B, begin * B + len(labels))
            yield Pass(rows, logits, labels, i + 1 == len(all_passes), counts)
            if self.tree is not None:
                self.tree.take(views[0])

    def _passes(self) -> list[range]:
        if self.tree is not None:
            return [range(view, view + 1) for view in self.tree.order()]
        begins = range(0, len(self.numbers), self.per_pass)
        return [self.numbers[begin : begin + self.per_pass] for begin in begins]

    @property
    def rows(self) -> int:
        """The number of images in all views of `numbers`."""
        return len(self.numbers) * len(self.images)

    def of(self, *numbers: int) -> "Views":
        """Return these views alone, side by side in one pass: to try something out."""
        views = range(numbers[0], numbers[-1] + 1)
        return replace(
            self, numbers=views, count=len(views), per_pass=len(views), passes=1, tree=None
        )

    @torch.no_grad()
    def sizes_found(self) -> list[int]:
        """Return the classes of each head in the model's output.

        Raises:
            ValueError: it is one tensor, which does not tell.
        """
        sizes = head_sizes(self._run(self.make(range(1))[0], 0))
        if sizes is None:
            raise ValueError(
                f"model: {type(self.model).__name__} has no head_sizes, and returns one tensor. "
                "Wrap the backbone in MultiHead, return a list of the logits of each head, or "
                "give the model a head_sizes: classes of each head, oldest first"
            )
        return sizes

    def _run(self, made: Tensor, first: int) -> object:
        """Run the network; its random numbers are a function of seed, batch and first view."""
        try:
            with self._repeatable(first, FORWARD_RNG):
                return self.model(made)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            if self.channels_last and needs_contiguous(error):
                raise NeedsContiguousError from error
            if remedy := channels_come_last(self.images):
                raise ValueError(
                    f"images: the model could not run on {tuple(self.images.shape)}; {remedy} "
                    f"({error})"
                ) from error
            raise

    @contextmanager
    def _repeatable(self, first: int, purpose: int) -> Iterator[None]:
        """Seed the global generators from seed, batch, view and purpose; put them back after it."""
        if purpose == AUGMENT_RNG and is_seeded(self.augment):
            yield  # it draws none of them
        elif isinstance(self.number, Tensor):
            with no_random_numbers(self.images.device):
                yield
        else:
            with replayable_rng(self.images.device) as reseed:
                reseed(stream_seed(self.seed, self.number, first + self.lane, purpose))
                yield

    def make(self, views: range) -> tuple[Tensor, Tensor]:
        """Return these views of the images, one after the other, and their labels."""
        labels = targets.read(_repeated(self.labels, len(views)), self.ignore_index)
        if self.augment is None:
            made = _repeated(self.images, len(views))
        else:
            last = self.first_image + len(self.images)
            indices = torch.arange(self.first_image, last, device=self.images.device)
            where = {"seed": self.seed, "step": self.number, "views": views, "indices": indices}
            with self._repeatable(views[0], AUGMENT_RNG):
                if not targets.must_move(self.labels, self.augment):
                    made = self.augment(self.images, **where)
                elif is_seeded(self.augment):
                    masks = targets.read(self.labels, self.ignore_index)
                    made, labels = self.augment(self.images, masks=masks, **where)
                else:  # which may pad with the user's own ignore_index
                    found = self.augment(self.images, masks=self.labels, **where)
                    made, labels = targets.moved(found, labels)
                    labels = targets.read(labels, self.ignore_index)
        if made.is_inference():  # of which no backward pass is possible
            made = made.clone()
        expected = dtype_of(self.model)
        if made.is_floating_point() and made.dtype != expected:
            name, remedy = ("images", f"images.to({expected})")
            if self.augment is not None:
                name, remedy = ("augment", f"SeededAugment(dtype={expected})")
            raise ValueError(
                f"{name}: expected views of the model's dtype, {expected}, got {made.dtype}; "
                f"use {remedy}"
            )
        if len(made) != len(views) * len(self.images):
            raise ValueError(
                f"augment: expected {len(views)} views of {len(self.images)} images, "
                f"{len(views) * len(self.images)} in all, got shape {tuple(made.shape)}"
            )
        if self.channels_last and made.dim() == 4:
            made = made.contiguous(memory_format=torch.channels_last)
        return made, labels

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        expected = (len(labels), sum(self.sizes))
        if logits.dim() < 2 or logits.shape[:2] != expected:
            raise ValueError(
                f"model: expected logits of shape [{expected[0]}, {expected[1]}, *] (images, "
                f"classes of head_sizes {self.sizes}), got {tuple(logits.shape)}"
            )
        targets.match(labels, logits)


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat(times, *(1,) * (x.dim() - 1))
