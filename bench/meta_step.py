"""`python -m bench.meta_step`: time and memory of a whole meta step against a plain base step, on a BERT.

Candidates, interleaved: the plain base step (no meta learner); a meta step with the compiled kernels (on a GPU the CUDA
C++ and the Triton ones), with the reference backend, and SAMA written in plain PyTorch with `torch._foreach_*`, theta
frozen in its passes or not.
Per unroll length, the time of `unroll` base steps and one meta step over that of `unroll` plain steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk
from bench.contenders import foreach_adam
from bench.measure import interleaved, machine, paired_ratio, spread
from sama_experiments.common.memory import peak_bytes
from sama_kernels import backends

SIZES = {
    "toy": {  # for checks, in which an embedding of 30,000 words would be most of the work
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 500,
    },
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}

BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Workload:
    """Data reweighting of a BERT classifier by a Meta-Weight-Net, one fixed random batch for each level."""

    def __init__(self, model: str, batch: int, tokens: int, device: torch.device, attention: str | None = None) -> None:
        import transformers

        torch.manual_seed(0)
        if model in SIZES:
            config = transformers.BertConfig(**SIZES[model], num_labels=2, attn_implementation=attention)
            self.net: Any = transformers.BertForSequenceClassification(config)
        else:
            self.net = transformers.AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=2, local_files_only=True, attn_implementation=attention
            )
        self.net.to(device).train()
        self.weigher = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()).to(device)
        self.ids = torch.randint(5, self.net.config.vocab_size, (2, batch, tokens), device=device)
        self.labels = torch.randint(0, 2, (2, batch), device=device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-5)
        self.recorded_base_loss = sk.recorded(self.base_loss)

    def losses(self, k: int) -> Tensor:
        """Per-sample losses of batch k, shape (batch,)."""
        return F.cross_entropy(self.net(self.ids[k]).logits, self.labels[k], reduction="none")

    def base_loss(self) -> Tensor:
        """Weighted loss of the base batch."""
        losses = self.losses(0)
        return (self.weigher(sk.stop_gradient(losses)[:, None]).squeeze(1) * losses).mean()

    def meta_loss(self) -> Tensor:
        """Loss of the meta batch."""
        return self.losses(1).mean()

    def step(self, loss: Callable[[], Tensor]) -> None:
        """A base step."""
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()

    def plain_step(self) -> None:
        """A base step without a meta learner."""
        self.step(lambda: self.losses(0).mean())

    def weighted_step(self) -> None:
        """A base step with the weight net, recorded for the meta step."""
        self.step(self.recorded_base_loss)

    def meta_step(self, backend: str = "auto", **options: Any) -> sk.MetaGradient:
        """One SAMA meta gradient."""
        return sk.meta_grad(
            self.recorded_base_loss,
            self.meta_loss,
            base_params=self.net,
            meta_params=self.weigher,
            optimizer=self.optimizer,
            backend=backend,
            **options,
        )

    def plain_pytorch_meta_step(self, freeze: bool) -> None:
        """The same meta gradient as a careful user would write it, with `torch._foreach_*` between the passes.

        With `freeze`, theta does not require grad in the perturbed passes, as here; without, as in the official
        implementation. theta is moved in place and comes back with rounding drift; held values cost the same as a
        plain detach, which is used.
        """
        theta = [p for p in self.net.parameters() if p.grad is not None]
        lam = tuple(self.weigher.parameters())
        d = torch.autograd.grad(self.meta_loss(), theta)
        with torch.no_grad():
            v = self.foreach_adapt(theta, list(d))
            epsilon = 1.0 / torch.stack(torch._foreach_norm(v)).norm()
            gradients = []
            for factor in (1.0, -2.0):
                torch._foreach_add_(theta, torch._foreach_mul(v, epsilon * factor))
                for p in theta:
                    p.requires_grad_(not freeze)
                with torch.enable_grad():
                    gradients.append(torch.autograd.grad(self.base_loss(), lam))
            torch._foreach_add_(theta, torch._foreach_mul(v, epsilon))
            for p in theta:
                p.requires_grad_(True)
            for plus, minus in zip(*gradients, strict=True):
                plus.sub_(minus).div_(-2 * epsilon)

    def foreach_adapt(self, theta: list[Tensor], d: list[Tensor]) -> list[Tensor]:
        """v = D d in the memory of d."""
        states = [self.optimizer.state[p] for p in theta]
        m, w = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        options = self.optimizer.defaults
        foreach_adam(
            d, [p.grad for p in theta], m, w, lr=options["lr"], betas=options["betas"], eps=options["eps"],
            step=float(states[0]["step"]),
        )  # fmt: skip
        return d


def compiled_backends(device: torch.device) -> dict[str, str]:
    """Names of the candidates with kernels of this library: one on the CPU, up to two on a GPU."""
    missing = unavailable_backends(device)
    there = [backend for backend in BACKENDS[device.type] if backend not in missing]
    names = {"cpu": "meta step"} | {backend: f"meta step, {backend} backend" for backend in ("cuda", "triton")}
    return {names[backend]: backend for backend in there}


def unavailable_backends(device: torch.device) -> dict[str, str]:
    """Why those that are made for this device cannot run."""
    reasons = {backend: backends.unavailable(backend, device) for backend in BACKENDS[device.type]}
    return {backend: why for backend, why in reasons.items() if why is not None}


def measure(workload: Workload, rounds: int, device: torch.device) -> dict[str, Any]:
    """Times, ratios and peaks of one workload."""
    workload.weighted_step()
    workload.weighted_step()
    candidates: dict[str, Callable[[], object]] = {
        "plain base step": workload.plain_step,
        "weighted base step": workload.weighted_step,
        **{name: partial(workload.meta_step, backend) for name, backend in compiled_backends(device).items()},
        "meta step, reference backend": lambda: workload.meta_step("reference"),
        "meta step, plain PyTorch": lambda: workload.plain_pytorch_meta_step(freeze=True),
        "meta step, plain PyTorch, theta not frozen": lambda: workload.plain_pytorch_meta_step(freeze=False),
    }
    seconds = interleaved(candidates, rounds)
    plain, base = seconds["plain base step"], seconds["weighted base step"]
    results: dict[str, Any] = {"backends that cannot run": unavailable_backends(device)}
    results |= {"seconds": {name: spread(values) for name, values in seconds.items()}}
    results["relative to a plain base step"] = {n: paired_ratio(v, plain) for n, v in seconds.items()}
    for name in list(candidates)[2:]:
        for unroll in (1, 10):
            total = [unroll * b + m for b, m in zip(base, seconds[name], strict=True)]
            key = f"throughput relative to plain, unroll {unroll}"
            results.setdefault(key, {})[name] = paired_ratio([unroll * p for p in plain], total)
    fixed = sum(t.numel() * t.element_size() for t in (*workload.net.parameters(), *workload.net.buffers()))
    fixed += sum(t.numel() * t.element_size() for s in workload.optimizer.state.values() for t in s.values())
    grads = sum(p.grad.numel() * p.grad.element_size() for p in workload.net.parameters() if p.grad is not None)
    live: dict[str, int] = {}
    for name, work in candidates.items():
        if "meta" in name:  # finds the gradients of the base step in place
            live[name] = fixed + grads + peak_bytes(work, device)[0]
        else:  # makes them
            workload.optimizer.zero_grad()
            live[name] = fixed + peak_bytes(work, device)[0]
    results["live bytes at the peak"] = live
    results["live memory relative to plain"] = {n: v / live["plain base step"] for n, v in live.items()}
    return results


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help=f"one of {', '.join(SIZES)}, or a Hugging Face model folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for meta_step_<model>_<batch>x<tokens>_<device>.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = Workload(options.model, options.batch, options.tokens, device)
    name = options.model if options.model in SIZES else Path(options.model).name
    settings = {"model": name, "batch": options.batch, "tokens": options.tokens, "rounds": options.rounds}
    result = {"settings": settings, "machine": machine(), **measure(workload, options.rounds, device)}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"meta_step_{name}_{options.batch}x{options.tokens}_{device.type}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
