"""ModelOptimizer: a torch optimizer around another one, for a model that grows."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from bld_ext import ops
from bld_ext.api import checks
from bld_ext.api.base import try_out
from bld_ext.api.buffers import Buffers
from bld_ext.api.layers import release_gradients
from bld_ext.api.precision import dtype_of
from bld_ext.api.setting import GroupSetting
from bld_ext.api.shards import part, reshard

# what is in a group and no option of the base
EVERY_STEP = ("params", "param_names", "lr", "initial_lr", "seed", "batches")


class ModelOptimizer(torch.optim.Optimizer):
    """Holds the present parameters of a growing model, and a base optimizer that updates them.

    Its groups and state are the base's, so schedulers, hooks and state_dict see one optimizer.
    `seed` and `batches`, the number of batches learned, tell where it is in a stream; both are in
    the groups, as the learning rate is.
    """

    lr = GroupSetting(checks.rate)
    seed = GroupSetting(checks.seed)  # for views and forward passes
    batches = GroupSetting(partial(checks.at_least, least=0))  # the step word of the views' numbers

    def __init__(self, model: nn.Module, base: Callable[..., torch.optim.Optimizer], lr: float):
        self.model = model
        if not callable(base):
            got = base if isinstance(base, str) else f"an object, {type(base).__name__}"
            raise TypeError(
                f"base: expected the class of a torch optimizer, such as torch.optim.SGD, got {got}"
            )
        self.base = base(list(model.parameters()), lr=lr if isinstance(lr, Tensor) else float(lr))
        if not isinstance(self.base, torch.optim.Optimizer):
            kind = type(self.base).__name__
            raise TypeError(f"base: expected it to make a torch.optim.Optimizer, got {kind}")
        self._require_own_groups()
        self._require_all_parameters()
        self._tried_with, self._warned = None, set()
        self._dtype = dtype_of(model)
        self._try_out_base()
        self._keeps_state = True  # which torch's constructor would set to nothing
        super().__init__(self.base.param_groups, self.base.defaults)
        self._keeps_state = False
        self.seed, self.batches = torch.initial_seed() % 2**63, 0

    @property
    def state(self) -> dict[Tensor, dict]:
        """What the base keeps of each parameter."""
        return self.base.state

    @state.setter
    def state(self, state: dict[Tensor, dict]) -> None:
        if not self._keeps_state:
            self.base.state = state

    @property
    def param_groups(self) -> list[dict]:
        """The groups of the base."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict]) -> None:
        self.base.param_groups = groups

    def _require_own_groups(self) -> None:
        groups = [*self.base.param_groups]
        self.base.__setstate__({"state": self.base.state, "param_groups": groups})
        if self.base.param_groups is not groups:
            raise ValueError(
                f"base: expected an optimizer with param_groups of its own, got a "
                f"{type(self.base).__name__}, which keeps those of another one"
            )

    def _require_all_parameters(self) -> None:
        known = {p for group in self.base.param_groups for p in group["params"]}
        left = [n for p, n in self._names().items() if p.requires_grad and p not in known]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ValueError(
                f"base: expected it to take all parameters it is given, but it left out "
                f"{', '.join(left[:3])}{more}. To freeze these call requires_grad_(False) on them; "
                "for a rate of their own make a group"
            )

    def _try_out_base(self) -> None:
        """Try the base out again when another of its options is used, such as momentum."""
        used = [
            {name for name, v in group.items() if name not in EVERY_STEP and _is_used(v)}
            for group in self.base.param_groups
        ]
        if used != self._tried_with:
            self._warned |= try_out(self.base, self._warned)
            self._tried_with = used

    def add_param_group(self, param_group: dict) -> None:
        """As every torch optimizer's, at any time: parameters leave the group they were in."""
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        params = [p[1] if isinstance(p, tuple) else p for p in params]
        names = self._names()  # a parameter that was replaced has none, and leaves before a step
        if foreign := [tuple(p.shape) for p in params if p not in names]:
            raise ValueError(
                f"params: expected parameters of the model, got others of the shapes {foreign}, "
                "for which a step computes no gradient"
            )
        named = [(names[p], p) for p in params]
        before = [(other, other["params"], other["param_names"]) for other in self.param_groups]
        for other in self.param_groups:
            other["params"] = [p for p in other["params"] if p not in {*params}]
        try:
            self._name_parameters(names)
            super().add_param_group({**param_group, "params": named, **self._place()})
        except BaseException:
            for other, its_params, its_names in before:
                other["params"], other["param_names"] = its_params, its_names
            raise

    def _place(self) -> dict[str, int]:
        """What all groups have alike; empty while the constructor adds the base's groups."""
        first = self.param_groups[0] if self.param_groups else {}
        return {name: first[name] for name in ("seed", "batches") if name in first}

    def group_for(self, name: str, param: Tensor) -> int:
        """The number of the group that a new parameter joins; assign another rule to change it.

        It is the group of the parameter that it replaces under this name. Otherwise it is that of
        its namesake, the newest parameter whose name differs in numbers alone, as `heads.0.bias`
        and `heads.1.bias` do; without one, that of the parameter whose path is longest the same, as
        the weight of which it is a parametrization.
        """
        places = {n: i for i, group in enumerate(self.param_groups) for n in group["param_names"]}
        if name in places:
            return places[name]
        present = [other for other in self._names().values() if other in places]
        gone = [other for other in places if other not in present]
        namesakes = [o for o in gone + present if _without_numbers(o) == _without_numbers(name)]
        near = max(gone + present, key=lambda other: _shared_path(other, name), default=None)
        chosen = namesakes[-1] if namesakes else near
        return 0 if chosen is None else places[chosen]

    def _checked_group(self, name: str, param: Tensor) -> int:
        number, count = self.group_for(name, param), len(self.param_groups)
        if not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(
                f"group_for: expected the number of a group, 0 to {count - 1}, for the new "
                f"parameter {name}, got {number!r}"
            )
        return number

    def _names(self) -> dict[Tensor, str]:
        """Names without what torch.compile puts in front of a compiled module's."""
        reshard(self.model)
        named = self.model.named_parameters()
        return {param: name.replace("_orig_mod.", "") for name, param in named}

    def _name_parameters(self, names: dict[Tensor, str]) -> None:
        for group in self.param_groups:
            group["param_names"] = [names.get(p, "") for p in group["params"]]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _is_plain_sgd(self) -> bool:
        """Return whether the base only computes θ - lr · G, for which there is a kernel."""
        hooks = (
            self.base._optimizer_step_pre_hooks, self.base._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )  # fmt: skip
        hooked = any(hooks)
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

    @torch.no_grad()
    def _base_step(self) -> None:
        """Let the base make a step at gradients of zero, which creates its state.

        Raises:
            RuntimeError: there are other gradients; a step along them would not distil.
        """
        self._follow_model()
        self._follow_layout()
        params = self._parameters()
        for param in params:
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        if any(p.grad is not None and part(p.grad).any() for p in params):
            raise RuntimeError(
                "step: expected step(images, labels), got no argument, and gradients of a "
                "backward() of yours, along which a step would not distil. A step computes the "
                "losses and gradients itself"
            )
        self.base.step()

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
        """Restore parameters, buffers and what the base keeps if anything raises."""
        params, buffers = [*self._names()], Buffers(self.model)
        before = [p.detach().clone() for p in params]
        state = {p: _copied(entry) for p, entry in self.state.items()}
        groups = [(group, _copied(group)) for group in self.param_groups]  # where some have state
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for param, saved in zip(params, before, strict=True):
                    param.copy_(saved)
            buffers.restore()
            self.state.clear()
            self.state.update(state)
            for group, saved in groups:
                saved |= {name: group[name] for name in ("params", "param_names", "lr")}
                group.clear()
                group.update(saved)
            raise

    def _follow_model(self) -> None:
        """Add new parameters of the model, such as heads, to a group, and remove replaced ones.

        New ones take the options of their group, so that a scheduler reaches them.
        """
        named = self._names()
        known = {param for group in self.param_groups for param in group["params"]}
        for param, name in named.items():
            if param not in known:  # while the groups still have what it may replace
                group = self.param_groups[self._checked_group(name, param)]
                group["params"].append(param)
                group["param_names"].append(name)
        for param in known - {*named}:
            self.state.pop(param, None)
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if p in named]
        self._name_parameters(named)

    def _follow_layout(self) -> None:
        """Give the state its parameters' strides and, after `model.double()`, their dtype.

        torch's fused kernels pair both by address. State that the base keeps in another dtype than
        its parameter stays in it.
        """
        before, self._dtype = self._dtype, dtype_of(self.model)
        for param, entry in self.state.items():
            for name, value in entry.items():
                if not isinstance(value, Tensor):
                    continue
                if before != self._dtype and value.dtype == before and name != "step":
                    entry[name] = value = value.to(param.dtype)
                if value.shape == param.shape and value.stride() != param.stride():
                    entry[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)

    def state_dict(self) -> dict:
        """Return torch's state and, under "bld", the base's class and the parameters' shapes."""
        self._follow_model()
        ours = {"base": type(self.base).__name__, "shapes": self._shapes()}
        return super().state_dict() | {"bld": ours}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for p, name in self._names().items()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a saved state; training continues bit for bit as it would have then.

        The model must already have the heads it had when the state was saved.
        """
        self._follow_model()
        self._check_saved(state_dict)
        params = {name: p for p, name in self._names().items()}
        before = [(group, group["params"]) for group in self.param_groups]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            group["params"] = [params[name] for name in saved.get("param_names", [])]
        try:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != "bld"})
        except BaseException:
            for group, its_params in before:
                group["params"] = its_params
            raise

    def _check_saved(self, state_dict: dict) -> None:
        groups = state_dict.get("param_groups", [])
        if "state" not in state_dict or not groups or any("batches" not in g for g in groups):
            keys = sorted({*state_dict, *(key for group in groups for key in group)})
            raise ValueError(
                f"state_dict: expected one of a {type(self).__name__} of this version, got the "
                f"keys {keys}"
            )
        saved = state_dict.get("bld")  # what saves groups and states alone leaves it out
        own = self._shapes()
        if saved is None:
            names = {name for group in groups for name in group.get("param_names", [])}
            saved = {"shapes": {n: own.get(n) for n in names}, "base": type(self.base).__name__}
        if apart := sorted({name for name, _ in saved["shapes"].items() ^ own.items()}):
            raise ValueError(
                f"state_dict: its parameters differ from the model's by {apart}. Load the model's "
                "state_dict, or add its heads, before the optimizer's"
            )
        if saved["base"] != type(self.base).__name__:
            raise ValueError(
                f"state_dict: expected one of base {type(self.base).__name__}, got one of "
                f"{saved['base']}; construct the optimizer with the base that was saved"
            )

    def __getstate__(self) -> dict:
        # a scheduler sets a `step` on the instance, bound to this very object; hooks are left out,
        # as every torch optimizer does
        own = self.__dict__.items()
        return {k: v for k, v in own if k != "step" and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict) -> None:
        of_base = {name: state[name] for name in ("state", "param_groups") if name in state}
        super().__setstate__({name: x for name, x in state.items() if name not in of_base})
        if of_base:  # load_state_dict, which hands over nothing else
            self.base.__setstate__(of_base)


def _copied(entries: dict) -> dict:
    """A copy of a group or of a parameter's state, but for the parameters."""
    mutable = (Tensor, list, dict, set)
    return {
        name: copy.deepcopy(x) if isinstance(x, mutable) and name != "params" else x
        for name, x in entries.items()
    }


def _is_used(option: object) -> bool:
    return isinstance(option, (bool, int, float)) and option != 0


def _shared_path(name: str, other: str) -> int:
    """Return how many parts of two dotted names are the same, from the first one on."""
    parts = zip(name.split("."), other.split("."), strict=False)
    return len([*itertools.takewhile(lambda pair: pair[0] == pair[1], parts)])


def _without_numbers(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))
