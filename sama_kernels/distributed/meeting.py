"""Ranks compare a word before a collective, through the store of their group: hosts meet, no device waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

# How often the members of a group have met, and this rank's last word. By the group itself: the id of a group that was
# destroyed comes back, on one rank and not on another.
_met: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
_FAILED = "failed on rank "


class Failed(RuntimeError):
    """The meta step has failed on other ranks."""

    def __init__(self, ranks: str) -> None:
        super().__init__(
            f"base_loss, meta_loss: the meta step failed on rank {ranks}, whose own error says why; on this rank"
            " nothing was changed"
        )


def all_say(group: Any, word: str) -> bool:
    """Whether all members of a group say the same word; each waits until the last one has spoken.

    Three requests of a rank to the store, however many ranks there are: 0.5 ms for two processes on two cores, 0.6 for
    four (a small all-reduce of gloo: 0.4 and 1.2). A collective would do it too, but on an accelerator its result is
    one that the host has to wait for, behind all work that has been launched.

    Raises:
        Failed: members called `stay_away` instead.
        torch.distributed.DistStoreError: a rank did not come within the timeout of the group.
    """
    group = itself(group)
    world, store = dist.get_world_size(group), group.get_group_store()
    number, last_word = _met.get(group, (0, ""))
    here = next_meeting(group)
    _met[group] = number + 1, word
    store.add(f"{here}/said/{word}", 1)
    if store.add(f"{here}/came", 1) == world:  # the last one: every word has been said
        alike = store.add(f"{here}/said/{word}", 0) == world
        store.set(f"{here}/alike", "yes" if alike else "no")
        if number > 0:  # whoever has come here has read what was said before
            before = f"sama_kernels/{number - 1}"
            for key in (f"{before}/said/{last_word}", f"{before}/came", f"{before}/alike"):
                store.delete_key(key)
    said = store.get(f"{here}/alike").decode()
    if said.startswith(_FAILED):
        raise Failed(said.removeprefix(_FAILED))
    return said == "yes"  # type: ignore[no-any-return]


def stay_away(group: Any, failed: Sequence[int]) -> None:
    """Say which ranks have failed; whoever comes to the next meeting learns of it, and it counts as made here."""
    group = itself(group)
    here = next_meeting(group)
    _met[group] = _met.get(group, (0, ""))[0] + 1, ""
    group.get_group_store().set(f"{here}/alike", _FAILED + ", ".join(map(str, failed)))


def next_meeting(group: Any) -> str:
    """Where in the store of the group its members will meet next."""
    return f"sama_kernels/{_met.get(itself(group), (0, ''))[0]}"


def itself(group: Any) -> Any:
    """None is the group of all processes."""
    return dist.group.WORLD if group is None else group
