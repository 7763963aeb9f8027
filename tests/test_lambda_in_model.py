"""lambda inside the base model, in several modules, or beside sparse embeddings: against exact double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import flat, relative_error, same_bits, snapshot
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sama_kernels as sk


class Classifier(nn.Module):
    """A small text classifier with everything that one may want to learn at the upper level."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 6)
        self.prompt = nn.Parameter(torch.randn(2, 6))  # soft prompt in front of the text
        self.noise = nn.Parameter(torch.full((6,), -1.0))  # learned augmentation: scale of the input noise
        self.body = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 3)
        self.temperature = nn.Parameter(torch.tensor(0.3))  # learned scale of the logits

    def forward(self, ids: Tensor, augment: bool = False) -> Tensor:
        x = self.embed(ids)
        if augment:
            x = x + self.noise.exp() * torch.randn_like(x)
        x = torch.cat([self.prompt.expand(len(ids), -1, -1), x], 1)
        with sdpa_kernel(SDPBackend.MATH):  # double backward needs it
            logits: Tensor = self.head(self.body(x).mean(1)) * self.temperature.exp()
        return logits


class Setting:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Classifier().double()
        self.ids, self.labels = torch.randint(0, 30, (2, 8, 5)), torch.randint(0, 3, (2, 8))

    def base_loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.ids[0], augment=True), self.labels[0])

    def meta_loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.ids[1]), self.labels[1])

    def theta(self, *but: Tensor) -> list[Tensor]:
        return [p for p in self.net.parameters() if not any(p is q for q in but)]

    def exact(self, theta: list[Tensor], lam: list[Tensor]) -> Tensor:
        """The explicit dL_meta/dlambda minus d2L_base/dlambda dtheta d, the base loss on the noise of the passes."""
        d = torch.autograd.grad(self.meta_loss(), theta, allow_unused=True)
        explicit = torch.autograd.grad(self.meta_loss(), lam, allow_unused=True)
        g = torch.autograd.grad(self.base_loss(), theta, create_graph=True, allow_unused=True)
        along_d = sum((a * b).sum() for a, b in zip(g, d, strict=True) if a is not None and b is not None)
        mixed = torch.autograd.grad(-along_d, lam)
        return flat([m if e is None else m + e for m, e in zip(mixed, explicit, strict=True)])


def sama_na(setting: Setting, theta: Any, lam: Any, **options: Any) -> sk.MetaGradient:
    return sk.meta_grad(
        setting.base_loss, setting.meta_loss, base_params=theta, meta_params=lam, optimizer=None, adaptation="none",
        **{"alpha": 1e-4, **options},
    )  # fmt: skip


INSIDE: dict[str, Callable[[Classifier], list[Tensor]]] = {
    "soft prompt": lambda net: [net.prompt],
    "loss scaler": lambda net: [net.temperature],
    "augmentation": lambda net: [net.noise],
    "all three": lambda net: [net.prompt, net.temperature, net.noise],
    "embedding": lambda net: [net.embed.weight],
}


@pytest.mark.parametrize("what", INSIDE)
def test_lambda_inside_the_model(what: str) -> None:
    setting = Setting()
    lam = INSIDE[what](setting.net)
    theta = setting.theta(*lam)
    before = snapshot(tuple(setting.net.parameters()))
    state = torch.get_rng_state()
    out = sama_na(setting, theta, lam)
    torch.set_rng_state(state)
    assert relative_error(flat(out.grads), setting.exact(theta, lam)) < 1e-6
    assert all(map(same_bits, setting.net.parameters(), before))
    assert all(p.requires_grad and p.grad is None for p in setting.net.parameters())


def test_shared_parameters_are_named() -> None:
    setting = Setting()
    net = setting.net
    with pytest.raises(
        ValueError, match=r"meta_params: 1 of these .*'prompt'\); pass base_params without them: \[p for"
    ):
        sama_na(setting, net, [net.prompt])
    everything = r"meta_params: 18 of these .*'prompt', 'noise', 'temperature' and 15 more\)"
    with pytest.raises(ValueError, match=everything):
        sama_na(setting, net, net)
    with pytest.raises(ValueError, match=r"'self_attn\.in_proj_weight', .* and 9 more"):
        sama_na(setting, list(net.parameters()), [net.body])
    with pytest.raises(ValueError, match=r"meta_params: 1 of these .*\(tensor 1\)"):
        sama_na(setting, list(net.parameters()), [torch.ones(1, requires_grad=True), net.prompt])


class Reweighting(Setting):
    """Weights from one network and a label correction from another, as lambda."""

    def __init__(self) -> None:
        super().__init__()
        self.weigher = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.corrector = nn.Linear(3, 3).double()
        self.bias = torch.zeros((), dtype=torch.float64, requires_grad=True)

    @property
    def lam(self) -> list[Tensor]:
        return [*self.weigher.parameters(), *self.corrector.parameters(), self.bias]

    def base_loss(self) -> Tensor:
        logits = self.net(self.ids[0])
        targets = F.one_hot(self.labels[0], 3).double()
        targets = targets + 0.1 * self.corrector(sk.stop_gradient(logits).softmax(-1))
        losses = F.cross_entropy(logits, targets, reduction="none")
        weights = torch.sigmoid(self.weigher(sk.stop_gradient(losses)[:, None]).squeeze(1) + self.bias)
        return (weights * losses).mean()


MANY: dict[str, Callable[[Reweighting], Any]] = {
    "list of modules and a tensor": lambda s: [s.weigher, s.corrector, s.bias],
    "tuple": lambda s: (s.weigher, s.corrector, s.bias),
    "ModuleList": lambda s: nn.ModuleList([s.weigher, s.corrector, nn.ParameterList([s.bias])]),
    "generator": lambda s: (x for x in [s.weigher, s.corrector, s.bias]),
    "repeated": lambda s: [s.weigher, s.weigher[0], *s.corrector.parameters(), s.bias, s.bias],
    "values of a dict": lambda s: {"w": s.weigher, "c": s.corrector, "b": s.bias}.values(),
}


@pytest.mark.parametrize("how", MANY)
def test_lambda_in_several_modules(how: str) -> None:
    setting = Reweighting()
    setting.bias = nn.Parameter(setting.bias.detach())
    theta = setting.theta(setting.net.prompt, setting.net.noise, setting.net.temperature)
    got = sama_na(setting, theta, MANY[how](setting), hold="center")
    expected = setting.exact(theta, setting.lam)
    assert relative_error(flat(got.grads), expected) < 1e-6
    sk.meta_backward(
        setting.base_loss, setting.meta_loss, base_params=theta, meta_params=MANY[how](setting), optimizer=None,
        adaptation="none", alpha=1e-4,
    )  # fmt: skip
    assert relative_error(flat([p.grad for p in setting.lam if p.grad is not None]), expected) < 1e-6


def test_theta_in_several_modules() -> None:
    setting = Reweighting()
    parts = [setting.net.body, setting.net.head, setting.net.embed.weight]
    expected = sama_na(setting, [*setting.net.body.parameters(), *setting.net.head.parameters(), parts[2]], setting.lam)
    got = sama_na(setting, parts, setting.lam)
    assert all(map(torch.equal, got.grads, expected.grads))


frozen = nn.Linear(2, 2).requires_grad_(False)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "frozen module": (
        [nn.Linear(2, 2), frozen],
        ValueError,
        r"meta_params: element 1 \(Linear\) has no parameter that",
    ),
    "only a frozen module": (frozen, ValueError, "meta_params: no tensor that requires grad in it"),
    "optimizer groups": ([{"params": [torch.ones(1)]}], TypeError, r"meta_params: element 0 is a dict; expected an nn"),
    "named parameters": (nn.Linear(2, 2).named_parameters(), TypeError, r"meta_params: element 0 is a tuple"),
    "dict": ({"net": nn.Linear(2, 2)}, TypeError, r"meta_params: element 0 is a str; .*\.values\(\)"),
    "string": ("net", TypeError, r"meta_params: expected an nn\.Module or an iterable of tensors and modules, got str"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_meta_params_may_not_be(case: str) -> None:
    value, error, message = BAD[case]
    setting = Setting()
    with pytest.raises(error, match=message):
        sama_na(setting, setting.net, value)


@pytest.mark.parametrize("where", ["theta, of the step", "theta, of the meta loss", "lambda"])
def test_sparse_embedding_gradients_are_refused(where: str) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(30, 6, sparse=True)
    net, ids = nn.Linear(6, 1), torch.randint(0, 30, (2, 8))
    theta: list[Any] = [net] if where == "lambda" else [net, table]
    weights = table if where == "lambda" else nn.Parameter(torch.rand(8))
    optimizer = torch.optim.SGD([p for module in theta for p in module.parameters()], lr=0.1)

    def base_loss() -> Tensor:
        losses = net(table(ids[0])).square().squeeze(1)
        return (losses if where == "lambda" else weights * losses).mean()

    optimizer.zero_grad()
    base_loss().backward()
    optimizer.step()
    before = snapshot((*net.parameters(), table.weight))
    adaptation = "paper" if where == "theta, of the step" else "none"
    name = "meta_params" if where == "lambda" else "base_params"
    with pytest.raises(TypeError, match=f"{name}: tensor [0-9] gets a sparse gradient.*sparse=False"):
        sk.meta_grad(
            base_loss, lambda: net(table.weight[ids[1]] if where == "lambda" else table(ids[1])).mean(),
            base_params=theta, meta_params=[weights], optimizer=optimizer, adaptation=adaptation,
        )  # fmt: skip
    assert all(map(same_bits, (*net.parameters(), table.weight), before))
