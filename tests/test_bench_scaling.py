"""bench.scaling: the bytes that it counts against closed forms and the kernel's counters, its traces, the program."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sama_kernels as sk
from bench import collectives, measure, scaling, scaling_report
from bench.collectives import Collectives, bytes_written, common, overlap, union

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
THETA, LAMBDA = 4 * 8 + 8 + 8 * 2 + 2, 1 * 6 + 6 + 6 * 1 + 1
needs_counters = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's counters of bytes")


class Tiny:
    """A net whose tensors two ranks can halve, and a weight net on its losses."""

    def __init__(self, mode: str, rank: int) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.weigher = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1), nn.Sigmoid())
        torch.manual_seed(rank)
        self.x = torch.randn(2, 3, 4)
        if mode == "ddp":
            self.net = DistributedDataParallel(self.net)
        elif mode == "fsdp2":
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer)
            fully_shard(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)

    def losses(self, k: int) -> Tensor:
        return self.net(self.x[k]).square().sum(1)

    def base_loss(self) -> Tensor:
        losses = self.losses(0)
        return (self.weigher(sk.stop_gradient(losses)[:, None])[:, 0] * losses).mean()

    def base_step(self) -> None:
        self.optimizer.zero_grad()
        self.base_loss().backward()
        self.optimizer.step()

    def meta_step(self, **options: Any) -> None:
        sk.meta_grad(
            self.base_loss, lambda: self.losses(1).mean(), base_params=self.net, meta_params=self.weigher,
            optimizer=self.optimizer, alpha=0.1, hold="center", **options,
        )  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"sync": "none"},
    "final": {"sync": "final"},
    "full": {"sync": "full"},
    "final, update": {"sync": "final", "update_base": True},
    "full, update": {"sync": "full", "update_base": True},
    "final, weighted": {"sync": "final", "weight": 3.0},
    "final, small buckets": {"sync": "final", "bucket_mib": 1e-9},
}


def _counts(rank: int, world: int, mode: str) -> dict[str, tuple[int, float]]:
    tiny = Tiny(mode, rank)
    steps: dict[str, Any] = {"base": tiny.base_step}
    for name, options in OPTIONS.items():
        if mode != "fsdp2" or "update" not in name:
            steps[name] = lambda options=options: tiny.meta_step(**options)
    found = {}
    for _ in range(3):
        tiny.base_step()
    for name, step in steps.items():
        step()  # the ranks agree on shapes
        tiny.base_step()
        with Collectives(world, "gloo") as counted:
            step()
        found[name] = (counted.payload, counted.on_wire)
    return found


@cache
def counts(mode: str, world: int) -> list[dict[str, tuple[int, float]]]:
    return run_ranks(world, _counts, mode)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("mode", ["plain", "ddp"])
def test_bytes_of_replicated_parameters(mode: str, world: int) -> None:
    """lambda in the last pass, theta in the first where v has to be the same, and how it went, once."""
    status = 8 * (3 * world + 3)
    moved = 4 * LAMBDA + status
    expected = {
        "base": 4 * THETA if mode == "ddp" else 0,
        "none": 0, "final": moved, "full": moved + 4 * THETA, "final, update": moved + 4 * THETA,
        "full, update": moved + 4 * THETA, "final, weighted": moved + 2 * 8, "final, small buckets": moved,
    }  # fmt: skip
    for found in counts(mode, world):
        assert {name: payload for name, (payload, _) in found.items()} == expected
        for payload, wire in found.values():
            assert wire == pytest.approx(2 * (world - 1) / world * payload)


def test_bytes_of_sharded_parameters() -> None:
    """A base step gathers theta twice and scatters its gradients; a meta step gathers it in three forward passes and
    the first backward pass, and sums the norm and lambda."""
    gathered, scattered, norm, status = 4 * THETA, 4 * THETA, 8, 8 * 9
    for found in counts("fsdp2", 2):
        assert found["base"] == (2 * gathered + scattered, gathered + scattered)
        passes, held = 4 * gathered + scattered, gathered  # the values to hold are found in one more forward pass
        assert found["none"] == (passes + held + norm, (4 * gathered + held) / 2 + scattered + norm)
        for name in ("final", "full", "final, small buckets"):
            assert found[name][0] - found["none"][0] == 4 * LAMBDA + status
            assert found[name][1] - found["none"][1] == pytest.approx(4 * LAMBDA + status)


def _written(rank: int, world: int) -> dict[str, tuple[float, int]]:
    whole, part = torch.ones(300_000), torch.ones(300_000 // world)
    pieces = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "gather": lambda: dist.all_gather_into_tensor(whole, part),
        "scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
    }
    found = {}
    for name, collective in pieces.items():
        collective()
        dist.barrier()
        before = bytes_written()
        with Collectives(world, "gloo") as counted:
            collective()
        after = bytes_written()
        dist.barrier()
        assert before is not None and after is not None
        found[name] = (counted.on_wire, after - before)
    return found


@needs_counters
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ring_formula_is_what_gloo_writes(world: int) -> None:
    """But for headers of 48 bytes per message; of a broadcast, which is a tree, on average over the ranks."""
    ranks = run_ranks(world, _written)
    for name in ("all_reduce", "gather", "scatter"):
        for found in ranks:
            expected, written = found[name]
            assert expected <= written < 1.01 * expected
    total = sum(found["broadcast"][1] for found in ranks)
    assert sum(found["broadcast"][0] for found in ranks) <= total < 1.01 * (world - 1) * 4 * 300_000


def _overlaps(rank: int, world: int) -> dict[str, tuple[float, float]]:
    values, matrix = torch.ones(8_000_000), torch.ones(1500, 1500)

    def waits() -> None:
        dist.all_reduce(values, async_op=True).wait()
        matrix @ matrix

    def hides() -> None:
        work = dist.all_reduce(values, async_op=True)
        for _ in range(4):
            matrix @ matrix
        work.wait()

    works = {"nothing": lambda: matrix @ matrix, "waits": waits, "hides": hides}
    return {name: overlap(lambda: dist.all_reduce(values), work, CPU) for name, work in works.items()}


def test_what_is_hidden_is_seen() -> None:
    for found in run_ranks(2, _overlaps):
        assert found["nothing"] == (0.0, 0.0)
        running, hidden = found["waits"]
        assert hidden < 0.1 * running and running > 1e-3
        running, hidden = found["hides"]
        assert 0.5 * running < hidden <= running and running > 1e-3


@pytest.mark.parametrize("seed", range(30))
def test_intervals(seed: int) -> None:
    draw = random.Random(seed)

    def drawn() -> list[tuple[int, int]]:
        return [(a, a + draw.randint(1, 12)) for a in (draw.randint(0, 60) for _ in range(draw.randint(0, 8)))]

    def points(intervals: list[tuple[int, int]]) -> set[int]:
        return {x for a, b in intervals for x in range(a, b)}

    first, second = drawn(), drawn()
    for made, expected in (
        (union(first), points(first)),
        (common(union(first), union(second)), points(first) & points(second)),
    ):
        assert points(made) == expected and sum(b - a for a, b in made) == len(expected) and made == sorted(made)
    assert collectives.seconds(union(first)) == pytest.approx(len(points(first)) / 1e9)


def test_groups() -> None:
    """Each number of processes, and one process with as many threads as each of theirs."""
    assert scaling.groups([1, 2, 4], 2, on_gpu=False) == [(1, 2), (1, 1), (2, 1), (4, 1)]
    assert scaling.groups([2, 4], 8, on_gpu=False) == [(1, 4), (1, 2), (2, 4), (4, 2)]
    assert scaling.groups([1, 2], 16, on_gpu=True) == [(1, 16), (2, 8)]


def part(sync: str | None, seconds: list[float], busy: float, hidden: float) -> dict[str, Any]:
    """A step as a rank reports it."""
    return {
        "kind": "step", "mode": "ddp", "lambda": "small", "step": "meta" if sync else "base", "sync": sync,
        "seconds": seconds, "collectives": 2, "payload_bytes": 100, "bytes_on_wire": 100.0, "bytes_written": 110,
        "collective_s": [busy], "hidden_s": [hidden], "peak_memory": int(1e6 * busy), "theta_elements": 10,
        "lambda_elements": 3,
    }  # fmt: skip


def test_a_step_takes_as_long_as_on_its_slowest_rank() -> None:
    first = [part(None, [1.0, 2.0, 3.0], 4.0, 1.0), part("full", [2.0, 2.0, 2.0], 4.0, 4.0)]
    second = [part(None, [2.0, 1.0, 1.0], 1.0, 0.0), part("full", [1.0, 6.0, 3.0], 1.0, 0.0)]
    base, meta = scaling.combined([first, second], {"processes": 2, "samples": 16})
    assert base["median_s"] == 2.0 and base["samples_per_s"] == 8.0 and base["peak_memory"] == 4_000_000
    assert base["hidden_share"] == pytest.approx(0.2) and meta["hidden_share"] == pytest.approx(0.8)
    assert base["collective_s"] == 2.5 and base["rounds"] == 3 and "over_base" not in base
    assert meta["median_s"] == 3.0 and meta["over_base"]["median"] == pytest.approx(1.0)  # of 2/2, 6/2, 3/3
    assert meta["training_samples_per_s"] == pytest.approx(160 / 26)  # of 22, 26, 33 seconds


@cache
def quick(folder: str) -> tuple[list[dict[str, Any]], str]:
    """The records and the output of the program."""
    page = Path(folder) / "page.md"
    page.write_text(f"before\n{scaling_report.BEGIN}\nold\n{scaling_report.END}\nafter\n")
    command = [sys.executable, "-m", "bench.scaling", "--quick", "--out", folder, "--write", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (Path(folder) / "scaling_cpu.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes as many processes as GPUs")
def test_program(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("scaling")
    records, printed = quick(str(folder))
    steps, links = ([r for r in records if r["kind"] == kind] for kind in ("step", "link"))
    assert [r["bytes"] for r in links] == list(scaling.QUICK_LINK_BYTES) and all(r["processes"] == 2 for r in links)
    assert all(r["seconds"] > 0 for r in links)
    assert all(r["machine"]["versions"]["torch"] == torch.__version__ and r["machine"]["commit"] for r in records)
    both = {(r["mode"], r["lambda"], r["sync"]): r for r in steps if r["processes"] == 2}
    syncs = (None, "none", "final", "full", "none, then all_reduce")
    wanted = {(mode, lam, sync) for mode in ("ddp", "fsdp2") for lam in ("small", "large") for sync in syncs}
    assert set(both) == wanted - {("fsdp2", "large", "none, then all_reduce")}
    alone = [r for r in steps if r["processes"] == 1]
    assert {r["threads"] for r in alone} == {r["threads"] for r in both.values()}
    assert all(r["bytes_on_wire"] == 0 and r["hidden_share"] is None for r in alone) and len(alone) == 8
    for r in steps:
        assert 0 < r["p10_s"] <= r["median_s"] <= r["p90_s"] and r["rounds"] == 3
        assert r["samples_per_s"] == pytest.approx(r["samples"] / r["median_s"])
        assert r["peak_memory"] > 4 * (2 * r["theta_elements"] + r["theta_elements"]) / r["processes"]  # theta, m, w
        assert ("over_base" in r) == ("training_samples_per_s" in r) == (r["step"] == "meta")
    for lam in ("small", "large"):
        sent = {sync: both["ddp", lam, sync]["payload_bytes"] for sync in syncs}
        theta, elements = (both["ddp", lam, None][f"{name}_elements"] for name in ("theta", "lambda"))
        assert elements == {"small": 301, "large": 2 * (4 * 128**2 + 2 * 128 * 512)}[lam]
        buffers = 2 * 512 * 8  # that DistributedDataParallel broadcasts before the forward pass
        assert sent == {
            None: 4 * theta + buffers, "none": 0, "final": 4 * elements + 72, "full": 4 * (elements + theta) + 72,
            "none, then all_reduce": 4 * elements,
        }  # fmt: skip
    for r in both.values():
        assert r["hidden_share"] is None or 0 <= r["hidden_share"] <= 1
        if r["bytes_on_wire"] > 1e5 and r["bytes_written"] is not None:
            assert r["bytes_on_wire"] <= 1.001 * r["bytes_written"] <= 1.01 * r["bytes_on_wire"]
    assert "--quick: a trial, not a result" in printed and "| FSDP2 | meta, none, then all_reduce |" in printed
    assert "| 2 | fsdp2 | large | meta, full |" in printed or "No prediction" in printed
    page = (folder / "page.md").read_text()
    assert page == f"before\n{scaling_report.BEGIN}\n{printed}{scaling_report.END}\nafter\n"
    assert (folder / "scaling_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_oversubscribed_processes_are_marked() -> None:
    row = {
        **scaling.combined([[part(None, [1.0] * 3, 1.0, 0.0)]] * 4, {"processes": 4, "samples": 4})[0],
        "threads": 1, "cpus": 2, "device": "cpu", "oversubscribed": True,
    }  # fmt: skip
    assert "| 4 × 1 thread ⚠ | DDP | base step |" in scaling_report.table([row])
    assert "**4 processes on 2 CPUs are oversubscribed" in scaling_report.warning([row])
    assert "not scaling" in scaling_report.warning([row])


@pytest.mark.parametrize(("load", "said"), [(0.9, False), (1.1, True)])
def test_a_disturbed_run_is_marked(load: float, said: bool) -> None:
    assert measure.disturbed({"load": load, "cpus": 2}) == said


def test_what_is_kept_is_what_the_page_says() -> None:
    kept = ROOT / "bench" / "results" / "scaling_cpu.jsonl"
    page = (ROOT / "docs" / "scaling_model.md").read_text()
    assert f"{scaling_report.BEGIN}\n{scaling_report.markdown(kept)}\n{scaling_report.END}" in page


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--processes", "0"], "--processes: at least 1"),
        (["--strong", "--processes", "1", "7"], "--strong: 7 processes cannot divide a batch of 48"),
        (["--rounds", "2"], "--rounds: at least 3"),
    ],
)
def test_wrong_arguments(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.parse(arguments)
    assert why in capsys.readouterr().err


def test_a_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        scaling_report.main([str(tmp_path / "scaling_cpu.jsonl")])
    assert exit_.value.code == 1 and "bench.scaling_report: " in capsys.readouterr().err
