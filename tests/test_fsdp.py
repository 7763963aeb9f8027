"""Sharded parameters (fully_shard, HSDP, tensor parallelism): whole trainings against one process in float64."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from parallel import Divided, bits_of
from problems import flat, relative_error
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sama_kernels as sk

ROUNDS = 4
ALL = -1  # ranks
# Not on three ranks, over which torch divides no 8 features.
ON_MESHES = {2: ["tensor parallel"], 4: ["tensor parallel", "HSDP", "tensor parallel in FSDP"]}
SHARDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "gathered after forward": {"reshard_after_forward": False},
    "offloaded": {"offload": True},
    "root only": {"root_only": True},
    "lambda too": {"shard_lambda": True},
    "lambda alone": {"shard_theta": False, "shard_lambda": True},
    "unequal batches": {"unequal": True},
    "unequal, lambda too": {"unequal": True, "shard_lambda": True, "explicit": True},
    "explicit": {"explicit": True},
    "update": {"update_base": True},
    "forward": {"difference": "forward", "update_base": True},
    "relative alpha": {"alpha": sk.relative(0.01)},
    "microbatches": {"microbatches": True},
    "clipping": {"clip_value": 0.02},
    "SAMA-NA": {"adaptation": "none"},
    "SGD": {"case": 1},
    "NAdam": {"case": 5},
    "final": {"sync": "final"},
}
MESHES: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_parallel": (ALL,)},
    "HSDP": {"mesh": (2, 2)},
    "tensor parallel in FSDP": {"tensor_parallel": (2, 2)},
}


def training(
    rank: int,
    world: int,
    *,
    mesh: tuple[int, ...] = (),
    tensor_parallel: tuple[int, ...] = (),
    reshard_after_forward: bool = True,
    root_only: bool = False,
    offload: bool = False,
    shard_theta: bool = True,
    shard_lambda: bool = False,
    unequal: bool = False,
    explicit: bool = False,
    case: int = 2,
    **options: Any,
) -> dict[str, Tensor]:
    """Base steps and meta steps; world 0: one process on the whole batch."""
    tensor_parallel = tuple(world if ranks == ALL else ranks for ranks in tensor_parallel)
    copies = world // (tensor_parallel[-1] if tensor_parallel else 1)  # ranks with batches of their own
    problem = Divided(rank * copies // max(world, 1), max(copies, 1), unequal=unequal)
    problem.explicit = explicit
    options = {"sync": "full", "microbatches": False, "difference": "central", **options}
    if world:
        if tensor_parallel:
            names = ("data", "tensor")[-len(tensor_parallel) :]
            device_mesh = init_device_mesh("cpu", tensor_parallel, mesh_dim_names=names)
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(problem.net, device_mesh["tensor"], plan)
            if len(tensor_parallel) == 2:
                fully_shard(problem.net, mesh=device_mesh["data"])
        elif shard_theta:
            kwargs: dict[str, Any] = {"reshard_after_forward": reshard_after_forward}
            if offload:  # of a mesh of CPUs: nothing is elsewhere
                kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
            if mesh:
                kwargs["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replica", "shard"))
            for layer in () if root_only else (problem.net[0], problem.net[2]):
                fully_shard(layer, **kwargs)
            fully_shard(problem.net, **kwargs)
        if shard_lambda:
            fully_shard(problem.weigher)
        if unequal:
            options["weight"] = problem.weight
    optimizer = problem.optimizer(case)
    meta_optimizer = torch.optim.SGD(problem.weigher.parameters(), lr=1.0)
    epsilons, losses = [], []
    for step in range(ROUNDS):
        optimizer.zero_grad()
        share = problem.weight[0] / 24 * copies if world and unequal else 1.0
        (problem.base_loss() * share).backward()
        if world and not shard_theta and not tensor_parallel:
            for p in problem.net.parameters():
                torch.distributed.all_reduce(p.grad)
                p.grad /= world
        optimizer.step()
        meta_optimizer.zero_grad()
        if step == 0:  # D of Adam is 0, but for rounding
            continue
        before = [(p, p.grad, local_bits(p), local_bits(p.grad)) for p in problem.net.parameters()]
        out = problem.meta_grad(optimizer, **options)
        for p, grad, theta, values in before:
            assert p.grad is grad and torch.equal(local_bits(grad), values) and p.requires_grad
            assert torch.equal(local_bits(p), theta) != bool(options.get("update_base")) or not theta.numel()
        for p, g in zip(problem.weigher.parameters(), out.grads, strict=True):
            assert isinstance(g, DTensor) == isinstance(p, DTensor)
            p.grad = g
        meta_optimizer.step()
        epsilons.append(out.epsilon)
        losses.append(torch.stack([out.meta_loss, out.base_loss_plus, out.base_loss_minus]))
    return {
        "theta": flat([whole(p) for p in problem.net.parameters()]),
        "lam": flat([whole(p) for p in problem.weigher.parameters()]),
        "epsilon": torch.stack(epsilons),
        "losses": torch.cat(losses),
    }


def local_bits(x: Any) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach().clone()


def whole(x: Any) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def trainings(rank: int, world: int, which: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: training(rank, world, **options) for name, options in which.items()}


@cache
def results(world: int, meshes: bool) -> list[dict[str, Any]]:
    return run_ranks(world, trainings, {n: MESHES[n] for n in ON_MESHES[world]} if meshes else SHARDED)


@cache
def expected(name: str) -> dict[str, Tensor]:
    skipped = (
        "mesh",
        "tensor_parallel",
        "reshard_after_forward",
        "root_only",
        "offload",
        "shard_theta",
        "shard_lambda",
        "unequal",
    )
    options = {**SHARDED, **MESHES}[name]
    return training(0, 0, **{k: v for k, v in options.items() if k not in skipped})


@pytest.mark.parametrize(
    ("world", "name"), [(world, n) for world in (2, 3, 4) for n in (*SHARDED, *ON_MESHES.get(world, []))]
)
def test_a_training_is_that_of_one_process(world: int, name: str) -> None:
    alone = expected(name)
    assert relative_error(alone["lam"], flat(bits_of(list(Divided().weigher.parameters())))) > 1e-3
    for rank in results(world, name in MESHES):
        for key in ("theta", "lam", "losses", "epsilon"):
            assert relative_error(rank[name][key], alone[key]) < 1e-9, key
            assert torch.equal(rank[name][key], results(world, name in MESHES)[0][name][key])


def _gathers(rank: int, world: int) -> list[list[int]]:
    """What FSDP gathers in base steps before and after a meta step."""
    problem = Divided(rank, world)
    for layer in (problem.net[0], problem.net[2], problem.net):
        fully_shard(layer)
    optimizer = problem.optimizer(0)
    gathered: list[int] = []
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(torch.distributed, name)  # the first since torch 2.13

    def counted(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        gathered.append(output.numel())
        return gather(output, *args, **kwargs)

    setattr(torch.distributed, name, counted)
    steps = []
    for step in range(5):
        gathered.clear()
        problem.base_loss().backward()
        optimizer.step()
        steps.append(list(gathered))
        if step == 2:
            problem.meta_grad(optimizer)
    return steps


def test_the_base_step_after_a_meta_step_gathers_what_others_do() -> None:
    for _, *steps in run_ranks(2, _gathers):
        assert steps[0] and steps == [steps[0]] * 4


FACTOR = 0.5


def _divided_by(rank: int, world: int, shard_lambda: bool) -> Tensor:
    """The meta gradient after base steps whose gradients FSDP divides by FACTOR; world 0: one process, the same."""
    problem = Divided(rank, max(world, 1))
    scale = 1.0 if world else 2 / FACTOR  # of the base gradients, which are averages of two ranks otherwise
    if world:
        for module in (problem.net[0], problem.net, *([problem.weigher] if shard_lambda else [])):
            fully_shard(module)
        problem.net[0].set_gradient_divide_factor(FACTOR)
        problem.net.set_gradient_divide_factor(FACTOR)
    optimizer = problem.optimizer(2)
    for _ in range(3):
        optimizer.zero_grad()
        (problem.base_loss() * scale).backward()
        optimizer.step()
    loss = problem.base_loss
    problem.base_loss = lambda: loss() * scale
    out = problem.meta_grad(optimizer, sync="full" if world else "none")
    return flat([whole(g) for g in out.grads])


@pytest.mark.parametrize("shard_lambda", [False, True])
def test_a_gradient_divide_factor_is_part_of_the_base_step(shard_lambda: bool) -> None:
    """The optimizer sees gradients that are larger by a factor, and so does the chain rule: d goes the same way."""
    alone = _divided_by(0, 0, shard_lambda)
    for found in run_ranks(2, _divided_by, shard_lambda):
        assert relative_error(found, alone) < 1e-9
