"""Views: makes the views of one batch and runs the network on them, pass by pass.

Every iteration over the same batch gives the same views and replays the same random numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bld_ext.api.augment import is_seeded
from bld_ext.api.batch_norm import ViewBatchNorm
from bld_ext.api.memory_format import NeedsContiguousError
from bld_ext.api.precision import no_random_numbers, replayable_rng
from bld_ext.philox import stream_seed

# the op words of the Philox counter, for the seeds of an augmentation of your own and of a pass
AUGMENT_RNG, FORWARD_RNG = 254, 255


@dataclass(frozen=True)
class Views:
    """V views of a batch of B images; iterating makes them and runs the network on them."""

    model: nn.Module
    norms: list[ViewBatchNorm]  # all of the model
    images: Tensor  # [B, ...]
    labels: Tensor  # [B, *]
    sizes: list[int]  # classes of each head
    number: int | Tensor  # the batch's number in the stream; a device scalar in a captured step
    count: int  # V
    per_pass: int
    augment: Callable[..., Tensor] | None
    seed: int | Tensor
    precision: str = "fp32"  # arithmetic of the backward passes
    channels_last: bool = False
    start: int = 0  # number of the first view

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield, for each pass, its rows among all V·B, its logits and its labels."""
        B = len(self.images)
        for first in range(self.start, self.start + self.count, self.per_pass):
            views = range(first, min(first + self.per_pass, self.start + self.count))
            for norm in self.norms:
                norm.views = len(views)
            logits = self._run(self.make(views), first)
            labels = self.labels.repeat(len(views), *(1,) * (self.labels.dim() - 1))
            self._check(logits, labels)
            row = (first - self.start) * B
            yield slice(row, row + len(labels)), logits, labels

    def _run(self, made: Tensor, first: int) -> Tensor:
        """Run the network; its random numbers are a function of seed, batch and first view."""
        try:
            with self._repeatable(first, FORWARD_RNG):
                return self.model(made)
        except RuntimeError as error:
            if self.channels_last and "view size is not compatible" in str(error):
                raise NeedsContiguousError from error
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
                reseed(stream_seed(self.seed, self.number, first, purpose))
                yield

    def make(self, views: range) -> Tensor:
        if self.augment is None:
            made = self.images.repeat(len(views), *(1,) * (self.images.dim() - 1))
        else:
            indices = torch.arange(len(self.images), device=self.images.device)
            with self._repeatable(views[0], AUGMENT_RNG):
                made = self.augment(
                    self.images, seed=self.seed, step=self.number, views=views, indices=indices
                )
        expected = next(self.model.parameters()).dtype
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
        return made

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        expected = (len(labels), sum(self.sizes))
        if logits.dim() < 2 or logits.shape[:2] != expected:
            raise ValueError(
                f"model: expected logits of shape [{expected[0]}, {expected[1]}, *] (images, "
                f"classes of head_sizes {self.sizes}), got {tuple(logits.shape)}"
            )
