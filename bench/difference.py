"""`python -m bench.difference`: time, memory and error of the three ways to differentiate along v, on a BERT.

Time and memory with dropout on, interleaved with a plain base step; "unrecorded" is a base loss without `@recorded`,
whose held values come from a pass of their own where the difference needs one. Errors with dropout off, against exact
double backward in float64 at the same parameters, gradients and optimizer state, along the same v.
Attention is unfused ("eager"), which forward mode needs.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sama_kernels as sk
from bench.measure import interleaved, machine, paired_ratio, spread
from bench.meta_step import SIZES, Workload
from sama_experiments.common.memory import peak_bytes
from sama_kernels import adaptation

DIFFERENCES = ("central", "forward", "exact")
ALPHAS = (1.0, 0.1, 0.01, 0.001, 0.0001)


def times(workload: Workload, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds, multiples of a plain base step, and live bytes at the peak, of every candidate."""
    candidates: dict[str, Callable[[], object]] = {"plain base step": workload.plain_step}
    for difference in DIFFERENCES:
        candidates[difference] = partial(workload.meta_step, difference=difference)
        candidates[f"{difference}, unrecorded"] = partial(unrecorded, workload, difference)
    workload.weighted_step()
    workload.weighted_step()
    seconds = interleaved(candidates, rounds)
    plain = seconds["plain base step"]
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "relative to a plain base step": {name: paired_ratio(values, plain) for name, values in seconds.items()},
        "bytes allocated at the peak": {
            difference: peak_bytes(candidates[difference], device)[0] for difference in DIFFERENCES
        },
    }


def unrecorded(workload: Workload, difference: str) -> None:
    """A meta step without a tape."""
    sk.meta_grad(
        workload.base_loss,
        workload.meta_loss,
        base_params=workload.net,
        meta_params=workload.weigher,
        optimizer=workload.optimizer,
        difference=difference,
    )


def errors(workload: Workload) -> dict[str, Any]:
    """||result - exact|| / ||exact|| by dtype and difference; those of "central" and "forward" by alpha."""
    workload.net.eval()
    for _ in range(3):  # at Adam's first step there is no v
        workload.weighted_step()
    precise = widened(workload)
    expected = double_backward(precise)
    result: dict[str, Any] = {"theta_norm": float(flat(list(precise.net.parameters())).norm())}
    for name, one in (("float32", workload), ("float64", precise)):
        error = partial(relative_error, one, expected)
        result[name] = {"double backward": distance(double_backward(one), expected), "exact": error("exact", 1.0)}
        for difference in ("central", "forward"):
            result[name][difference] = {str(alpha): error(difference, alpha) for alpha in ALPHAS}
    return result


def widened(workload: Workload) -> Workload:
    """The same parameters, gradients and optimizer state in float64."""
    precise = copy.copy(workload)
    precise.net, precise.weigher = copy.deepcopy(workload.net).double(), copy.deepcopy(workload.weigher).double()
    precise.optimizer = torch.optim.Adam(precise.net.parameters(), lr=workload.optimizer.defaults["lr"])
    precise.optimizer.load_state_dict(workload.optimizer.state_dict())
    for p, q in zip(precise.net.parameters(), workload.net.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.double()
    precise.recorded_base_loss = sk.recorded(precise.base_loss)
    return precise


def double_backward(workload: Workload) -> Tensor:
    """-d/dlambda <dL_base/dtheta, v>, flattened, float64."""
    theta = [p for p in workload.net.parameters() if p.grad is not None]
    v: list[Tensor | None] = list(torch.autograd.grad(workload.meta_loss(), theta))
    adaptation.apply(adaptation.plan(workload.optimizer, theta, "paper"), v, "reference")
    g = torch.autograd.grad(workload.base_loss(), theta, create_graph=True)
    along = torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True) if b is not None]).sum()
    return flat(torch.autograd.grad(-along, list(workload.weigher.parameters())))


def relative_error(workload: Workload, expected: Tensor, difference: str, alpha: float) -> float:
    """Of a meta gradient whose values are held at today's theta."""
    return distance(flat(workload.meta_step(difference=difference, alpha=alpha, hold="center").grads), expected)


def distance(result: Tensor, expected: Tensor) -> float:
    """Relative to the second."""
    return float((result - expected).norm() / expected.norm())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One float64 vector."""
    return torch.cat([t.detach().double().flatten() for t in tensors])


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=SIZES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a size that takes seconds, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for difference_<model>_<batch>x<tokens>_<device>.json")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.batch, options.tokens, options.rounds = "tiny", 4, 8, 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {key: getattr(options, key) for key in ("model", "batch", "tokens", "rounds")}
    make = partial(Workload, options.model, options.batch, options.tokens, device, attention="eager")
    result = {
        "settings": settings,
        "machine": machine(),
        **times(make(), options.rounds, device),
        "errors": errors(make()),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"difference_{options.model}_{options.batch}x{options.tokens}_{device.type}.json"
        (options.out / name).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
