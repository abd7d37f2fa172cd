"""Names for what is made beside what has names already: one allocator that knows all of them."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Names"]


class Names:
    """Args:
    taken: every name that was given before, also those that will only be used later on.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def __contains__(self, name: str) -> bool:
        return name in self._taken

    def fresh(self, wanted: str) -> str:
        """`wanted` where it is free, else the first of wanted_2, wanted_3, ... that is. It is taken from now on."""
        name, count = wanted, 2
        while name in self._taken:
            name, count = f"{wanted}_{count}", count + 1
        self._taken.add(name)
        return name
