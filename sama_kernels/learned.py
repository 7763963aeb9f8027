"""What meta steps find out about closures, by their code, to spare later ones finding it out."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary


class Learned:
    """A set of code objects that does not keep them alive."""

    def __init__(self) -> None:
        self._of: MutableMapping[Any, bool] = WeakIdKeyDictionary()
        _everything.append(self)

    def note(self, code: Any) -> None:
        """Add `code`."""
        self._of[code] = True

    def knows(self, code: Any) -> bool:
        """Whether `code` has been noted."""
        return code in self._of

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Forget what was noted in this block if it raises."""
        before = {*map(id, self._of)}
        try:
            yield
        except BaseException:
            for code in [code for code in self._of if id(code) not in before]:
                del self._of[code]
            raise


_everything: list[Learned] = []


@contextmanager
def together() -> Iterator[None]:
    """Around a meta step: one that fails has learned nothing. It decides how often the next one evaluates a closure,
    which must be the same on all ranks, and the rank that failed has seen less than the others."""
    with ExitStack() as stack:
        for learned in _everything:
            stack.enter_context(learned.undone_on_error())
        yield
