"""summary.json of `make gpu`, from what bench/gpu.sh keeps: `steps` (name, exit status, seconds, limit), tests.xml."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench.measure import machine
from bench.sanitize import MADE_FOR
from sama_kernels import backends


def step(line: str) -> dict[str, Any]:
    """One step; 124 is the exit status of `timeout`, 137 that after a kill."""
    name, status, seconds, limit = line.split("\t")
    if status == "skipped":
        return {"name": name, "status": "skipped", "why": limit}
    words = {"0": "ok", "124": "out of time", "137": "out of time"}
    found = {"name": name, "status": words.get(status, "failed"), "exit_status": int(status)}
    return found | {"seconds": int(seconds), "limit_seconds": int(limit)}


def test_counts(path: Path) -> dict[str, int] | None:
    """pytest's own counts; None if it did not get to write them."""
    if not path.is_file():
        return None
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}


def main(arguments: list[str] | None = None) -> int:
    """Write it, print it; exit status 1 if a step failed or a backend cannot run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kept", type=Path, help="folder with the two")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", required=True, choices=list(MADE_FOR))
    options = parser.parse_args(arguments)
    steps = [step(line) for line in (options.kept / "steps").read_text().splitlines()]
    device = torch.device(options.device)
    reasons = {name: backends.unavailable(name, device) for name in MADE_FOR[device.type]}
    tests = test_counts(options.kept / "tests.xml")
    skipping_counts = device.type == "cuda"  # on a GPU nothing may be left out
    good = ("ok",) if skipping_counts else ("ok", "skipped")
    counted = tests is not None and not (skipping_counts and tests["tests"] == tests["skipped"])
    all_ran = bool(steps) and (counted or all(s["name"] != "tests" for s in steps))
    summary = {
        "ok": all(s["status"] in good for s in steps) and not any(reasons.values()) and all_ran,
        "device": device.type,
        "steps": steps,
        "tests": tests,
        "backends": {n: "available" if why is None else f"unavailable: {why}" for n, why in reasons.items()},
        "machine": machine(),
    }
    text = json.dumps(summary, indent=1)
    (options.out / "summary.json").write_text(text + "\n")
    print(text)
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
