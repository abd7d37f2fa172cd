"""What nobody expected, told in one sentence: what was being done, and to which layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from refold.errors import InternalError, RefoldError

__all__ = ["Steps", "blamed", "line_of"]


class Steps:
    """Hands announcements of progress on, and remembers the last."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress, self.last = progress, ""

    def __call__(self, what: str) -> None:
        self.last = what
        self._progress(what)

    def told(self) -> str:
        """The beginning of a sentence about what went wrong there."""
        return (self.last or "exporting").capitalize()


def line_of(e: BaseException) -> str:
    """The first line an exception says, or its type."""
    first = next((part.strip() for part in str(e).splitlines() if part.strip()), "")
    return first[:300].rstrip(".")


@contextmanager
def blamed(what: str | Callable[[], str]) -> Iterator[None]:
    """Names what was going on when an exception that is none of ours passes through; the innermost name stays.

    Args:
        what: the beginning of the sentence, or a function that makes it.

    Raises:
        InternalError: with the exception as its cause. Errors of `refold.errors` pass as they are.
    """
    try:
        yield
    except (RefoldError, MemoryError):
        raise
    except Exception as e:
        raise InternalError(
            f"{what if isinstance(what, str) else what()}: this failed inside Refold ({type(e).__name__}: {line_of(e)}). "
            "Nothing was saved. Please report it with the model and what `refold --debug` prints.",
            detail=repr(e),
        ) from e
