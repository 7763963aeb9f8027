"""Masks that `mask_draws` draws are torch's, bit for bit, and nobody can tell the difference in a meta step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_cases import SEED
from problems import after_steps, meta_grad, same_bits, weight_net
from test_real_models import classifier, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary

import sama_kernels as sk
from sama_kernels import mask_draws
from sama_kernels.algorithms import Iterative, Neumann
from sama_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason="the compiled CPU kernels are not there")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture
def agrees() -> None:
    if not mask_draws.agrees():
        pytest.skip("torch draws in another way on this machine")


@pytest.fixture
def drawn(agrees: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the masks that are drawn here."""
    shapes: list[tuple[int, ...]] = []
    itself = mask_draws.draw

    def draw(mask: Tensor, probability: float, generator: torch.Generator) -> None:
        shapes.append(tuple(mask.shape))
        itself(mask, probability, generator)

    monkeypatch.setattr(mask_draws, "draw", draw)
    monkeypatch.setattr(mask_draws, "_waiting", WeakIdKeyDictionary())
    return shapes


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little a loss draws."""
    monkeypatch.setattr(mask_draws, "_ELEMENTS_PER_CALL", 0)


def without_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_draws, "agrees", lambda: False)


def mersenne_twister(generator: torch.Generator) -> np.random.MT19937:
    """numpy's, in the state of torch's: seed, left, seeded, next, then 624 words of 64 bits that hold 32 each."""
    state = generator.get_state().numpy()
    left, words = state[8:12].view(np.int32)[0], state[24 : 24 + 8 * 624].view(np.uint64)
    twin = np.random.MT19937()
    twin.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624 - (int(left) - 1)}}
    return twin


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_numpys_mersenne_twister(dtype: torch.dtype) -> None:
    """Whatever torch does on this machine: 53 bits of two words each, divided by 2^53, below p."""
    rng = random.Random(SEED)
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    for n in (1, 311, 312, 313, 623, 624, 625, 5000, 0, rng.randrange(3000)):
        p = rng.choice([0.0, 1.0, 0.5, 0.1, rng.random()])
        torch.rand(rng.randrange(700), generator=generator)
        words = mersenne_twister(generator).random_raw(2 * n).astype(np.uint64)
        bits = ((words[::2] << np.uint64(32)) | words[1::2]) & np.uint64(2**53 - 1)
        mask = torch.full((n,), 7.0, dtype=dtype)
        mask_draws.draw(mask, p, generator)
        assert torch.equal(mask, torch.from_numpy(bits * 2.0**-53 < p).to(dtype)), (n, p)
        following = mersenne_twister(generator).random_raw(3)
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        mask_draws.draw(torch.empty(1), 0.5, twin)
        assert mersenne_twister(twin).random_raw(1) == following[2]  # two words further


def test_it_is_used_on_this_machine() -> None:
    """On AMD's CPUs torch draws as above; where it does not, nothing else here is a test."""
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    theirs = torch.empty(3000).bernoulli_(0.3, generator=generators[0])
    ours = torch.empty(3000)
    mask_draws.draw(ours, 0.3, generators[1])
    same = torch.equal(theirs, ours) and torch.equal(*[g.get_state() for g in generators])
    assert mask_draws.agrees() == same


@pytest.mark.parametrize(
    ("mask", "probability", "state", "message"),
    [
        (torch.empty(3), 1.5, None, "probability: it must be between 0 and 1"),
        (torch.empty(3), float("nan"), None, "probability: it must be between 0 and 1"),
        (torch.empty(3, 4).t(), 0.5, None, "mask: it must be contiguous"),
        (torch.empty(3, dtype=torch.int32), 0.5, None, "mask: its dtype must be float32, float64, bfloat16 or float16"),
        (torch.empty(3), 0.5, torch.zeros(16, dtype=torch.uint8), "state: it must be what torch.get_rng_state"),
        (torch.empty(3), 0.5, torch.zeros(5056), "state: it must be what torch.get_rng_state"),
        (
            torch.empty(3),
            0.5,
            torch.zeros(2 * 5056, dtype=torch.uint8)[::2],
            "state: it must be what torch.get_rng_state",
        ),
        (torch.empty(3), 0.5, torch.zeros(5056, dtype=torch.uint8), "state: it is not that of a Mersenne Twister"),
    ],
)
def test_what_it_refuses(mask: Tensor, probability: float, state: Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sama.draw_mask(mask, probability, torch.get_rng_state() if state is None else state)


Draw = Callable[[], Tensor]


def random_draw(rng: random.Random) -> Draw:
    p, n = rng.choice([0.1, 0.5]), rng.choice([1, 7, 300, 1000])
    own = torch.Generator().manual_seed(n)
    return rng.choice(
        [
            lambda: F.dropout(torch.ones(n), p),
            lambda: F.dropout(torch.ones(n, dtype=torch.bfloat16), p),
            lambda: F.dropout(torch.ones(n, 3, dtype=torch.float64).t(), p),
            lambda: torch.rand(n),
            lambda: torch.randn(n),
            lambda: torch.empty(n, dtype=torch.bool).bernoulli_(p),
            lambda: torch.empty(n).bernoulli_(p),
            lambda: torch.empty(n).bernoulli_(p, generator=own),
            lambda: torch.empty(n).bernoulli_(torch.full((n,), p)),
            lambda: F.dropout(torch.ones(n), p, training=False),
            lambda: F.alpha_dropout(torch.ones(n), p),
        ]
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_draws_is_torchs(seed: int, drawn: list[tuple[int, ...]], always: None) -> None:
    results = []
    for ours in (False, True):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        draws = [random_draw(rng) for _ in range(25)]
        if ours:
            with mask_draws.fast(lambda: torch.zeros(()), CPU):
                values = [draw() for draw in draws]
        else:
            values = [draw() for draw in draws]
        results.append([*values, torch.get_rng_state()])
    assert all(map(torch.equal, *results))
    assert drawn


def meta_step_on_bert(**options: Any) -> tuple[sk.MetaGradient, Tensor]:
    problem = classifier(dropout=0.1, dtype=torch.float32)
    optimizer = torch.optim.Adam(problem.theta, lr=1e-3)
    torch.manual_seed(3)
    for _ in range(2):
        problem.step(optimizer)
    return run(problem, optimizer, **options), torch.get_rng_state()


@pytest.mark.parametrize(
    ("algorithm", "losses"), [("sama", 3), (Neumann(terms=2), 2), (Iterative(steps=2), 3), ("t1_t2", 2)]
)
def test_no_bit_changes_on_a_real_model(
    algorithm: Any, losses: int, drawn: list[tuple[int, ...]], always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, state = meta_step_on_bert(algorithm=algorithm)
    assert len(drawn) == losses * 8  # 3 in each of 2 layers, the embeddings, the classifier
    without_draws(monkeypatch)
    plain, plain_state = meta_step_on_bert(algorithm=algorithm)
    assert len(drawn) == losses * 8
    assert not ours.degenerate and torch.equal(state, plain_state)
    assert all(map(same_bits, ours.grads, plain.grads))
    assert same_bits(ours.meta_loss, plain.meta_loss)


def test_a_loss_that_draws_too_little_is_left_alone(drawn: list[tuple[int, ...]]) -> None:
    """Every operator pays for the mode; sixteen evaluations later it may be worth it."""
    elements = 100

    def loss() -> Tensor:
        return F.dropout(torch.ones(elements), 0.5).sum()

    def evaluate() -> int:
        before = len(drawn)
        with mask_draws.fast(loss, CPU):
            loss()
        return len(drawn) - before

    assert [evaluate() for _ in range(17)] == [1, *[0] * 15, 1]
    elements = 100_000
    assert [evaluate() for _ in range(18)] == [*[0] * 15, 1, 1, 1]


def test_recomputed_activations_see_the_masks_of_their_forward(
    drawn: list[tuple[int, ...]], always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing recomputes in the backward pass, outside the block, from the generator's state in the forward."""

    def once() -> sk.MetaGradient:
        problem = weight_net(0)

        def base_loss() -> Tensor:
            torch.manual_seed(8)
            losses = (problem.net(torch.randn(24, 5, dtype=torch.float64)) - 1).square()

            def weigh(x: Tensor) -> Tensor:
                return problem.weigher(F.dropout(x, 0.5))

            return (checkpoint(weigh, sk.stop_gradient(losses), use_reentrant=False) * losses).mean()

        problem.base_loss = base_loss
        return meta_grad(problem, after_steps(problem, 0))

    got = once()
    assert drawn
    without_draws(monkeypatch)
    assert all(map(same_bits, got.grads, once().grads))
    assert got.grads[0].norm() > 0


def test_control_flow_operators(drawn: list[tuple[int, ...]], always: None) -> None:
    """`torch.cond` and others of its kind know of no mode that does not say it takes them."""
    torch.manual_seed(SEED)
    net, lam = nn.Linear(4, 4).double(), torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 4, dtype=torch.float64)

    def grads(choose: Callable[[Tensor], Tensor]) -> Tensor:
        def losses() -> Tensor:
            return choose(F.dropout(net(x), 0.5)).square().sum(1)

        torch.manual_seed(1)
        return sk.meta_grad(
            lambda: (lam.sigmoid() * losses()).sum(), lambda: losses().sum(), base_params=net, meta_params=[lam],
            optimizer=None, adaptation="none",
        ).grads[0]  # fmt: skip

    got = grads(lambda y: torch.cond(x.sum() > 1e9, lambda a: a * 3, lambda a: a.sin(), (y,)))
    assert drawn and got.norm() > 0
    torch.testing.assert_close(got, grads(torch.sin), rtol=1e-12, atol=0)


def test_compiled_models_stay_compiled(drawn: list[tuple[int, ...]]) -> None:
    """torch.compile gives up inside most dispatch modes; not inside this one."""
    frames = 0

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal frames
            frames += 1
            return graph.forward(*args)

        return run

    compiled = torch.compile(lambda x: F.dropout(x * 2, 0.5), backend=backend, fullgraph=True)
    state = torch.get_rng_state()
    with mask_draws.fast(lambda: torch.zeros(()), CPU):
        first = compiled(torch.ones(100))
    torch.set_rng_state(state)
    second = compiled(torch.ones(100))
    assert frames == 2 and torch.equal(first, second)
