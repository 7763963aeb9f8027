"""A base step and a SAMA meta step as sums of passes, element-wise ops and collectives, on paper: not measured.

What is modelled. A meta step has three passes. Pass 1, forward and backward of the meta loss with respect to theta, is
3 F (F: one forward; a backward pass costs two, Kaplan et al., "Scaling laws for neural language models", 2020). Passes
2 and 3, of the base loss at theta+ and theta-, run with theta frozen. What they cost depends on lambda:

- `small`, 1e5 elements, a reweighting net: its gradient lives on the losses, so that a pass is 1 F.
- `large`, one element per element of theta and in the same layers (masks, scales, priors of the weights): the gradient
  needs that of every activation (1 F) and of every weight (1 F, which freezing theta does not save), a pass is 3 F.

DDP (theta on every GPU), `sync`:
- "none": nothing is sent (with `update_base` the copies of theta drift apart).
- "final" (the paper's, section 3.3): passes 1 and 2 are local. The difference of the lambda gradients is all-reduced in
  buckets while the rest of pass 3's backward runs; for a small lambda there is none left, and its bucket is exposed.
  With `update_base` theta has to stay the same everywhere, and "final" does what "full" does.
- "full": d is all-reduced bucket by bucket beside pass 1's backward, so that v, and its norm, are those of all data on
  every GPU; lambda as in "final"; `update_base` sends nothing more.

FSDP2 (theta, its gradients and the optimizer state sharded over all GPUs): every forward gathers every layer, every
backward gathers it again (reshard_after_forward) and reduce-scatters its gradient. d comes out averaged whatever
`sync` says, and "final" is "full". The frozen passes gather only. The norm is one scalar all-reduce. A small lambda is
on every GPU, as with DDP. A large one is sharded like theta, gathered with it, and its gradients are reduce-scattered
in both passes (whole, they would be another theta).

Left out: the FLOPs of attention that grow with the context (as in Kaplan's 2 N), recomputation of activations, the
meta learner itself, launches, stragglers, other jobs' traffic, and that NCCL's kernels take multiprocessors and memory
bandwidth from the passes beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bench import alpha_beta
from bench.alpha_beta import Cluster, Cost
from bench.shapes import LISTS, decoder, elements

LABEL = "on paper: not measured"
SYNCS = ("none", "final", "full")
MODES = ("ddp", "fsdp2")
LAMBDAS = ("small", "large")
SMALL_LAMBDA = 100_000
BUCKET = 25 << 20  # torch.nn.parallel.DistributedDataParallel, bucket_cap_mb

# Bytes moved per float32 element, from the docstrings of sama_kernels/ops (adapt_norm_adam, perturb, restore,
# central_difference); torch's fused Adam reads theta, g, m, w and writes theta, m, w (as in bench.kernels).
ADAPT, PERTURB, RESTORE, DIFFERENCE, ADAM = 20, 16, 12, 12, 28
# On the wire gradients are float32 and gathered parameters bfloat16: DDP under autocast, and MixedPrecisionPolicy(
# param_dtype=bfloat16, reduce_dtype=float32), the default of torchtitan.
REDUCED, GATHERED = 4, 2
# Bytes per element that must be there at once, all float32: theta, g, m, w, and d (which becomes v, then the bits of
# theta); of a large lambda itself, two gradients, two moments. Activations come on top.
THETA_STATE, LAMBDA_STATE = 20, 20


@dataclass(frozen=True)
class Model:
    """Parameters in all; those that a token is multiplied with (Kaplan's N: no input embeddings); layers; tokens.

    `tokens` is what one GPU has in one pass, by default.
    """

    name: str
    parameters: int
    multiplied: int
    layers: int
    tokens: int


def llama(name: str, width: int, layers: int, kv_width: int, inner: int, tokens: int, tied: bool = False) -> Model:
    """A Llama 3 (Grattafiori et al., "The Llama 3 herd of models", 2024, Table 3; 1B: the model card of 3.2).

    Where the output layer is the input embedding, the table is multiplied with once.
    """
    body = elements(decoder(128256, width, layers, kv_width, inner))  # without an output layer of its own
    return Model(name, body + (0 if tied else 128256 * width), body, layers, tokens)


def bert_base() -> Model:
    """Devlin et al., "BERT", 2019: 110M parameters, of which the tables of words, places and segments are looked up."""
    count = elements(LISTS["bert-base"])
    return Model("BERT-base", count, count - (30522 + 512 + 2) * 768, 12, tokens=32 * 128)


BERT_BASE = bert_base()
LLAMA_8B = llama("8B", 4096, 32, 1024, 14336, tokens=2 * 8192)
MODELS = (
    BERT_BASE,
    llama("1B", 2048, 16, 512, 8192, tokens=2 * 8192, tied=True),
    LLAMA_8B,
    llama("70B", 8192, 80, 1024, 28672, tokens=8192),
)


@dataclass(frozen=True)
class Run:
    """A model on some GPUs of a cluster; `share` of the peak FLOP/s is achieved, with `tokens` per GPU and pass."""

    model: Model
    cluster: Cluster
    gpus: int
    mode: str
    share: float
    tokens: float
    bucket: int = BUCKET

    @property
    def forward(self) -> float:
        """Seconds of one forward: 2 N FLOPs per token."""
        return 2 * self.model.multiplied * self.tokens / (self.share * self.cluster.peak)

    @property
    def held(self) -> float:
        """Elements of theta that one GPU holds."""
        return self.model.parameters / (self.gpus if self.mode == "fsdp2" else 1)

    def element_wise(self, bytes_per_element: int, count: float | None = None) -> Step:
        """An op over `count` elements, or those of theta that this GPU holds."""
        moved = bytes_per_element * (self.held if count is None else count)
        return Step(element_wise=moved / self.cluster.memory_bandwidth)

    def state_bytes(self, lam: str) -> float:
        """What one GPU must hold during a meta step, without activations."""
        return self.held * (THETA_STATE + (LAMBDA_STATE if lam == "large" else 0))


@dataclass(frozen=True)
class Step:
    """Seconds of a step or a part of it; bytes that one GPU sends within its node and between nodes.

    communication: as if nothing else ran; exposed: what of it no computation hides.
    """

    compute: float = 0.0
    element_wise: float = 0.0
    communication: float = 0.0
    exposed: float = 0.0
    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Step) -> Step:
        return Step(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def seconds(self) -> float:
        return self.compute + self.element_wise + self.exposed

    @property
    def hidden(self) -> float:
        return self.communication - self.exposed


def transfers(parts: int, costs: list[Cost], behind: float) -> Step:
    """`parts` times these collectives, one after the other, beside a computation of `behind` seconds."""
    seconds = sum(cost.seconds for cost in costs)
    return Step(
        communication=parts * seconds,
        exposed=alpha_beta.exposed(behind, parts, seconds),
        inside=parts * sum(cost.inside for cost in costs),
        between=parts * sum(cost.between for cost in costs),
    )


def all_reduced(run: Run, count: float, behind: float = 0.0) -> Step:
    """The mean of `count` elements over all GPUs, in buckets that become ready during `behind` seconds."""
    size = REDUCED * count
    parts = math.ceil(size / run.bucket)
    return transfers(parts, [alpha_beta.all_reduce(run.cluster, run.gpus, size / parts)], behind)


def sharded(run: Run, gathered: float, scattered: float, behind: float) -> Step:
    """Layer by layer: `gathered` elements are all-gathered, `scattered` reduce-scattered, in `behind` seconds."""
    layers = run.model.layers
    costs = [alpha_beta.all_gather(run.cluster, run.gpus, GATHERED * gathered / layers)]
    if scattered:
        costs.append(alpha_beta.reduce_scatter(run.cluster, run.gpus, REDUCED * scattered / layers))
    return transfers(layers, costs, behind)


def forward_and_backward(run: Run, averaged: bool) -> Step:
    """A pass with gradients of theta; under FSDP2 they are always averaged."""
    f, n = run.forward, run.model.parameters
    step = Step(compute=3 * f)
    if run.mode == "fsdp2":
        return step + sharded(run, n, 0, f) + sharded(run, n, n, 2 * f)
    return step + all_reduced(run, n, behind=2 * f) if averaged else step


def frozen_pass(run: Run, lam: str, averaged: bool) -> Step:
    """A pass with gradients of lambda only; `averaged`: its lambda gradients (or the difference) are all-reduced."""
    f, n = run.forward, run.model.parameters
    large, is_sharded = lam == "large", run.mode == "fsdp2"
    step = Step(compute=3 * f if large else f)
    if is_sharded:
        step += sharded(run, 2 * n if large else n, 0, f)
    if large and is_sharded:
        return step + sharded(run, 2 * n, n, 2 * f)
    if averaged:
        step += all_reduced(run, n, behind=2 * f) if large else all_reduced(run, SMALL_LAMBDA)
    return step


def base_step(run: Run) -> Step:
    """Forward, backward, Adam."""
    return forward_and_backward(run, averaged=True) + run.element_wise(ADAM)


def meta_step(run: Run, sync: str = "final", lam: str = "small", update_base: bool = False) -> Step:
    """One SAMA meta gradient, see above; what lambda's own optimizer does is left out."""
    step = forward_and_backward(run, averaged=sync == "full" or (sync == "final" and update_base))
    step += run.element_wise(ADAPT + 2 * PERTURB)
    if run.mode == "fsdp2":
        step += transfers(1, [alpha_beta.all_reduce(run.cluster, run.gpus, 8)], behind=0.0)  # ||v||^2, float64
    step += frozen_pass(run, lam, averaged=False) + frozen_pass(run, lam, averaged=sync != "none")
    if not update_base:
        step += run.element_wise(RESTORE)
    meta_elements = run.held if lam == "large" else SMALL_LAMBDA
    return step + run.element_wise(DIFFERENCE, meta_elements)
