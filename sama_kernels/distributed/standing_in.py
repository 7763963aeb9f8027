"""Meta steps in which one rank fails: it stands in for itself, so that nobody waits for it for ever.

The others are, or will be, in collectives that the failed rank no longer makes: of our buckets, of FSDP's layers, of a
closure. It cannot know which, so they tell: a failure is announced in the store of the group, every rank then publishes
the calls that it makes, and the failed one makes each of them too, with zeros. The others so come to the end of their
passes, learn there that what they have computed is nothing, and raise; the collectives of all ranks are in step again.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sama_kernels.distributed.collectives import Record, alike, call
from sama_kernels.distributed.meeting import Failed, all_say, itself, next_meeting, stay_away

LOOK = 0.25  # s between looks for a failure
IDLE = 10.0  # s without a meta step, after which nobody looks
SIGN_OF_LIFE = 1.0  # s between messages of a rank that makes no collective, once one has failed
SILENCE = 60.0  # s without a message, after which a rank is taken for dead

_connections: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of the watching threads, by group
_rubbish: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()  # keys of the last failure, by group


class CannotStandIn(Exception):
    """The others wait for this rank, or will."""


class Attendance:
    """This rank's part in one meta step of a group: every collective of it, whatever happens.

    Attributes:
        over: whatever happens now, the other ranks know how it went, or this one cannot tell them.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = itself(group), device
        self._rank = dist.get_rank()
        self._record = Record()
        self._state = "running"
        self._messages = 0
        self._published = 0  # of the calls
        self._said_all = False
        self._spoke = 0.0
        self._speaking = threading.Lock()
        self._announced = False
        self._opened = ExitStack()
        self.over = False

    def begin(self) -> None:
        """What is launched from here on is noted. No rank is here before all have agreed on this meta step."""
        self._here = next_meeting(self._group)
        store = self._group.get_group_store()
        for key in _rubbish.pop(self._group, ()):  # everybody has read it
            store.delete_key(key)
        self._opened.enter_context(self._record.open())
        self._opened.enter_context(_watched(self))

    def end(self) -> None:
        """Noting and watching are over."""
        self._opened.close()

    def arrive(self) -> None:
        """All collectives have been made; wait for the other hosts.

        Raises:
            Failed: the meta step failed elsewhere.
        """
        self._state = "arrived"
        all_say(self._group, "")

    def fail(self) -> None:
        """Stand in until every rank has come to the end of its passes, or failed too, and tell them.

        Raises:
            Failed: this rank had gone on after another one's failure, and its error comes from the zeros.
            CannotStandIn: says why.
        """
        self.over = True
        self.end()
        with self._speaking:
            self._state = "failed"
        store = self._group.get_group_store()
        count, announced, matched = (f"{self._here}/{key}" for key in ("failures", "failed", "matched"))
        if store.add(count, 1) == 1:
            store.set(announced, "yes")
            _rubbish.setdefault(self._group, []).extend((count, announced, matched))
        self._publish(store)
        logs = {rank: _Log(rank) for rank in dist.get_process_group_ranks(self._group)}
        self._take_part(store, logs)
        failed = [log for log in logs.values() if log.state == "failed"]
        store.add(matched, 1)
        _wait(lambda: store.add(matched, 0) == len(failed), "the other ranks that failed")
        by_themselves = [log.rank for log in failed if not any(log.is_beyond(other) for other in failed)]
        stay_away(self._group, by_themselves)
        if by_themselves and self._rank not in by_themselves:
            raise Failed(", ".join(map(str, by_themselves)))

    def _take_part(self, store: Any, logs: dict[int, _Log]) -> None:
        """Make the calls that others have made and this rank has not, until no rank makes any more."""
        made = Counter(c.group.group_name for c in self._record.calls)
        pending: list[tuple[Any, Any]] = []
        while True:
            news = [log.read(store, self._here) for log in logs.values()]
            for group in _groups_with(self._rank, logs.values()):
                longest = max((log.calls.get(group, []) for log in logs.values()), key=len)
                for name, arguments in longest[made[group] :]:
                    if not alike(name, arguments):
                        raise CannotStandIn(f"{name.strip('_')} is not the same call on every rank")
                    pending.append(call(name, _group_named(group), arguments, self._device))
                made[group] = max(made[group], len(longest))
            pending = [(work, kept) for work, kept in pending if not work.is_completed()]
            if all(log.state != "running" for log in logs.values()):
                break
            if not any(news):
                time.sleep(0.001)
        for work, _ in pending:
            work.wait()

    def look(self) -> bool:
        """Publish what this rank has launched if another one has failed; whether it has. For the watching thread."""
        with self._speaking:
            if self._state == "failed":
                return False
            if self._group not in _connections:
                _connections[self._group] = self._group.get_group_store().clone()
            store = _connections[self._group]
            self._announced = self._announced or store.check([f"{self._here}/failed"])
            if self._announced:
                self._publish(store)
            return self._announced

    def _publish(self, store: Any) -> None:
        """What has been launched since the last message; the last one of a rank that is running no more says so."""
        state, calls = self._state, self._record.calls[self._published :]  # the state first: then no call is to come
        no_news = not calls and state == "running"
        if self._said_all or (no_news and time.monotonic() - self._spoke < SIGN_OF_LIFE):
            return
        groups = {c.group.group_name: dist.get_process_group_ranks(c.group) for c in calls}
        listed = [(c.name, c.group.group_name, c.arguments) for c in calls]
        message = json.dumps({"state": state, "groups": groups, "calls": listed})
        key = f"{self._here}/log/{self._rank}/{self._messages}"
        _rubbish.setdefault(self._group, []).append(key)
        store.set(key, message)
        self._messages += 1
        self._published += len(calls)
        self._said_all = state != "running"
        self._spoke = time.monotonic()


_watching: list[Attendance] = []
_begins_or_ends = threading.Lock()
_thread: threading.Thread | None = None


@contextmanager
def _watched(attendance: Attendance) -> Iterator[None]:
    """A thread of its own looks for failures elsewhere, as the meta step's may be waiting in a collective. It has a
    connection of its own to the store, as the meta step's may be waiting there; and it goes on from meta step to meta
    step: to start one takes half a millisecond."""
    global _thread
    with _begins_or_ends:
        _watching.append(attendance)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_watch, name="sama_kernels: failures of other ranks", daemon=True)
            _thread.start()
    try:
        yield
    finally:
        with _begins_or_ends:
            _watching.remove(attendance)


def _watch() -> None:
    global _thread
    idle_since, failed = time.monotonic(), False
    while True:
        time.sleep(0.001 if failed else LOOK)
        failed = _look()
        with _begins_or_ends:
            if _watching:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > IDLE:
                _thread = None
                return


def _look() -> bool:
    """Whether a rank has failed. A function of its own, so that no group is kept between looks."""
    with _begins_or_ends:
        watching = [*_watching]
    failed = False
    for attendance in watching:
        with suppress(RuntimeError):  # the store is gone, and with it whoever would read there
            failed = attendance.look() or failed
    return failed


class _Log:
    """What a rank has published.

    Attributes:
        calls: by the name of a group, in order.
        members: of these groups.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.state = "running"
        self.calls: dict[str, list[tuple[str, list[Any]]]] = {}
        self.members: dict[str, list[int]] = {}
        self._read = 0
        self._heard = time.monotonic()

    def read(self, store: Any, here: str) -> bool:
        """Whether there was news.

        Raises:
            CannotStandIn: the rank is silent.
        """
        if self.state != "running":
            return False
        key = f"{here}/log/{self.rank}/{self._read}"
        if not store.check([key]):
            if time.monotonic() - self._heard > SILENCE:
                raise CannotStandIn(f"rank {self.rank} has been silent for {SILENCE:.0f} s")
            return False
        message = json.loads(store.get(key))
        self._read, self._heard, self.state = self._read + 1, time.monotonic(), message["state"]
        self.members |= message["groups"]
        for name, group, arguments in message["calls"]:
            self.calls.setdefault(group, []).append((name, arguments))
        return True

    def is_beyond(self, other: _Log) -> bool:
        """Whether this rank has launched a collective that only a stand-in has made for the other one."""
        return any(
            len(calls) > len(other.calls.get(group, ()))
            for group, calls in self.calls.items()
            if other.rank in self.members[group]
        )


def _group_named(name: str) -> Any:
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def _groups_with(rank: int, logs: Iterable[_Log]) -> list[str]:
    members = {group: ranks for log in logs for group, ranks in log.members.items()}
    return [group for group, ranks in members.items() if rank in ranks]


def _wait(until: Callable[[], bool], whom: str) -> None:
    begun = time.monotonic()
    while not until():
        if time.monotonic() - begun > SILENCE:
            raise CannotStandIn(f"{whom} have been silent for {SILENCE:.0f} s")
        time.sleep(0.001)
