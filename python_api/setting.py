"""Options that are checked whenever they are set: in the constructor, or as an attribute later."""

from collections.abc import Callable
from typing import Any

import torch


class Setting:
    """An attribute whose new value goes through `check(name, value)`, which returns what is kept.

    `together(settings)` refuses values that do not go with each other, before any is changed.
    """

    def __init__(
        self,
        check: Callable[[str, Any], Any],
        together: Callable[[dict[str, Any]], None] = lambda settings: None,
    ):
        self.check, self.together = check, together

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        if instance is None:
            return self
        try:
            return vars(instance)[self.name]
        except KeyError:
            raise AttributeError(self.name) from None

    def __set__(self, instance: object, value: Any) -> None:
        value = self.check(self.name, value)
        self.together({**vars(instance), self.name: value})
        vars(instance)[self.name] = value


class GroupSetting:
    """A value that all parameter groups of an optimizer have; setting it goes through a check.

    Everything that saves an optimizer keeps what is in its groups.
    """

    def __init__(self, check: Callable[[str, Any], Any]):
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: torch.optim.Optimizer | None, owner: type | None = None) -> Any:
        return self if instance is None else instance.param_groups[0][self.name]

    def __set__(self, instance: torch.optim.Optimizer, value: Any) -> None:
        value = self.check(self.name, value)
        for group in instance.param_groups:
            group[self.name] = value
