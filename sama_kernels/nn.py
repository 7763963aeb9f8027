"""Small meta learners, ready to use: what lambda usually is. At the start none favours any sample.

    weigh = sk.nn.MetaWeightNet()

    @sk.recorded
    def base_loss():
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (weigh(sk.stop_gradient(losses)) * losses).mean()

`meta_params` takes such a module as it is. Inputs that depend on theta (losses) have to pass `stop_gradient`, outside
of the module: that leaves the modules free for `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class MetaWeightNet(nn.Module):
    """The weight of a sample as a function of its loss and, if given, of other evidence: a 2-layer MLP (Shu et al.,
    "Meta-Weight-Net", 2019; paper, Tables 4 and 6).

    Arguments:
        evidence: how many numbers are known of each sample besides its loss.
        hidden: hidden units.
        scale: weights are between 0 and this; at the start all are scale / 2.
    """

    def __init__(self, evidence: int = 0, hidden: int = 100, scale: float = 2.0) -> None:
        super().__init__()
        if evidence < 0:
            raise ValueError(f"evidence: must be at least 0, got {evidence}")
        if not scale > 0:
            raise ValueError(f"scale: must be above 0, got {scale}")
        self.evidence = evidence
        self.scale = scale
        self.net = _two_layers(1 + evidence, hidden, [0.0])

    def forward(self, losses: Tensor, evidence: Tensor | None = None) -> Tensor:
        """losses [B] (held: `sk.stop_gradient(losses)`), evidence [B, E] -> weights [B]."""
        inputs = losses.unsqueeze(1)
        if (0 if evidence is None else evidence.shape[1]) != self.evidence:
            raise ValueError(f"evidence: expected [B, {self.evidence}], as the net was made, or None for 0")
        if evidence is not None:
            inputs = torch.cat([inputs, evidence], dim=1)
        output: Tensor = self.net(inputs)
        return self.scale * output.squeeze(1).sigmoid()


class LabelCorrector(nn.Module):
    """Corrected label = (1 - gate) * given label + gate * the net's own prediction; gate and prediction are functions
    of features of the sample and of its label (after Zheng, Awadallah and Dumais, "Meta label correction", 2021).

    Arguments:
        features: how many numbers are known of each sample.
        classes: how many classes C there are.
        hidden: hidden units.
        start_gate: the gate at the start, between 0 and 1. The prediction is uniform then, so that labels are smoothed.
    """

    def __init__(self, features: int, classes: int, hidden: int = 100, start_gate: float = 0.5) -> None:
        super().__init__()
        if not 0 < start_gate < 1:
            raise ValueError(f"start_gate: must be between 0 and 1, got {start_gate}")
        self.classes = classes
        logit = torch.logit(torch.tensor(start_gate, dtype=torch.float64, device="cpu")).item()
        self.net = _two_layers(features + classes, hidden, [0.0] * classes + [logit])

    def forward(self, features: Tensor, labels: Tensor, given: Tensor | None = None) -> Tensor:
        """features [B, F], labels [B, C] (one-hot or a distribution), given [B] (bool; default all) -> labels [B, C].

        Where no label is given the result is the prediction alone.
        """
        output = self.net(torch.cat([features, labels], dim=1))
        gate = output[:, self.classes].sigmoid()
        if given is not None:
            gate = torch.where(given, gate, 1.0)
        return torch.lerp(labels, output[:, : self.classes].softmax(dim=1), gate.unsqueeze(1))


class SampleWeights(nn.Module):
    """A weight of its own for each of `count` samples, 4 `count` bytes; no net, so nothing carries over to new samples.

    Adam's momentum goes on moving entries that were not in a batch; plain SGD as meta optimizer leaves them.

    Arguments:
        count: samples. scale: weights are between 0 and this; at the start all are scale / 2.
    """

    def __init__(self, count: int, scale: float = 2.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale: must be above 0, got {scale}")
        self.scale = scale
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self, index: Tensor) -> Tensor:
        """index [B], int64 -> weights [B]."""
        return self.scale * self.logits[index].sigmoid()


class ProximalTerm(nn.Module):
    """strength / 2 * |theta - lambda|^2, lambda being an initialisation of theta to learn (Rajeswaran et al., "iMAML",
    2019, Eq. 3; paper, Appendix D): add it to the base loss.

    Arguments:
        params: a module or the parameters theta; lambda begins as a copy of their values.
        strength: of the pull towards lambda, above 0.
    """

    def __init__(self, params: nn.Module | Iterable[Tensor], strength: float) -> None:
        super().__init__()
        if not strength > 0:
            raise ValueError(f"strength: must be above 0, got {strength}")
        self.strength = strength
        self.start = nn.ParameterList([p.detach().clone() for p in _tensors(params)])

    def forward(self, params: nn.Module | Iterable[Tensor]) -> Tensor:
        """theta, in the order in which it was given -> 0-dim."""
        squares = [(p - q).square().sum() for p, q in zip(_tensors(params), self.start, strict=True)]
        return self.strength / 2 * torch.stack(squares).sum()

    @torch.no_grad()
    def reset(self, params: nn.Module | Iterable[Tensor]) -> None:
        """theta <- lambda, in place: where the base level of a new task begins."""
        for p, q in zip(_tensors(params), self.start, strict=True):
            p.copy_(q)


def _tensors(params: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    return list(params.parameters() if isinstance(params, nn.Module) else params)


def _two_layers(inputs: int, hidden: int, start: list[float]) -> nn.Sequential:
    """A 2-layer MLP that puts out `start` at first, whatever its input."""
    last = nn.Linear(hidden, len(start))
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor(start))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), last)
