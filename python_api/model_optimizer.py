"""ModelOptimizer: a torch optimizer around another one, for a model that grows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bld_ext import ops
from bld_ext.api import checks
from bld_ext.api.layers import release_gradients


class ModelOptimizer(torch.optim.Optimizer):
    """Holds the present parameters of a growing model, and a base optimizer that updates them.

    It shares groups and state with the base, so schedulers, hooks and state_dict see one optimizer.
    `seed` and `batches`, the number of batches learned, tell where it is in a stream.
    """

    def __init__(self, model: nn.Module, base: Callable[..., torch.optim.Optimizer], lr: float):
        self.model = model
        self.base = base(list(model.named_parameters()), lr=lr)
        checks.base(self.base)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.seed = torch.initial_seed() % 2**63  # for views and forward passes
        self.batches = 0  # the step word of the views' random numbers
        self._share_with_base()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _is_plain_sgd(self) -> bool:
        """Return whether the base only computes θ - lr · G, for which there is a kernel."""
        hooked = self.base._optimizer_step_pre_hooks or self.base._optimizer_step_post_hooks
        options = ("momentum", "weight_decay", "maximize", "differentiable")
        other = any(group.get(name) for group in self.param_groups for name in options)
        return type(self.base) is torch.optim.SGD and not hooked and not other

    def _plain_rate(self, rates: Sequence[float | Tensor]) -> float | Tensor | None:
        """Return the learning rate if the base is plain SGD with a single one, else None."""
        different = set(rates)
        return different.pop() if self._is_plain_sgd() and len(different) == 1 else None

    def _update(
        self, params: Iterable[Tensor], ratio: float, on_device: Sequence[Tensor] | None = None
    ) -> None:
        """Update these parameters by the base, θ ← θ - ratio · lr · G, and release their gradients.

        lr is each group's learning rate or, in a captured step, its scalar in `on_device`.
        """
        before = [(group["lr"], group["params"]) for group in self.param_groups]
        chosen, plain = set(params), on_device is not None and self._is_plain_sgd()
        rates = [group["lr"] for group in self.param_groups] if on_device is None else on_device
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate * ratio
                group["params"] = [p for p in group["params"] if p in chosen]
                if plain:
                    self._plain_update(group)
            if not plain:
                self._start_momentum()
                self.base.step()
        finally:
            for group, (rate, members) in zip(self.param_groups, before, strict=True):
                group["lr"], group["params"] = rate, members
            release_gradients(chosen)

    @staticmethod
    def _plain_update(group: dict) -> None:
        """Update θ ← θ - lr · G with lr on the device, for which torch's SGD would wait.

        The result is bitwise equal to torch's.
        """
        if params := [p for p in group["params"] if p.grad is not None]:
            grads, layers = [p.grad for p in params], list(range(len(params)))
            none = grads[0].new_zeros(len(params))
            ops.balanced_sgd_(params, grads, grads, layers, none, 0.0, group["lr"])

    def _start_momentum(self) -> None:
        """Start the momentum of new parameters, which torch's fused SGD omits beside old ones.

        Without dampening, momentum that starts at zero equals the gradient after one step, as
        torch's does.
        """
        for group in self.param_groups:
            fused = type(self.base) is torch.optim.SGD and group["fused"]
            if fused and group["momentum"] and not group["dampening"]:
                for param in group["params"]:
                    if param.grad is not None and "momentum_buffer" not in self.state[param]:
                        self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """Restore parameters, buffers, the base's state and the batch count if anything raises."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [t.detach().clone() for t in tensors]
        state = {
            p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
            for p, entry in self.state.items()
        }
        batches = self.batches
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for tensor, saved in zip(tensors, before, strict=True):
                    tensor.copy_(saved)
            self.state.clear()
            self.state.update(state)
            self.batches = batches
            raise

    def _follow_model(self) -> None:
        """Add new parameters of the model, such as heads, to group 0, and remove replaced ones.

        New ones take the options of group 0, so that a scheduler reaches them.
        """
        named = {param: name for name, param in self.model.named_parameters()}
        first, *others = self.param_groups
        kept = [param for param in first["params"] if param in named]
        for param in set(first["params"]) - set(kept):
            self.state.pop(param, None)
        known = {*kept, *(param for group in others for param in group["params"])}
        first["params"] = kept + [param for param in named if param not in known]
        first["param_names"] = [named[param] for param in first["params"]]

    def _share_with_base(self) -> None:
        """Share one list of groups and one state with the base, so that both always agree."""
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self.state, self.param_groups = self.base.state, self.base.param_groups

    def state_dict(self) -> dict:
        """Return torch's state and, under "bld", the seed, batches learned and parameter shapes."""
        self._follow_model()
        ours = {"seed": self.seed, "batches": self.batches, "shapes": self._shapes()}
        return super().state_dict() | {"bld": ours}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a saved state; training continues bit for bit as it would have then.

        The model must already have the heads it had when the state was saved.
        """
        if not {"bld", "state", "param_groups"} <= set(state_dict):
            keys = sorted(state_dict)
            raise ValueError(
                f"state_dict: expected one of a {type(self).__name__}, got the keys {keys}"
            )
        self._follow_model()
        params = dict(self.model.named_parameters())
        saved = state_dict["param_groups"][0].get("param_names", [])
        shapes = state_dict["bld"]["shapes"].items()
        if apart := sorted({name for name, _ in shapes ^ self._shapes().items()}):
            raise ValueError(
                f"state_dict: its parameters differ from the model's by {apart}. Load the model's "
                "state_dict, or add its heads, before the optimizer's"
            )
        first, *others = self.param_groups
        elsewhere = {param for group in others for param in group["params"]}
        if twice := [name for name in saved if params[name] in elsewhere]:
            raise ValueError(
                f"state_dict: its first group has {twice}, which another group of this optimizer "
                "has. Make the same groups before loading it"
            )
        before = first["params"]
        first["params"] = [params[name] for name in saved]
        try:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "bld"})
        except BaseException:
            first["params"] = before
            raise
        self.seed, self.batches = state_dict["bld"]["seed"], state_dict["bld"]["batches"]

    def __getstate__(self) -> dict:
        # a scheduler sets a `step` on the instance, bound to this very object; hooks are left out,
        # as every torch optimizer does
        own = self.__dict__.items()
        return {k: v for k, v in own if k != "step" and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share_with_base()
