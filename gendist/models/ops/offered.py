"""Verbs that some models of a class offer and others do not, such as `classify`, which needs labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Offered:
    """A method that is there unless the instance's `not_offered` names it; then to ask for it tells the reason.

    Of a method that is none of the verbs of all families, the reason stands in `further_not_offered`.
    """

    def __init__(self, verb: Callable[..., Any]):
        self.verb, self.__doc__ = verb, verb.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        """AttributeError where it is not offered, so that `hasattr` tells."""
        if instance is None:
            return self.verb
        for reasons in (instance.not_offered, getattr(instance, "further_not_offered", {})):
            if self.name in reasons:
                raise AttributeError(f"{self.name} is not offered: {reasons[self.name]}")
        return self.verb.__get__(instance, owner)
