"""The ready-made meta learners: neutral starts, closed forms, meta gradients through them, state_dict, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import SEED
from problems import flat, relative_error
from torch import Tensor, nn

import sama_kernels as sk


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)


def shuffled(module: nn.Module) -> nn.Module:
    """With other parameters than at the start, where the last layer is 0."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.7)
    return module


def test_meta_weight_net() -> None:
    net, losses, evidence = sk.nn.MetaWeightNet(3, hidden=8, scale=1.5), torch.rand(6), torch.randn(6, 3)
    assert torch.equal(net(losses, evidence), torch.full((6,), 0.75))
    first, _, last = shuffled(net).net
    hidden = torch.tanh(torch.cat([losses[:, None], evidence], 1) @ first.weight.T + first.bias)
    torch.testing.assert_close(net(losses, evidence), 1.5 / (1 + (-(hidden @ last.weight[0] + last.bias)).exp()))
    assert sk.nn.MetaWeightNet()(losses).shape == (6,)
    for wrong in (None, evidence[:, :2]):
        with pytest.raises(ValueError, match=r"evidence: expected \[B, 3\]"):
            net(losses, wrong)


def test_label_corrector() -> None:
    net, features = sk.nn.LabelCorrector(4, 3, hidden=8, start_gate=0.2), torch.randn(5, 4)
    labels = F.one_hot(torch.randint(3, (5,)), 3).float()
    torch.testing.assert_close(net(features, labels), 0.8 * labels + 0.2 / 3)
    given = torch.tensor([True, False, True, False, True])
    torch.testing.assert_close(net(features, labels, given)[~given], torch.full((2, 3), 1 / 3))
    shuffled(net)
    out = net.net(torch.cat([features, labels], 1))
    gate = torch.where(given, out[:, 3].sigmoid(), 1.0)[:, None]
    torch.testing.assert_close(net(features, labels, given), (1 - gate) * labels + gate * out[:, :3].softmax(1))
    torch.testing.assert_close(net(features, labels, given).sum(1), torch.ones(5))


def test_sample_weights() -> None:
    table = sk.nn.SampleWeights(10, scale=3.0)
    index = torch.tensor([7, 2, 7])
    assert torch.equal(table(index), torch.full((3,), 1.5))
    torch.nn.init.normal_(table.logits)
    torch.testing.assert_close(table(index), 3 * table.logits.sigmoid()[[7, 2, 7]])


def test_proximal_term() -> None:
    net = nn.Linear(3, 2)
    term = sk.nn.ProximalTerm(net, 0.6)
    before = [p.detach().clone() for p in net.parameters()]
    assert term(net) == 0 and all(p is not q for p, q in zip(net.parameters(), term.start, strict=True))
    shuffled(net)
    moved = flat([p.detach() for p in net.parameters()]) - flat(before)
    torch.testing.assert_close(term(net.parameters()), 0.3 * (moved @ moved))
    (grad,) = torch.autograd.grad(term(net), [term.start[0]])
    torch.testing.assert_close(grad, 0.6 * (before[0] - net.weight.detach()))
    term.reset(net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    with pytest.raises(ValueError):
        term([net.weight])


def call(module: nn.Module, losses: Tensor, model: nn.Module) -> Tensor:
    """The weighted or otherwise learned base loss on 6 samples with their losses and 4 features."""
    features = torch.linspace(-1, 1, 24, dtype=losses.dtype).view(6, 4)
    if isinstance(module, sk.nn.MetaWeightNet):
        return (module(sk.stop_gradient(losses), features) * losses).mean()
    if isinstance(module, sk.nn.SampleWeights):
        return (module(torch.tensor([1, 0, 3, 4, 2, 5])) * losses).mean()
    if isinstance(module, sk.nn.LabelCorrector):
        target = module(features, torch.eye(3, dtype=losses.dtype).repeat(2, 1))
        return (losses * target[:, 0] - losses.square() * target[:, 1]).mean()
    return losses.mean() + module(model)


MAKE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "MetaWeightNet": lambda model: sk.nn.MetaWeightNet(4, hidden=5),
    "LabelCorrector": lambda model: sk.nn.LabelCorrector(4, 3, hidden=5),
    "SampleWeights": lambda model: sk.nn.SampleWeights(6),
    "ProximalTerm": lambda model: sk.nn.ProximalTerm(model, 0.5),
}


def problem(name: str) -> tuple[nn.Module, nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    module = MAKE[name](model).double()
    shuffled(module)
    x, y = torch.randn(12, 4).double(), torch.randn(12).double()

    def losses(rows: slice) -> Tensor:
        return (model(x[rows]).squeeze(1) - y[rows]).square()

    return model, module, losses


@pytest.mark.parametrize("name", MAKE)
def test_meta_gradient_is_that_of_one_unrolled_step(name: str) -> None:
    """Against autograd through a step of SGD (lr 0.1) from where theta is; the base loss is curved, so sizes differ by
    how the step moved theta: the meta gradient is taken there where the step began."""
    model, module, losses = problem(name)
    theta, lam = list(model.parameters()), list(module.parameters())
    base, meta = slice(0, 6), slice(6, 12)
    optimizer = torch.optim.SGD(theta, lr=0.1)
    out = sk.meta_grad(
        lambda: call(module, losses(base), model), lambda: losses(meta).mean(), base_params=model, meta_params=module,
        optimizer=optimizer, adaptation="none", difference="exact", hold="center",
    )  # fmt: skip
    g = torch.autograd.grad(call(module, losses(base), model), theta, create_graph=True)
    d = torch.autograd.grad(losses(meta).mean(), theta)
    inner = sum(((a * b).sum() for a, b in zip(g, d, strict=True)), torch.zeros((), dtype=torch.float64))
    expected = [-x for x in torch.autograd.grad(inner, lam)]
    assert flat(expected).norm() > 1e-4 and relative_error(flat(out.grads), flat(expected)) < 1e-9


@pytest.mark.parametrize("name", MAKE)
def test_state_dict_and_compile(name: str) -> None:
    model, module, _ = problem(name)
    other = MAKE[name](model).double()
    other.load_state_dict(module.state_dict())
    inputs: dict[str, tuple[Any, ...]] = {
        "MetaWeightNet": (torch.rand(6).double(), torch.randn(6, 4).double()),
        "LabelCorrector": (torch.randn(6, 4).double(), torch.eye(3).double().repeat(2, 1)),
        "SampleWeights": (torch.tensor([3, 1]),),
        "ProximalTerm": (model,),
    }
    shuffled(model)
    expected = module(*inputs[name])
    assert torch.equal(other(*inputs[name]), expected) and expected.std(correction=0).isfinite().all()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs[name]), expected)


def test_bad_arguments() -> None:
    net = nn.Linear(2, 2)
    bad: list[tuple[str, Callable[[], nn.Module]]] = [
        ("evidence", lambda: sk.nn.MetaWeightNet(-1)),
        ("scale", lambda: sk.nn.MetaWeightNet(scale=0.0)),
        ("scale", lambda: sk.nn.SampleWeights(3, scale=-1.0)),
        ("start_gate", lambda: sk.nn.LabelCorrector(2, 2, start_gate=1.0)),
        ("strength", lambda: sk.nn.ProximalTerm(net, 0.0)),
    ]
    for name, make in bad:
        with pytest.raises(ValueError, match=f"^{name}: must be"):
            make()
