"""Buckets leave while the backward pass is still running, and nothing reads them before they are back.

The last tests are for NCCL on one GPU; their code runs here on the CPU as well, with gloo.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel import Divided
from problems import flat, relative_error
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sama_kernels as sk
from sama_kernels.distributed import reduction

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
CYCLES = 500_000_000  # a quarter of a second of a GPU


def _order(rank: int, world: int) -> list[str]:
    """The collectives of a meta step, and where the backward passes are between them: at the inputs of which layer."""
    torch.manual_seed(0)
    log: list[str] = []
    net, weigher = (_layers(name, log) for name in ("theta", "lambda"))
    x, y = torch.randn(8, 4).double(), torch.randn(8, 1).double()

    def base_loss() -> Tensor:
        return (torch.sigmoid(weigher(x)) * (net(x) - y).square()).mean()

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    base_loss().backward()
    optimizer.step()
    all_reduce = reduction.dist.all_reduce

    def logged(flat: Tensor, **kwargs: Any) -> Any:
        log.append(f"send {flat.numel()}")
        return all_reduce(flat, **kwargs)

    reduction.dist.all_reduce = logged  # type: ignore[assignment]
    log.clear()
    sk.meta_grad(
        base_loss, lambda: (net(x) - y).square().mean(), base_params=net, meta_params=weigher, optimizer=optimizer,
        alpha=0.1, sync="full", bucket_mib=5 * 8 / 2**20, group=dist.group.WORLD,
    )  # fmt: skip
    return log


def _layers(name: str, log: list[str]) -> nn.Module:
    """Three layers that log when a backward pass has come to their input."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def mark(layer: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda grad: log.append(f"{name} {layer}"))

        return hook

    for layer in ("2", "4"):
        module.get_submodule(layer).register_forward_pre_hook(mark(layer))
    return module


def test_buckets_leave_while_the_backward_pass_runs() -> None:
    """Buckets of 5 numbers: the last layer, and then one tensor each."""
    (log,) = run_ranks(1, _order)
    reduced = ["send 5", "{0} 4", "send 4", "send 16", "{0} 2", "send 4", "send 16"]
    passes = [[entry.format(name) for entry in reduced] for name in ("theta", "lambda")]
    status = ["send 6"]
    assert log == [*passes[0], "lambda 4", "lambda 2", *passes[1], *status]  # nothing leaves in the second pass


def _one_rank(rank: int, world: int, device: str) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for sync in ("full", "final"):
        for options in ({}, {"update_base": True}, {"microbatches": True}, {"difference": "forward"}):
            for group in (None, dist.group.WORLD):
                problem = Divided(device=device)
                optimizer = problem.optimizer(2)
                problem.train(optimizer)
                out = problem.meta_grad(optimizer, sync=sync, group=group, bucket_mib=1e-4, **options)
                key = f"{sync} {options}"
                found.setdefault(key, []).append(flat([*out.grads, out.norm[None], *problem.net.parameters()]).cpu())
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_that_talks_to_itself(device: str) -> None:
    (found,) = run_ranks(1, _one_rank, device, backend=BACKENDS[device])
    assert len(found) == 8
    for alone, grouped in found.values():
        assert relative_error(grouped, alone) < 1e-12


def _wrapped(rank: int, world: int, device: str, kind: str) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for options in ({}, {"sync": "full"}, {"sync": "full", "update_base": True}, {"difference": "forward"}):
        for wrapped in (False, True):
            problem = Divided(device=device)
            if wrapped and kind == "ddp":
                problem.net = DistributedDataParallel(problem.net)  # type: ignore[assignment]
            elif wrapped:
                mesh = init_device_mesh(device, (1,))
                for part in (problem.net[0], problem.net[2], problem.net):
                    fully_shard(part, mesh=mesh)
            optimizer = torch.optim.AdamW(problem.net.parameters(), lr=0.01)
            problem.train(optimizer)
            out = problem.meta_grad(optimizer, group=dist.group.WORLD, bucket_mib=1e-4, **options)
            theta: list[Any] = list(problem.net.parameters())
            local = [p.to_local() if kind == "fsdp" and wrapped else p for p in theta]
            found.setdefault(str(options), []).append(flat([*out.grads, out.norm[None], *local]).cpu())
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("device", DEVICES)
def test_wrapped_models_of_one_rank(device: str, kind: str) -> None:
    (found,) = run_ranks(1, _wrapped, device, kind, backend=BACKENDS[device])
    for bare, wrapped in found.values():
        assert relative_error(wrapped, bare) < 1e-12


def _without_waiting(rank: int, world: int, device: str) -> None:
    problem = Divided(device=device)
    optimizer = torch.optim.AdamW(problem.net.parameters(), lr=0.01, capturable=device == "cuda")
    problem.train(optimizer)
    for attempt in range(3):
        if device == "cuda" and attempt == 2:  # the ranks agree, and kernels are loaded, before
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        for sync in ("final", "full"):  # the second one waits for the end of the first, which this mode does not see
            problem.meta_grad(optimizer, sync=sync, group=dist.group.WORLD, hold="center", weight=(3.0, 2.0))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_never_waits(device: str) -> None:
    run_ranks(1, _without_waiting, device, backend=BACKENDS[device])


class SlowSum:
    """Instead of a collective: the sum of two equal ranks, after a while, on the stream that it is called on."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def __call__(self, flat: Tensor, group: Any, async_op: bool) -> Any:
        assert async_op
        if flat.device.type == "cuda":
            torch.cuda._sleep(CYCLES)
            self.ends.append(torch.cuda.current_stream().record_event())
        flat.mul_(2)
        return self

    def wait(self) -> None:
        """It has run on this stream."""


def _slow(rank: int, world: int, device: str) -> None:
    torch.manual_seed(0)
    params = [torch.randn(n, device=device, dtype=torch.float64, requires_grad=True) for n in (3, 1000, 5)]
    loss = sum((p.square().sum() for p in params), torch.zeros((), device=device, dtype=torch.float64))
    slow = SlowSum()
    reduction.dist.all_reduce = slow  # type: ignore[assignment]
    reduced = reduction.OverlappedReduction(dict(enumerate(params)), params[0].device, None, 1e-9)
    if device == "cuda":
        torch.ones(1, device=device, dtype=torch.float64).mul_(2)  # to load a kernel may take a wait
        torch.cuda.synchronize()
    for row, grad in reversed(list(enumerate(torch.autograd.grad(loss, params)))):
        reduced.view(row).copy_(grad)
        reduced.ready(row)
    if device == "cuda":
        backward_done = torch.cuda.current_stream().record_event()
        backward_done.synchronize()
        assert not slow.ends[-1].query()  # the compute stream went on while the sums were under way
    reduced.wait()
    results = [reduced.view(row) * 1 for row in range(3)]  # enqueued at once: the stream has to wait, not the host
    if device == "cuda":
        assert not slow.ends[-1].query()
    for p, result in zip(params, results, strict=True):
        assert torch.equal(result, 4 * p.detach())


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_not_read_before_they_are_there(device: str) -> None:
    run_ranks(1, _slow, device, backend=BACKENDS[device])
