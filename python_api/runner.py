"""StepRunner: runs the stages of a step together with everything that surrounds them.

Each of these concerns has a file of its own: exact arithmetic (`precision`), BatchNorm's policy
(`batch_norm`), views and random numbers (`views`), the layout of images and weights
(`memory_format`), the number of views in a pass (`pass_size`), running out of memory
(`out_of_memory`) and recording as a CUDA graph (`capture`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bld_ext.api import algorithm, checks
from bld_ext.api import images as inputs
from bld_ext.api import labels as targets
from bld_ext.api.augment import is_seeded
from bld_ext.api.batch_norm import ViewBatchNorm, spare_old_heads
from bld_ext.api.capture import Recorder, key_of
from bld_ext.api.convert import convert_view_batchnorm
from bld_ext.api.layers import Layers, release_gradients
from bld_ext.api.memory import tensor_bytes
from bld_ext.api.memory_format import MemoryFormat
from bld_ext.api.mixing import no_trace, require_repeatable, warn_of_eval_mode
from bld_ext.api.model_optimizer import ModelOptimizer
from bld_ext.api.out_of_memory import too_much, within_memory
from bld_ext.api.pass_size import PassSize
from bld_ext.api.pooled import view_statistics
from bld_ext.api.precision import dtype_of, exact_float32
from bld_ext.api.processes import Processes, digest_of
from bld_ext.api.report import Batch, StepReport
from bld_ext.api.schedules import SCHEDULES
from bld_ext.api.shards import add_up_gradients, is_sharded
from bld_ext.api.stage import Stage
from bld_ext.api.tree import TreeSum
from bld_ext.api.views import Views
from bld_ext.api.warn import warn

NEVER = object()


class StepRunner(ModelOptimizer):
    """Runs the stages of a step with the settings that its subclass BLDOptimizer holds."""

    last: StepReport | None
    _batch: Batch | None  # what the warm-up leaves for the joint repetitions
    _format: MemoryFormat
    _pass_size: PassSize
    _recorder: Recorder
    _processes: Processes
    _probed_with: object  # the augment, heads and mode in which the model was tried out
    _sizes_found: tuple[object, list[int]]  # of a model without head_sizes, and its parameters then
    _undistilled: tuple[int, int]  # heads, and batches without distillation since they were so many
    _alone: set[int]  # ids of the parameters beside which the only head was seen

    def release(self) -> None:
        """End the current batch: release the bank, the norms and the gradients."""
        try:
            self._watch_stages()
        finally:
            self._release()

    def _release(self) -> None:
        self._batch = None
        release_gradients(self._parameters())

    # ---- the stages of a step ----

    def _step(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        try:
            warm_up = partial(self._warm_up, images, labels, sizes)
            loss = self._format.run(warm_up)
            for _ in range(self.joint_steps):
                self._joint(images, labels, sizes)
        finally:
            self._release()
        return loss

    def _watch_distillation(self, sizes: list[int]) -> None:
        """Warn if the first two batches after a new head distil nothing; only these are read."""
        if len(sizes) == 1 and self.balance != 0:
            self._watch_only_head()
        heads, without = self._undistilled
        if heads != len(sizes):
            without = 0
        if len(sizes) > 1 and self.balance != 0 and without < 2:
            learns = self.last.reference_norms > 0
            distils = any(bool((learns & (n > 0)).any()) for n in self.last.distillation_norms)
            without = 2 if distils else without + 1
            self._undistilled = len(sizes), without
            if distils:
                if self.balance is not None:  # which magnifies it
                    self._warn_of_noise()
            elif without == 2:
                warn(
                    f"no layer was distilled in two batches with {len(sizes)} heads, since G_d or "
                    "the new task's gradient is zero in each. Do old heads run under no_grad, or "
                    "on detached features? Old heads keep their weights without that. Is the "
                    "backbone frozen, has a head a single class, or have all labels none? "
                    f"Do joint_steps={self.joint_steps} and warmup_lr={self.warmup_lr} leave "
                    "nothing to distil? For finetuning, set balance=0",
                )

    def _watch_only_head(self) -> None:
        """Warn where a model whose output has one head has new parameters, perhaps a head."""
        params = {id(param) for param in self.model.parameters()}
        if self._alone & params and params - self._alone:
            warn(
                "the model has new parameters since its last batch, but its output still has a "
                "single head, so nothing is distilled. If a head was added, return the logits of "
                "all heads side by side, the newest last; if one was replaced, keep the old one"
            )
        self._alone = params

    def _warn_of_noise(self) -> None:
        """Warn where ‖G_d‖ is so small beside ‖G_w‖ that rounding errors are a part of it.

        A tenth of the digits' range is left for later in the task, where it is smaller still.
        """
        wanted, found = self.last.reference_norms, self.last.distillation_norms[0]
        both = (wanted > 0) & (found > 0)
        ratio = (wanted / found)[both].nanmedian() if both.any() else wanted.new_zeros(())
        if ratio > 0.1 / torch.finfo(ratio.dtype).eps:
            digits = -math.log10(torch.finfo(ratio.dtype).eps)
            warn(
                f"‖G_w‖ / ‖G_d‖ is {ratio:.1g} in the median layer, and numbers have only "
                f"{digits:.0f} digits, so the first joint update distils rounding errors, now or "
                f"later in the task. Raise warmup_lr, now {self.warmup_lr:.3g}, with which the old "
                f"predictions hardly move: a tenth of lr is {self.lr / 10:.3g}. Or call "
                "model.double(), and give an augment dtype=torch.float64"
            )

    def _watch_stages(self) -> None:
        """Watch a batch that is learned by `warm_up` and `joint`, when it ends."""
        if self._batch is not None and self.last.distillation_norms:
            self._watch_distillation([*self._batch.sizes])

    def _captured_step(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        self._follow_model()
        number = self.batches
        rates = [group["lr"] for group in self.param_groups]

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, StepReport]:
            loss = self._step(images, labels, sizes)
            return loss, self.last

        try:
            loss, self.last = self._recorder.run(
                key_of(self, images, labels, sizes), images, labels, rates,
                (self.balance or 0.0, self.seed, number), step,
            )  # fmt: skip
        except BaseException:
            self.batches = number
            raise
        self.batches = number + 1
        return loss.clone()

    def _warm_up(self, images: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
        self._follow_model()
        self._release()
        layers = Layers.of(self.model, self._parameters(), self.layer)
        report = StepReport(layers.names)
        views = self._views(images, labels, sizes, self.batches)
        stage = self._stage_of("warm-up", self.warmup_ratio, views, layers, report)
        with self._surroundings("pool"):
            loss, bank, norms = algorithm.warm_up(stage, SCHEDULES[self.schedule])
        report.warm_up_loss, report.reference_norms = loss, norms
        report.memory["bank"] = tensor_bytes([bank])
        report.memory["layer_norms"] = tensor_bytes([norms]) if self.balance else 0
        self._begin_batch(bank, layers, norms, images, sizes)
        self.last = report
        return loss

    def _joint(
        self,
        images: Tensor,
        labels: Tensor,
        sizes: list[int],
        bank: Tensor | None = None,
        losses: Sequence[str] = algorithm.LOSSES,
    ) -> Tensor:
        if bank is not None:
            checks.bank(bank, labels, len(self.views_here), sum(sizes[:-1]), dtype_of(self.model))
        if self._batch is not None:
            self._require_same_batch(images, sizes)
            if bank is None and "distillation" in losses:
                self._require_bank(sizes)
        before, number = self._batch, self.batches
        report, kept = self.last, None if self.last is None else self.last.copy()
        try:
            if bank is not None:
                self._replace_bank(images, sizes, bank)
            return self._repeat(images, labels, sizes, losses)
        except BaseException:
            self._batch, self.batches, self.last = before, number, report
            if report is not None:
                vars(report).update(vars(kept))
            raise

    def _repeat(
        self, images: Tensor, labels: Tensor, sizes: list[int], losses: Sequence[str]
    ) -> Tensor:
        batch, distils = self._batch, len(sizes) > 1 and self.balance != 0
        wanted = algorithm.LOSSES if distils else ("new",)
        losses = tuple(name for name in wanted if name in losses)  # each at most once
        if not losses:
            return batch.reference_norms.new_zeros(())
        release_gradients(batch.layers.index)
        views = self._views(images, labels, sizes, batch.number)
        stage = self._stage_of("joint", 1.0, views, batch.layers, self.last)
        stage = replace(stage, bank=batch.bank, reference_norms=batch.reference_norms)
        with self._surroundings("keep"):
            loss = algorithm.joint(stage, SCHEDULES[self.schedule], losses)
        if "new" in losses:
            self.last.new_loss.append(loss)
        return loss

    def _replace_bank(self, images: Tensor, sizes: list[int], bank: Tensor) -> None:
        """Distil from `bank` from now on; begin a batch if there was no warm-up."""
        if self._batch is not None:
            self._batch = replace(self._batch, bank=bank)
        else:
            self._follow_model()
            layers = Layers.of(self.model, self._parameters(), self.layer)
            norms = layers.zeros()
            params = [p for p in layers.index if p.requires_grad]
            self.last = StepReport(layers.names, reference_norms=norms)
            self.last.memory |= {"layer_norms": 0, "gradients": tensor_bytes(params)}
            self._begin_batch(bank, layers, norms, images, sizes)
        self.last.memory["bank"] = tensor_bytes([bank])

    def _begin_batch(
        self, bank: Tensor, layers: Layers, norms: Tensor, images: Tensor, sizes: list[int]
    ) -> None:
        shape, settings = tuple(images.shape), self._settings_of_views()
        self._batch = Batch(bank, layers, norms, self.batches, shape, tuple(sizes), settings)
        self.batches += 1

    def _options(self) -> dict[str, str]:
        """The options that what is learned depends on."""
        names = ("temperature", "balance", "joint_steps", "views", "ignore_index", "layer",
                 "schedule", "precision", "reproducible")  # fmt: skip
        found = {name: repr(getattr(self, name)) for name in names}
        seeded = is_seeded(self.augment)
        found["augment"] = repr(self.augment) if seeded else type(self.augment).__name__
        return found | {"warmup_lr": f"{self.warmup_ratio} · lr"}

    def _settings_of_step(self) -> dict[str, str]:
        """What the processes of a step must have alike; learning rates on a GPU are not read."""
        found = self._options()
        found["base"] = type(self.base).__name__
        found["check_finite"] = repr(self.check_finite)
        found["model.training"] = repr(self.model.training)
        for i, group in enumerate(self.param_groups):
            for name, value in group.items():
                read = not isinstance(value, Tensor) or value.device.type == "cpu"
                if read and name not in ("params", "param_names", "seed", "batches"):
                    value = value.item() if isinstance(value, Tensor) else value
                    found[f"param_groups[{i}]['{name}']"] = repr(value)
        return found

    def _settings_of_views(self) -> dict[str, object]:
        names = (
            "views",
            "views_in_pass",
            "temperature",
            "augment",
            "ignore_index",
            "seed",
            "layer",
        )
        found = {name: getattr(self, name) for name in names}
        return found | {"model.training": self.model.training}

    def _require_bank(self, sizes: list[int]) -> None:
        if self.balance != 0 and self._batch.bank.shape[1] != sum(sizes[:-1]):
            raise ValueError(
                f"balance: expected 0, with which the last warm_up kept no bank, got "
                f"{self.balance}; change it between two batches"
            )

    def _require_same_batch(self, images: Tensor, sizes: list[int]) -> None:
        batch = self._batch
        if tuple(images.shape) != batch.shape or tuple(sizes) != batch.sizes:
            raise ValueError(
                f"images: expected the batch of the last warm_up, shape {batch.shape} with heads "
                f"of {list(batch.sizes)} classes, got {tuple(images.shape)} with {sizes}; call "
                "warm_up(images, labels) first"
            )
        for name, value in self._settings_of_views().items():
            if value != batch.settings[name]:
                raise ValueError(
                    f"{name}: expected {batch.settings[name]!r}, as in the last warm_up, got "
                    f"{value!r}; change settings between two batches"
                )

    # ---- what a stage consists of, and what surrounds it ----

    def _stage_of(
        self, name: str, ratio: float, views: Views, layers: Layers, report: StepReport
    ) -> Stage:
        if not self._processes.alone:
            where = (
                name,
                views.number,
                self.seed,
                self._settings_of_step(),
                [*self._names().values()],
            )
            shared = self._processes.shard == "views"
            self._processes.mark(where, *((views.images, views.labels) if shared else (None, None)))
        scalars = self._recorder.scalars
        rates = None if scalars is None else scalars.rates
        on_device = scalars is not None and self.balance is not None

        # neither closure may refer to the stage: the reference cycle would keep the batch alive
        def apply(params: Sequence[Tensor]) -> None:
            self._update(params, ratio, rates)

        def plain_rate() -> float | Tensor | None:
            return self._plain_rate(rates or [group["lr"] for group in self.param_groups])

        return Stage(
            name, views, layers, self.temperature, scalars.balance if on_device else self.balance,
            self.balance != 0, report, self.check_finite, self._processes, apply, plain_rate,
        )  # fmt: skip

    def _views(self, images: Tensor, labels: Tensor, sizes: list[int], number: int) -> Views:
        seed, scalars = self.seed, self._recorder.scalars
        if scalars is not None:
            seed, number = scalars.seed, scalars.number
        # data, of which ops take no subclasses
        images, labels = (x.detach().as_subclass(Tensor) for x in (images, labels))
        shared, count = self._processes, self.views
        tree = TreeSum(self._parameters(), shared, count) if self.reproducible else None
        passes = 0
        if any(map(is_sharded, self._parameters())):  # gathered for each pass, by all processes
            passes = -(-shared.most_views(count) // self._pass_size.number)
        return Views(
            self.model, self._norms(), images, labels, self.ignore_index, sizes, number, count,
            self.views_here, self._pass_size.number, self.augment, seed, self.precision,
            self._format.channels_last(self.model), shared.first_image, passes, tree,
            shared.rank * count if shared.shard == "images" else 0,
        )  # fmt: skip

    def _norms(self) -> list[ViewBatchNorm]:
        return [m for m in self.model.modules() if isinstance(m, ViewBatchNorm)]

    @contextmanager
    def _surroundings(self, statistics: str) -> Iterator[None]:
        """Set exact arithmetic and BatchNorm's mode `statistics`; release gradients on an error."""
        statistics = view_statistics(self._norms(), statistics, self._processes.sum_)
        with torch.enable_grad(), exact_float32(), statistics:
            try:
                yield
            except BaseException:
                release_gradients(self._parameters())
                raise

    def _choose_pass_size(self, images: Tensor, labels: Tensor, sizes: list[int]) -> None:
        situation = (self.augment, len(sizes), self.model.training)
        probed = self._probed_with == situation
        count = self._processes.most_views(self.views)
        if probed and self._pass_size.is_chosen(self.model, images, count):
            return

        def choose() -> None:
            views = self._views(images, labels, sizes, self.batches)
            with self._surroundings("keep"), no_trace(self.model):
                if not probed:
                    warn_of_eval_mode(self.model)
                    if not require_repeatable(views.of(0)):
                        self._format.possible = False
                self._pass_size.choose(views, count)
            self._probed_with = situation

        self._within_memory(images, partial(self._format.run, choose))

    def _within_memory(self, images: Tensor, run: Callable[[], Tensor | None]) -> Tensor | None:
        def explain() -> torch.OutOfMemoryError:
            views = self.views_in_pass
            # both stages of a batch need the same passes, so a batch that has begun keeps them
            self._pass_size.halve(now=self._batch is None)
            return too_much(views, len(images), self._pass_size.automatic)

        return within_memory(run, explain)

    def _check(self, images: Tensor, labels: Tensor) -> list[int]:
        """Make every check that is possible before anything changes; return the head sizes."""
        error, sizes = None, []
        try:
            sizes = self._checked(images, labels)
        except Exception as found:
            error = found
        try:
            if self._processes.must_compare(self.check_finite):
                settings, state = self._settings_of_step(), self._digest_of_state()
                self._processes.compare(error, images, labels, self._shapes(), settings, state)
            elif error is not None:
                raise error
        finally:
            del error  # it refers to this frame, which with it would keep the batch
        if self._processes.agree(self.model):
            self.seed, self.batches = self._processes.from_rank_0((self.seed, self.batches))
        return sizes

    def _digest_of_state(self) -> int:
        return digest_of(
            value
            for param in self._parameters()
            for value in self.state.get(param, {}).values()
            if isinstance(value, Tensor)
        )

    def _checked(self, images: Tensor, labels: Tensor) -> list[int]:
        add_up_gradients(self.model)
        convert_view_batchnorm(self.model)  # converts what was added since the last step
        device = next(self.model.parameters()).device
        checks.tensors(images, labels)
        inputs.check(images, device, self.augment)
        targets.check(labels, images, self.augment)
        checks.dtypes(self.model)
        checks.batch_norms(self.model, self.views_per_pass)
        checks.trainable(self.model)
        if self.reproducible:
            checks.tree(self._processes, self.views_per_pass)
        checks.shared(self.model, self._processes.alone, self._processes.shard, self.capture)
        checks.sharded(self.model, self._processes, self.views_per_pass, self.reproducible)
        checks.mixed(self.model, self.param_groups)
        checks.learning_rates(self.param_groups)
        self._follow_layout()
        self._try_out_base()
        looks = device.type == "cpu" or self.check_finite
        if looks:
            inputs.check_values(images, self.augment)
        sizes = self._head_sizes(images, labels)
        spare_old_heads(self.model, sizes)
        if looks:
            targets.check_classes(labels, sizes[-1], self.ignore_index)
        return sizes

    def _head_sizes(self, images: Tensor, labels: Tensor) -> list[int]:
        """Return what the model says, or else what its output has, looked at when it changed."""
        if hasattr(self.model, "head_sizes"):
            return checks.heads(self.model.head_sizes)
        shapes = self._shapes()
        if self._sizes_found[0] != shapes:
            views = self._views(images, labels, [], self.batches).of(0)
            with self._surroundings("keep"), no_trace(self.model):
                found = self._format.run(views.sizes_found)
            if self._sizes_found[0] is NEVER and len(found) > 1:
                warn(
                    f"the model has no head_sizes, so its output is read as heads of {found} "
                    "classes, the newest one last. If it returns anything else, return the logits "
                    "of heads alone. Its own head_sizes = [...] would say so without this warning"
                )
            self._sizes_found = shapes, found
        return self._sizes_found[1]
