"""Facts about classes, filed under their qualified names, so that no class has to be imported to be known."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import nn

T = TypeVar("T")


def qualified_name(cls: type) -> str:
    """`package.module.Class`, the name a fact is filed under."""
    return f"{cls.__module__}.{cls.__qualname__}"


def names_of(module: nn.Module) -> list[str]:
    """Qualified names of a module's class and of all it is derived from, nearest first."""
    return [qualified_name(cls) for cls in type(module).__mro__]


class ByClass(Generic[T]):
    """What is known of classes of modules, each with one fact.

    Args:
        what: what one fact is called in an error.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._facts: dict[str, T] = {}

    def file(self, fact: T, *classes: str | type) -> None:
        """File one fact under several classes; a name that does not exist here costs nothing.

        Raises:
            ValueError: one of the classes has such a fact already.
        """
        names = [cls if isinstance(cls, str) else qualified_name(cls) for cls in classes]
        for name in names:
            if name in self._facts:
                taken = self._facts[name]
                who = f"{taken.__module__}.{taken.__qualname__}" if hasattr(taken, "__qualname__") else repr(taken)
                raise ValueError(f"{name} has a {self.what} already, {who}; derive a class to read it otherwise")
        self._facts.update(dict.fromkeys(names, fact))

    def of(self, module: nn.Module) -> T | None:
        """The fact about the class whose `forward` a module runs; None where there is none, or where somebody replaced it."""
        if "forward" in vars(module):
            return None
        for cls in type(module).__mro__:
            if (found := self._facts.get(qualified_name(cls))) is not None or "forward" in vars(cls):
                return found
        return None

    def inherited(self, module: nn.Module) -> T | None:
        """The fact about a module's class, or the nearest it is derived from, be its forward another or not."""
        return next((self._facts[name] for name in names_of(module) if name in self._facts), None)

    def filed(self) -> dict[str, T]:
        """A copy of what is filed: qualified name to fact."""
        return dict(self._facts)
