"""The benchmarks: they run end to end, refuse to time wrong results, and the report says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import needs_cpu_kernels
from torch import Tensor

from bench import cases, difference, gpu_summary, kernels, report, sanitize, shapes, timing
from bench.contenders import Foreach, Library
from bench.inputs import PRECISIONS, Inputs
from sama_kernels import ops

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = [(1000,), (3, 5), (1,)]


@pytest.fixture
def small_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists and copies that take no time."""
    monkeypatch.setattr(kernels, "LISTS", {"small": SMALL})
    monkeypatch.setattr(kernels, "COPY_ELEMENTS", 1000)
    monkeypatch.setattr(kernels.timing, "last_level_cache_bytes", lambda: 1 << 20)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return report.read(folder / "kernels_cpu.jsonl")


def test_lists_have_the_shapes_of_the_models() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        config = transformers.LlamaConfig(
            vocab_size=128256, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=8192, tie_word_embeddings=True,
        )  # fmt: skip
        llama = transformers.LlamaForCausalLM(config)
    assert len(shapes.LISTS["bert-base"]) == 199
    for model, name in ((bert, "bert-base"), (llama, "llama-1b")):
        assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(shapes.LISTS[name])


def test_scaled_lists_keep_their_tensors() -> None:
    small = shapes.scaled(shapes.LISTS["bert-base"], 0.01)
    assert len(small) == 199 and shapes.elements(small) < 0.02 * shapes.elements(shapes.LISTS["bert-base"])
    assert shapes.scaled(shapes.LISTS["tiny"], 0.01) == shapes.LISTS["tiny"]


@needs_cpu_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16-fp32state", "fp64"])
@pytest.mark.parametrize("contender", ["cpu", "foreach"])
def test_contenders_are_right_and_can_be_called_again(precision: str, contender: str) -> None:
    """What is timed is called many times: the inputs must not drift, and the last result must still be right."""
    inputs = Inputs(SMALL, PRECISIONS[precision], CPU)
    reference = library(inputs, "reference")
    other = library(inputs, "cpu") if contender == "cpu" else Foreach(inputs)
    tolerance = cases.TOLERANCE[inputs.precision.values]
    for op in cases.op_list(inputs.precision):
        if op.only_library and contender == "foreach":
            continue
        expected = cases.Expected.of(op, reference)
        assert cases.fault(op, other, expected, tolerance) is None
        for _ in range(20):  # an even number: some ops are their own inverse
            op.reset(other)
            op.call(other)
        assert cases.relative_distance(op.result(other), expected.tensors) <= 2 * tolerance, op.name


def library(inputs: Inputs, backend: str) -> Library:
    lists = ([torch.empty_like(x) for x in inputs.theta], [torch.empty_like(x) for x in inputs.theta])
    return Library(inputs, backend, lists)


def nothing(*_: object, **__: object) -> Tensor:
    return torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize("op", [op for op in cases.op_list(PRECISIONS["fp32"]) if op.name != "step_size"])
def test_what_does_nothing_is_wrong(op: cases.Op) -> None:
    inputs = Inputs(SMALL, PRECISIONS["fp32"], CPU)
    expected = cases.Expected.of(op, library(inputs, "reference"))
    idle = library(inputs, "reference")
    assert cases.fault(op, idle, expected, 1e-5) is None
    op.begin(idle)
    for name in ("adam", "low_bit", "moments", "scale", "perturb", "restore", "difference"):
        setattr(idle, f"_{name}", nothing)
    idle_begin = cases.Op(**{**vars(op), "begin": cases.nothing})
    why_not = cases.fault(idle_begin, idle, expected, 1e-5) or ""
    # The whole part ends where it began, at theta: only its step size shows that nothing was done.
    assert why_not.startswith("returns" if op.name == "element_wise_part" else "differs")


@needs_cpu_kernels
def test_kernels_end_to_end(tmp_path: Path, small_lists: None, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernels_cpu.jsonl").write_text("of an earlier run\n")
    arguments = ["--quick", "--device", "cpu", "--lists", "small", "--dtypes", "fp32", "bf16", "--out", str(tmp_path)]
    assert kernels.main([*arguments, "--threads", "1"]) == 0
    rows = report.measured(rows_of(tmp_path))
    fused = {row["op"] for row in rows if row["contender"] == "cpu"}
    assert fused >= {op.name for op in cases.op_list(PRECISIONS["bf16"])}
    assert {row["contender"] for row in rows} == {"copy", "list copy", "cpu", "reference", "foreach", "torch fused"}
    for row in rows:
        assert row["rounds"] == 3 and 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
    adam = report.find(rows, op="adapt_norm_adam", contender="cpu", dtype="fp32") or {}
    assert adam["bytes_per_element"] == 20 and adam["elements"] == shapes.elements(SMALL)
    assert adam["gb_per_s"] == pytest.approx(20 * adam["elements"] / adam["median_s"] / 1e9)
    part = report.find(rows, op="element_wise_part", contender="cpu", dtype="fp32") or {}
    assert part["bytes_per_element"] == 20 + 16 + 16 + 12
    assert adam["machine"]["versions"]["torch"] == torch.__version__
    assert "adapt_norm_adam" in capsys.readouterr().out


@needs_cpu_kernels
def test_a_wrong_contender_is_not_timed(
    tmp_path: Path, small_lists: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.restore

    def wrong(params: list[Tensor], v: list[Tensor], *, backend: str) -> None:
        right(params[1:] if backend == "cpu" else params, v[1:] if backend == "cpu" else v, backend=backend)

    monkeypatch.setattr(ops, "restore", wrong)
    arguments = ["--quick", "--device", "cpu", "--lists", "small", "--dtypes", "fp32", "--ops", "restore", "perturb_m"]
    assert kernels.main([*arguments, "--out", str(tmp_path), "--threads", "1"]) == 1
    rows = rows_of(tmp_path)
    assert report.find(rows, op="restore", contender="cpu", median_s=None)["refused"].startswith("differs")
    timed = {(row["op"], row["contender"]) for row in report.measured(rows)}
    assert ("restore", "cpu") not in timed and {("restore", "foreach"), ("perturb_minus", "cpu")} <= timed
    assert "restore: cpu is not timed" in capsys.readouterr().err


def test_what_does_not_fit_is_said(tmp_path: Path, small_lists: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "memory_available", lambda device: 1000)
    arguments = ["--quick", "--device", "cpu", "--lists", "small", "--dtypes", "fp32", "--out", str(tmp_path)]
    assert kernels.main([*arguments, "--threads", "1"]) == 0
    notes = report.notes(rows_of(tmp_path))
    assert any("small fp32: skipped, needs about" in note for note in notes)
    with pytest.raises(report.ReportError, match="nothing was measured"):
        report.markdown(rows_of(tmp_path))


def test_interleaving_and_its_limits() -> None:
    class FakeClock(timing.CpuClock):
        def __init__(self) -> None:
            pass

        def time(self, call: Callable[[], object]) -> tuple[float, float]:
            seconds = call()
            assert isinstance(seconds, float)
            return seconds, seconds

    order: list[str] = []

    def contender(name: str, seconds: float) -> tuple[Callable[[], object], Callable[[], object]]:
        return (lambda: order.append(name)), (lambda: seconds)

    calls = {"fast": contender("fast", 0.1), "slow": contender("slow", 3.0), "endless": contender("endless", 20.0)}
    times = timing.interleaved(FakeClock(), calls, rounds=7, seconds=10.0)
    assert [len(times[name].work) for name in calls] == [7, 3, 1]
    assert order[:5] == ["fast", "slow", "endless", "fast", "slow"]
    quick = {"quick": contender("quick", 0.0)}
    assert len(timing.interleaved(FakeClock(), quick, rounds=7, seconds=0.0)["quick"].work) == 5
    assert timing.spread([3.0, 1.0, 2.0]) == pytest.approx((2.0, 1.2, 2.8))


def made_row(**changes: Any) -> dict[str, Any]:
    versions = {"torch": "2.99", "triton": None, "cuda": None}
    about = {"processor": "A processor", "isa": "X", "cpus": 8, "gpu": None, "commit": "abc", "versions": versions}
    return {
        "device": "cpu", "list": "flat", "dtype": "fp32", "tensors": 1, "elements": 1000, "threads": 4, "scale": 1.0,
        "op": "restore", "contender": "cpu", "bytes_per_element": 12, "median_s": 0.25, "p10_s": 0.2, "p90_s": 0.3,
        "host_s": 0.25, "rounds": 9, "gb_per_s": 10.0, "of_copy": 0.87, "speedup_over_reference": 4.25,
        "machine": about, **changes,
    }  # fmt: skip


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        made_row(),
        made_row(contender="reference", median_s=1.0625, speedup_over_reference=1.0),
        made_row(list="tiny", op="step_size", bytes_per_element=0, rounds=3),
        {"device": "cpu", "note": "cuda backend unavailable: a reason", "machine": made_row()["machine"]},
    ]
    (tmp_path / "kernels_cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    about = made_row()["machine"] | {"gpu": "A GPU", "driver": "1.2"}
    on_gpu = json.dumps(made_row(device="cuda", contender="cuda", median_s=0.125, machine=about))
    (tmp_path / "kernels_cuda.jsonl").write_text(on_gpu + "\n")
    page = tmp_path / "gpu.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = ["--results", str(tmp_path), "--write", "--readme", str(readme), "--gpu-page", str(page)]
    assert report.main(arguments) == 0
    first = readme.read_text()
    assert "A GPU, driver 1.2" in page.read_text() and "| `restore` | 12 | 125 [" in page.read_text()
    assert "A GPU" not in first and "A processor" not in page.read_text()
    assert "| `restore` | 12 | 250 [200, 300] | 87% | 4.2 |" in first
    assert "A processor (X), 4 of 8 CPUs" in first and "commit abc" in first and "python -m bench.kernels" in first
    assert "- cuda backend unavailable: a reason" in first and "old" not in first
    assert first.startswith("before\n") and first.endswith("after\n")
    assert report.main(arguments) == 0 and readme.read_text() == first  # writing again changes nothing
    assert (tmp_path / "kernels_cpu.png").read_bytes().startswith(b"\x89PNG")
    readme.write_text("no markers")
    with pytest.raises(SystemExit) as exit_:
        report.main([*arguments, "--no-plots"])
    assert exit_.value.code == 1 and "has no <!-- bench:kernels -->" in capsys.readouterr().err


@needs_cpu_kernels
def test_sanitizer_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sanitize, "LENGTHS", (0, 1, 9, 129))
    assert sanitize.main(["--device", "cpu"]) == 0
    right = ops.restore
    monkeypatch.setattr(ops, "restore", lambda *x, backend: right(*x, backend=backend) if backend != "cpu" else None)
    assert sanitize.main(["--device", "cpu"]) == 1
    assert "restore: differs from the reference" in capsys.readouterr().out
    assert sanitize.main(["--device", "cpu", "--backends", "cuda"]) == 3
    assert "cuda backend unavailable" in capsys.readouterr().err


def test_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", "bench/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("gpu.sh: no GPU: torch sees no CUDA device")
    assert not list(tmp_path.iterdir())


def test_gpu_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = tmp_path / "steps"
    lines = ["build\t0\t30\t150", "tests\t124\t120\t120", "memcheck\tskipped\t0\tno compute-sanitizer"]
    steps.write_text("\n".join(lines) + "\n")
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="5" failures="1" errors="0" skipped="2"/></testsuites>'
    )
    assert gpu_summary.main([str(tmp_path), str(tmp_path), "--device", "cpu"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["status"] for step in summary["steps"]] == ["ok", "out of time", "skipped"]
    assert summary["tests"] == {"tests": 5, "failures": 1, "errors": 0, "skipped": 2} and not summary["ok"]
    assert "cpu" in summary["backends"] and summary["machine"]["commit"]
    for names, status in ((["build", "tests"], 1), (["kernels"], 0), ([], 1)):  # ONLY; pytest wrote no counts
        steps.write_text("".join(f"{name}\t0\t30\t150\n" for name in names))
        (tmp_path / "tests.xml").unlink(missing_ok=True)
        assert gpu_summary.main([str(tmp_path), str(tmp_path), "--device", "cpu"]) == status


def test_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert difference.main(["--tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith("difference_tiny_4x8_") and json.loads(capsys.readouterr().out) == result
    assert result["machine"]["commit"] and result["machine"]["versions"]["torch"] == torch.__version__
    names = {"plain base step", *difference.DIFFERENCES, *(f"{name}, unrecorded" for name in difference.DIFFERENCES)}
    assert set(result["seconds"]) == names and all(row["median"] > 0 for row in result["seconds"].values())
    wide, narrow = result["errors"]["float64"], result["errors"]["float32"]
    assert wide["double backward"] == 0 and wide["exact"] < 1e-9 and narrow["exact"] < 1e-2
    ratios = {how: wide[how]["0.01"] / wide[how]["0.001"] for how in ("central", "forward")}
    assert ratios["central"] == pytest.approx(100, rel=0.1) and ratios["forward"] == pytest.approx(10, rel=0.1)
