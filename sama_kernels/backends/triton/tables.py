"""Lists of tensors as tables of addresses on the device: one launch for all tensors of the same dtypes.

The host's side; the kernels' side is chunks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import or_

import torch
import triton
from torch import Tensor

from sama_kernels.backends.arguments import share_dense_layout
from sama_kernels.upload import is_capturing, upload

_ALIGNMENT = 16
_MANY = 2**24
# Tables that a CUDA graph reads, whatever the cache below forgets: torch does not say when a graph is gone.
_captured: dict[int, tuple[Tensor, Tensor]] = {}


@dataclass(frozen=True)
class Group:
    """The tensors of a list that one launch serves: those of the same dtypes and the same alignment.

    rows: int64 (tensors, 2 + operands): number of elements, position in the caller's list, address of each operand.
    chunks: int64 (programs,): row << 32 | number of the chunk in its tensor.
    """

    rows: Tensor
    chunks: Tensor
    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    block: int
    blocks: int

    @property
    def programs(self) -> int:
        return self.chunks.numel()


class Operands:
    """The operands of one call as flat memory, grouped for launching.

    Where all operands of a tensor share one dense layout, its elements are numbered in memory order; otherwise in
    row-major order, and what is not contiguous takes part as a contiguous copy, which `copy_back` brings home.

    Arguments:
        op: prefixes the messages.
        lists: the operands by name, checked: same lengths and shapes.
        written: names of the lists that the kernel writes to.
        codes: further lists by name, checked: contiguous tensors of shapes of their own that number the elements in
            row-major order, so that no other order will do for the operands.
        others: lists of tensors of which the kernel wants nothing but the addresses, such as step counters.
    Raises:
        RuntimeError: not all of them are on one device that Triton can use.
    """

    def __init__(
        self,
        op: str,
        lists: dict[str, Sequence[Tensor]],
        written: Sequence[str],
        codes: dict[str, Sequence[Tensor]] | None = None,
        others: dict[str, Sequence[Tensor]] | None = None,
    ) -> None:
        codes, others = codes or {}, others or {}
        self._written: list[tuple[Tensor, Tensor]] = []  # (the caller's tensor, its contiguous copy)
        self._kept: list[Tensor] = []  # copies that are only read: until the kernels are queued
        self.groups: list[Group] = []
        first = next(iter(lists.values()))
        if not first:
            return
        self.device = first[0].device
        _check_device(op, {**lists, **codes, **others}, self.device)
        vectors = [*self._flat(lists, written, any_order=not codes), *codes.values()]
        flat = [*vectors, *others.values()]
        numels = [x.numel() for x in first]
        addresses = [[x.data_ptr() for x in tensors] for tensors in flat]
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        for (dtypes, aligned), members in _grouped(flat, numels, addresses[: len(vectors)]).items():
            columns = [numels, range(len(first)), *addresses]
            if members is not None:
                columns = [[column[i] for i in members] for column in columns]
            block, blocks = _configuration(dtypes, sum(columns[0]))
            table, chunks = _tables(self.device, stream, tuple(map(tuple, columns)), block * blocks)
            if is_capturing(self.device):
                _captured[id(table)] = (table, chunks)
            self.groups.append(Group(table, chunks, dtypes, aligned, block, blocks))

    @property
    def programs(self) -> int:
        return sum(group.programs for group in self.groups)

    def copy_back(self) -> None:
        """Bring what the kernels wrote into contiguous copies to where it belongs."""
        for original, copy in self._written:
            original.copy_(copy)

    def _flat(
        self, lists: dict[str, Sequence[Tensor]], written: Sequence[str], any_order: bool
    ) -> Sequence[Sequence[Tensor]]:
        """The lists, with contiguous copies where a tensor's operands do not share a dense layout."""
        if all(x.is_contiguous() for tensors in lists.values() for x in tensors):
            return list(lists.values())
        flat = {name: list(tensors) for name, tensors in lists.items()}
        for i in range(len(next(iter(flat.values())))):
            if any_order and share_dense_layout([tensors[i] for tensors in flat.values()]):
                continue
            for name, tensors in flat.items():
                x = tensors[i].detach()
                tensors[i] = x.contiguous()
                if not x.is_contiguous() and name in written:
                    self._written.append((x, tensors[i]))
                self._kept.append(tensors[i])
        return list(flat.values())


def _check_device(op: str, lists: dict[str, Sequence[Tensor]], device: torch.device) -> None:
    first_name = next(iter(lists))
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise RuntimeError(f"sama::{op}_triton: {first_name}[0] is on {device}, but Triton needs CUDA tensors")
    for name, tensors in lists.items():
        devices = [x.device for x in tensors]
        if devices.count(device) == len(devices):
            continue
        for i, x in enumerate(tensors):
            if x.device != device:
                raise RuntimeError(f"sama::{op}: {name}[{i}] is on {x.device}, but {first_name}[0] is on {device}")


def _grouped(
    flat: Sequence[Sequence[Tensor]], numels: Sequence[int], addresses: Sequence[Sequence[int]]
) -> dict[tuple[tuple[torch.dtype, ...], bool], list[int] | None]:
    """The positions of the tensors with elements by their dtypes and whether all of `addresses` are aligned, in the
    order of the lists; None for all of them."""
    dtypes_of = [[x.dtype for x in tensors] for tensors in flat]
    bits: Sequence[int] = addresses[0]  # those that are set in any address of a tensor
    for column in addresses[1:]:
        bits = list(map(or_, bits, column))
    aligned_of = [bit % _ALIGNMENT == 0 for bit in bits]
    if all(numels) and all(aligned_of) and all(own.count(own[0]) == len(own) for own in dtypes_of):  # the usual case
        return {(tuple(own[0] for own in dtypes_of), True): None}
    groups: dict[tuple[tuple[torch.dtype, ...], bool], list[int] | None] = {}
    for i, (numel, aligned, *dtypes) in enumerate(zip(numels, aligned_of, *dtypes_of, strict=True)):
        if numel:
            members = groups.setdefault((tuple(dtypes), aligned), [])
            assert members is not None
            members.append(i)
    return groups


def _configuration(dtypes: tuple[torch.dtype, ...], numel: int) -> tuple[int, int]:
    """(elements of a block, blocks of a chunk), for 128 threads.

    A function of sizes instead of `triton.autotune`, which runs the kernels to time them: in-place ones would change
    their tensors every time. 8 elements per thread are one 16-byte access in the 16-bit dtypes and two in float32;
    float64 needs the registers of two. Long lists take longer chunks, for fewer slots to sum and smaller tables.
    """
    return 512 if torch.float64 in dtypes else 1024, 16 if numel >= _MANY else 1


@lru_cache(maxsize=256)
def _tables(
    device: torch.device, stream: int, columns: tuple[tuple[int, ...], ...], chunk: int
) -> tuple[Tensor, Tensor]:
    """The rows, of which these are the columns, and chunks of a group on the device.

    Cached, because tensors rarely move between steps: parameters and optimizer state never do, gradients come back to
    the same place from torch's caching allocator. A table says nothing but where tensors are, and is found by that,
    so it cannot be out of date. Buckets have one each (17 for BERT-base). Per stream: the copy to the device is ordered
    before the kernels of its own only.
    """
    table = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()
    counts = (table[:, 0] + chunk - 1) // chunk
    row = torch.repeat_interleave(torch.arange(len(table), device="cpu"), counts)
    number = torch.arange(row.numel(), device="cpu") - (counts.cumsum(0) - counts)[row]
    both = upload(torch.cat([table.flatten(), row << 32 | number]), device)
    return both[: table.numel()].view(table.shape), both[table.numel() :]
