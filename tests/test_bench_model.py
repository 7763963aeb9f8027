"""The model of meta steps on many GPUs: closed forms, simulations of its sums, published figures, the program."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import alpha_beta, cases, model, model_checks
from bench.alpha_beta import H100, Cluster, Link
from bench.inputs import PRECISIONS
from bench.model_steps import BERT_BASE, LABEL, LAMBDAS, MODELS, MODES, SYNCS, Run, Step, base_step, meta_step
from bench.report import ReportError

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling_model.md"
ALL_REDUCES = (
    lambda *arguments: alpha_beta.ring(*arguments, rounds=2),
    alpha_beta.tree_all_reduce,
    alpha_beta.hierarchical_all_reduce,
    alpha_beta.all_reduce,
)
COLLECTIVES = (*ALL_REDUCES, alpha_beta.reduce_scatter, alpha_beta.all_gather)


def run(gpus: int, mode: str = "ddp", share: float = 0.3, which: Any = BERT_BASE, cluster: Cluster = H100) -> Run:
    return Run(which, cluster, gpus, mode, share, which.tokens)


@pytest.mark.parametrize("gpus", [2, 3, 8, 16, 64, 1024])
@pytest.mark.parametrize("collective", ALL_REDUCES)
def test_an_all_reduce_sends_what_it_must(collective: Any, gpus: int) -> None:
    cost = collective(H100, gpus, 1e9)
    assert cost.inside + cost.between == pytest.approx(2 * (gpus - 1) / gpus * 1e9, rel=1e-12)
    assert (cost.between > 0) == (gpus > 8)


@pytest.mark.parametrize("gpus", [2, 5, 8])
def test_a_ring_is_what_its_messages_take(gpus: int) -> None:
    """Ranks pass chunks on, one message at a time: sums, bytes and seconds of the simulation are those of the form."""
    link, size = Link(2e-6, 1e9), 4 * 5 * gpus * 7
    chunks = [[[random.random()] * (size // 4 // gpus) for _ in range(gpus)] for _ in range(gpus)]
    expected = [[sum(chunks[r][c][0] for r in range(gpus))] * (size // 4 // gpus) for c in range(gpus)]
    sent, seconds = [0] * gpus, 0.0
    for step in range(2 * (gpus - 1)):
        messages = [(r, (r - step) % gpus, chunks[r][(r - step) % gpus]) for r in range(gpus)]
        for r, c, values in messages:
            there = chunks[(r + 1) % gpus]
            adds = step < gpus - 1
            there[c] = [a + b for a, b in zip(there[c], values, strict=True)] if adds else list(values)
            sent[r] += 4 * len(values)
        seconds += link.alpha + 4 * len(messages[0][2]) / link.bandwidth
    for rank in chunks:
        for got, wanted in zip(rank, expected, strict=True):
            assert got == pytest.approx(wanted)
    cost = alpha_beta.ring(replace(H100, inside=link, start=0.0), gpus, size, rounds=2)
    assert set(sent) == {cost.inside} and cost.seconds == pytest.approx(seconds, rel=1e-12)


def test_the_latency_of_a_tree_grows_with_the_logarithm() -> None:
    nothing = [alpha_beta.tree_all_reduce(H100, 8 * 2**k, 0.0).seconds for k in range(1, 8)]
    steps = [b - a for a, b in itertools.pairwise(nothing)]
    assert steps == pytest.approx([2 * H100.between.alpha] * 6)
    assert alpha_beta.all_reduce(H100, 1024, 8) == alpha_beta.tree_all_reduce(H100, 1024, 8)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_alone_nothing_is_sent(collective: Any) -> None:
    assert collective(H100, 1, 1e9) == alpha_beta.Cost(0.0, 0.0, 0.0)
    for mode in MODES:
        for step in (base_step(run(1, mode)), *(meta_step(run(1, mode), sync, "large") for sync in SYNCS)):
            assert step.communication == step.exposed == step.inside == step.between == 0 < step.compute


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("gpus", [2, 8, 16, 1024])
def test_more_bytes_take_longer(collective: Any, gpus: int) -> None:
    costs = [collective(H100, gpus, 10.0**k).seconds for k in range(12)]
    assert all(a < b for a, b in itertools.pairwise(costs))


def test_nodes_are_full() -> None:
    with pytest.raises(ValueError, match="gpus: 12 is neither at most one node of 8"):
        alpha_beta.all_gather(H100, 12, 1e6)


@pytest.mark.parametrize("seed", range(50))
def test_what_is_exposed_is_what_a_timeline_leaves(seed: int) -> None:
    """Buckets behind a backward pass, and layers gathered before they are used: both against their events."""
    draw = random.Random(seed)
    behind, parts, seconds = draw.choice([0.0, draw.random()]), draw.randint(1, 20), draw.random() / 10
    line = 0.0
    for i in range(parts):
        line = max(line, (i + 1) * behind / parts) + seconds
    form = alpha_beta.exposed(behind, parts, seconds)
    assert form == pytest.approx(line - behind)
    computed = 0.0
    for i in range(parts):
        computed = max(computed, (i + 1) * seconds) + behind / parts
    assert form == pytest.approx(computed - behind)


@pytest.mark.parametrize("which", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_the_sum_of_its_parts(which: Any, mode: str) -> None:
    for gpus in (8, 64, 1024):
        r = run(gpus, mode, which=which)
        steps = [meta_step(r, sync, lam, move) for sync in SYNCS for lam in LAMBDAS for move in (False, True)]
        for step in (base_step(r), *steps):
            assert step.hidden + step.exposed == pytest.approx(step.communication, rel=1e-12)
            assert 0 <= step.exposed <= step.communication * (1 + 1e-12)
            assert step.seconds == pytest.approx(step.compute + step.element_wise + step.exposed, rel=1e-12)


def test_passes_and_element_wise_part() -> None:
    """3 F + 2 F for a small lambda, 9 F for a large one; 64 bytes per element, without `restore` where theta moves."""
    r = run(1)
    small, large, moved = meta_step(r), meta_step(r, lam="large"), meta_step(r, update_base=True)
    assert small.compute == pytest.approx(5 * r.forward) and large.compute == pytest.approx(9 * r.forward)
    assert r.forward == pytest.approx(2 * 85_646_592 * 4096 / (0.3 * 989.4e12))
    per_element = 109_482_240 / 3.35e12
    (stated,) = (op for op in cases.op_list(PRECISIONS["fp32"]) if op.name == "element_wise_part")
    assert stated.bytes_per_element == 64
    assert small.element_wise == pytest.approx(64 * per_element + 12 * 1e5 / 3.35e12)
    assert large.element_wise == pytest.approx(76 * per_element)
    assert small.element_wise - moved.element_wise == pytest.approx(12 * per_element)


def test_what_is_sent() -> None:
    """Elements on the wire per GPU, all of whose collectives send (p - 1) / p or 2 (p - 1) / p of them."""
    n, gpus = BERT_BASE.parameters, 64

    def sent(step: Step) -> float:
        return (step.inside + step.between) * gpus / (gpus - 1)

    ddp, fsdp = run(gpus), run(gpus, "fsdp2")
    assert meta_step(ddp, "none").communication == 0
    assert sent(meta_step(ddp, "final")) == pytest.approx(8e5)
    assert sent(meta_step(ddp, "final", "large")) == pytest.approx(8 * n)
    assert sent(meta_step(ddp, "final", update_base=True)) == pytest.approx(8e5 + 8 * n)
    assert sent(meta_step(ddp, "full")) == pytest.approx(8e5 + 8 * n)
    assert sent(meta_step(ddp, "full", update_base=True)) == pytest.approx(8e5 + 8 * n)
    assert sent(base_step(ddp)) == pytest.approx(8 * n) and sent(base_step(fsdp)) == pytest.approx(2 * 2 * n + 4 * n)
    assert sent(meta_step(fsdp, "none")) == pytest.approx(4 * 2 * n + 4 * n + 2 * 8)
    assert sent(meta_step(fsdp, "final")) == pytest.approx(4 * 2 * n + 4 * n + 2 * 8 + 8e5)
    assert sent(meta_step(fsdp, "full", "large")) == pytest.approx((2 + 4 * 2) * 2 * n + 3 * 4 * n + 2 * 8)
    assert meta_step(ddp, "final", update_base=True) == meta_step(ddp, "full", update_base=True)
    assert meta_step(ddp, "final").hidden == 0 < meta_step(ddp, "final", "large").hidden


def test_what_hides() -> None:
    """Buckets of lambda gradients, 17 for BERT-base, hide behind the backward of pass 3, two forwards long."""
    for share in (0.01, 0.3, 0.99, 50.0):
        r = run(1024, share=share)
        cost = alpha_beta.all_reduce(H100, 1024, 4 * BERT_BASE.parameters / 17).seconds
        step, behind = meta_step(r, "final", "large"), 2 * r.forward
        assert step.communication == pytest.approx(17 * cost)
        assert step.exposed == pytest.approx(max(cost, behind / 17 + 17 * cost - behind))
        gathered = sum(collective(H100, 1024, n * BERT_BASE.parameters / 12).seconds for collective, n in (
            (alpha_beta.all_gather, 2), (alpha_beta.reduce_scatter, 4)
        ))  # fmt: skip
        first = alpha_beta.all_gather(H100, 1024, 2 * BERT_BASE.parameters / 12).seconds
        exposed = max(first, r.forward / 12 + 12 * first - r.forward) + max(
            gathered, behind / 12 + 12 * gathered - behind
        )
        assert base_step(replace(r, mode="fsdp2")).exposed == pytest.approx(exposed)


def test_a_slow_network_is_the_rate_of_all_its_adapters() -> None:
    slow = replace(H100, between=Link(0.0, 1e9), inside=Link(0.0, 100e9), start=0.0)
    assert alpha_beta.all_gather(slow, 32, 32e9).seconds == pytest.approx(31 / 8)
    assert alpha_beta.tree_all_reduce(slow, 32, 32e9).seconds == pytest.approx(64 / 8)
    assert alpha_beta.hierarchical_all_reduce(slow, 32, 32e9).seconds == pytest.approx(2 * 28 / 100 + 2 * 3 / 4 * 4)
    assert alpha_beta.ring(slow, 8, 32e9, rounds=2).seconds == pytest.approx(2 * 28 / 100)


def test_models() -> None:
    assert [m.parameters for m in MODELS] == [109_482_240, 1_235_814_400, 8_030_261_248, 70_553_706_496]
    for m in MODELS[1:]:  # the embedding of a Llama is looked up, its output layer multiplied with
        assert m.parameters - m.multiplied == {"1B": 0, "8B": 128256 * 4096, "70B": 128256 * 8192}[m.name]


def test_what_does_not_fit_has_no_number() -> None:
    rows = model.predictions()
    refused = {(r["model"], r["mode"], r["gpus"]) for r in rows if "refused" in r}
    assert refused == {(m, "ddp", g) for m in ("8B", "70B") for g in model.GPUS} | {("70B", "fsdp2", 8)}
    (row,) = (r for r in rows if (r["model"], r["mode"], r["gpus"], r["lambda"]) == ("70B", "ddp", 1024, "small"))
    assert row["refused"] == "needs 1,411 GB per GPU without activations, of 80 GB" and "meta" not in row
    assert "| 70B | DDP | 8, 64, 256, 1024 | needs 1,411 GB" in model.tables(rows)


@pytest.mark.parametrize("table", model_checks.PAPER)
def test_the_papers_one_gpu_figure_is_met_and_the_others_are_told(table: str) -> None:
    rows = [r for r in model_checks.against_paper() if r["series"] == table]
    reported = model_checks.PAPER[table]
    assert len(rows) == 2 * 2 * 3
    for r in rows:
        assert r["reported"] == reported[r["gpus"]] and r["label"] == LABEL
        assert r["predicted"] == pytest.approx((1 + r["error"]) * r["reported"])
        assert r["fitted"] == (r["gpus"] == 1 or (r["gpus"] == 2 and r["seconds_per_step"] > 0))
        if r["fitted"]:
            assert r["predicted"] == pytest.approx(r["reported"], rel=1e-12)
    text = model.checks_table(rows)
    for r in rows:
        error = "fitted" if r["fitted"] else f"{r['error']:+.1%}"
        assert f"| {r['gpus']} | {r['reported']:,.1f} | {r['predicted']:,.1f} | {error} |" in text
    one_number = [r["error"] for r in rows if r["seconds_per_step"] == 0 and r["gpus"] > 1]
    assert min(one_number) > 0.1  # it does not fit: the model has no cost that stays when the batch shrinks


def test_the_paper_check_is_ten_base_steps_and_a_meta_step() -> None:
    """By hand, on one GPU: 10 (3 F + Adam) + 5 F + the element-wise part, 48 texts of 128 tokens."""
    forward = 2 * 85_646_592 * 48 * 128 / (0.5 * 15.7e12)
    moved = (10 * 28 + 64) * 109_482_240 / 900e9 + 12e5 / 900e9
    seconds = 35 * forward + moved
    found = model_checks.paper_throughput(alpha_beta.V100_NVLINK, 1, 0.5)
    assert found == pytest.approx(480 / seconds, rel=1e-12)
    slower = model_checks.paper_throughput(alpha_beta.V100_NVLINK, 1, 0.5, per_step=0.01)
    assert slower == pytest.approx(480 / (seconds + 0.11), rel=1e-12)


def test_torchtitan_from_8_to_128_gpus() -> None:
    rows = model_checks.against_torchtitan()
    assert [r["fitted"] for r in rows] == [True, False, True, False]
    assert all(abs(r["error"]) < 0.05 for r in rows)
    assert rows[0]["predicted"] == pytest.approx(6667, rel=1e-12)


def measured_file(path: Path, alpha: float, bandwidth: float, **changes: Any) -> Path:
    links = [{"kind": "link", "bytes": n, "seconds": 2 * alpha + n / bandwidth} for n in (1e3, 1e5, 1e7)]
    step = {"mode": "ddp", "sync": "final", "samples": 32, "bytes_on_wire": 0, "hidden_share": 0.0, "peak_memory": 1}
    alone = {**step, "processes": 1, "samples_per_s": 16.0}
    both = {**step, "processes": 2, "samples": 64, "samples_per_s": 25.6, "bytes_on_wire": 100 << 20, **changes}
    path.write_text("".join(json.dumps(row) + "\n" for row in (*links, alone, both)))
    return path


def test_compare_measured(tmp_path: Path) -> None:
    """100 MiB are four buckets, of two messages each; one process takes 2 s for its 32 samples."""
    alpha, bandwidth = 1e-3, 200e6
    path = measured_file(tmp_path / "scaling.jsonl", alpha, bandwidth, hidden_share=0.25)
    (row,) = model.compare_measured(path)
    communication = 4 * 2 * alpha + (100 << 20) / bandwidth
    assert row["alpha_s"] == pytest.approx(alpha) and row["bytes_per_s"] == pytest.approx(bandwidth)
    assert row["predicted"] == pytest.approx(2 + 0.75 * communication) and row["measured"] == pytest.approx(2.5)
    assert row["lowest"] == pytest.approx(2) and row["highest"] == pytest.approx(2 + communication)
    assert row["relative"] == pytest.approx(row["predicted"] / 2) and row["label"] == LABEL
    assert row["error"] == pytest.approx(row["predicted"] / 2.5 - 1)
    (halved,) = model.compare_measured(measured_file(path, alpha, bandwidth, samples=32, mode="fsdp2", collectives=3))
    assert halved["predicted"] == pytest.approx(1 + 3 * alpha + (100 << 20) / bandwidth)


def test_a_step_is_related_to_the_same_step_of_one_process(tmp_path: Path) -> None:
    path = measured_file(tmp_path / "scaling.jsonl", 1e-3, 1e8)
    links, (alone, both) = path.read_text().splitlines()[:3], map(json.loads, path.read_text().splitlines()[3:])
    kinds = [{"step": step, "lambda": lam, "threads": n} for step in ("base", "meta") for lam in "ab" for n in (1, 2)]
    rows = [{**alone, **kind, "samples_per_s": 16.0 + i} for i, kind in enumerate(kinds)]
    rows += [{**both, **kind, "hidden_share": None} for kind in kinds]
    path.write_text("\n".join([*links, *map(json.dumps, rows)]))
    for i, row in enumerate(found := model.compare_measured(path)):
        assert row["predicted"] / row["relative"] == pytest.approx(32 / (16.0 + i))
        assert row["predicted"] == row["highest"] and {key: row[key] for key in kinds[i]} == kinds[i]
    assert len(found) == 8


def test_files_that_cannot_be_compared(tmp_path: Path) -> None:
    path = measured_file(tmp_path / "scaling.jsonl", 1e-3, 1e8)
    lines = path.read_text().splitlines()
    for kept, why in (
        (lines[2:], "two different sizes"),
        ([*lines[:3], lines[4]], "no record with processes 1"),
        ([*lines[:4], lines[4].replace('"samples":', '"others":')], "step records without samples"),
        (["{"], "not JSON lines"),
        (['{"kind": "link", "bytes": 1, "seconds": 1}', *lines[2:]], "do not grow"),
    ):
        path.write_text("\n".join(kept))
        with pytest.raises(ReportError, match=why):
            model.compare_measured(path)


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{model.BEGIN}\nold\n{model.END}\nafter\n")
    assert model.main(["--out", str(tmp_path / "new"), "--gpus", "4", "16", "--write", str(page)]) == 0
    printed = capsys.readouterr().out
    assert page.read_text() == f"before\n{model.BEGIN}\n{printed}{model.END}\nafter\n"
    assert printed.startswith(f"**{LABEL}.**") and "| BERT-base | FSDP2 | 16 |" in printed
    result = json.loads((tmp_path / "new" / "model.json").read_text())
    assert result["label"] == LABEL and all(r["label"] == LABEL for r in result["rows"] + result["published"])
    assert len(result["rows"]) == 2 * 4 * 2 * 2 and math.isfinite(result["rows"][0]["base"]["seconds"])
    assert (tmp_path / "new" / "model.png").read_bytes().startswith(b"\x89PNG")
    measured = measured_file(tmp_path / "scaling.jsonl", 1e-3, 1e8)
    assert model.main(["--measured", str(measured)]) == 0
    assert f"Predicted: {LABEL}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--gpus", "12"], "--gpus: 12 is neither"),
        (["--share", "1.5"], "--share: must be"),
        (["--bucket-mib", "0"], "--bucket-mib: no element"),
        (["--measured", "not/there"], "bench.model: "),
        (["--no-plots", "--out", "/dev/null"], "bench.model: "),
    ],
)
def test_wrong_arguments(arguments: list[str], why: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench.model", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2) and why in done.stderr and "Traceback" not in done.stderr


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Path -> number or text, of nested dicts and lists."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, inner in items for k, v in leaves(inner, f"{path}/{key}").items()}


def test_what_is_kept_is_what_the_program_says() -> None:
    rows, checks = model.predictions(), model_checks.against_paper() + model_checks.against_torchtitan()
    assert model.report(rows, checks) in PAGE.read_text()
    kept = json.loads((ROOT / "bench" / "results" / "model.json").read_text())
    old, new = leaves([kept["rows"], kept["published"]]), leaves([rows, checks])
    assert old.keys() == new.keys() and len(old) > 1000
    assert all(old[path] == (pytest.approx(x) if isinstance(x, float) else x) for path, x in new.items())
