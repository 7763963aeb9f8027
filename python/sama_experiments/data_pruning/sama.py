"""The search that is the paper's: importance weights of the training samples, meta-learned with SAMA (section 4.3).

The weight of a sample is a function of its loss and of its uncertainty, a Meta-Weight-Net's; base level and meta level
both read the training data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sama_kernels as sk

from ..common import processes
from .images import Dataset
from .methods import Settings
from .training import Trainer

META = 1  # the stream of meta batches


class SamaSearch(Trainer):
    """A classifier trained on weighted losses, its exponential average, and the net that gives the weights."""

    def __init__(self, data: Dataset, settings: Settings, seed: int) -> None:
        super().__init__(data, settings, seed, settings.search_epochs)
        average = get_ema_multi_avg_fn(settings.average_decay)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True).eval()
        self.weight_net = sk.nn.MetaWeightNet(evidence=1, hidden=settings.meta_hidden).to(data.train.labels.device)
        self.meta_optimizer = torch.optim.Adam(self.weight_net.parameters(), lr=settings.meta_lr)
        self.steps = 0
        self.degenerate = 0
        self.summed_weights = torch.zeros(len(data.train.labels))
        for group in self.optimizer.param_groups:  # the learning rate is constant (Tables 6 and 7)
            group["lr"], group["momentum"] = settings.search_lr, settings.search_momentum

    def run_epoch(self) -> None:
        """Base steps over all training samples, and a meta step after every few of them."""
        averaged = self.epoch >= self.epochs - self.settings.averaged_epochs
        degenerate = []
        with self.clock():
            meta_batches = self.read(self.batches(META), META)
            weights = torch.zeros(len(self.summed_weights), device=self.data.train.labels.device)
            for index, share, images in self.read(self.batches()):
                step = _WeightedStep(self, index, share, images)
                self.optimizer.zero_grad()
                torch.autograd.backward(share * step.loss())
                self.optimizer.step()
                weights[index] = step.weights.detach()
                self.steps += 1
                if self.steps % self.settings.unroll == 0:
                    degenerate.append(self._meta_step(step, *next(meta_batches)))
                self.average.update_parameters(self.model)
            processes.sum_in_place(weights)  # each sample was seen by one process
            if averaged:
                self.summed_weights += weights.cpu()
            self.degenerate += sum(bool(flag) for flag in degenerate)
        self.epoch += 1

    def scores(self) -> Tensor:
        """The weights that the samples had in the base steps of the last epochs, averaged; float32 [N]."""
        return self.summed_weights / self.settings.averaged_epochs

    def state(self) -> dict[str, Any]:
        """Everything that changes, between two epochs."""
        return super().state() | {
            "average": self.average.state_dict(),
            "weight_net": self.weight_net.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "steps": self.steps,
            "degenerate": self.degenerate,
            "summed_weights": self.summed_weights,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        super().resume(state)
        self.average.load_state_dict(state["average"])
        self.weight_net.load_state_dict(state["weight_net"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self.steps, self.degenerate = state["steps"], state["degenerate"]
        self.summed_weights = state["summed_weights"]

    def _meta_step(self, step: _WeightedStep, index: Tensor, share: float, images: Tensor) -> Tensor:
        """Move the weight net so that the base step just made would have lowered the loss on another batch."""
        labels = self.data.train.labels[index]
        self.meta_optimizer.zero_grad()
        out = sk.meta_backward(
            step.loss,
            lambda: F.cross_entropy(self.averaging_model(images), labels),
            base_params=self.model,
            meta_params=self.weight_net,
            optimizer=self.optimizer,
            alpha=self.settings.alpha,
            sync=self.settings.sync,
            weight=(step.share, share),
            update_base=self.settings.update_base,
        )
        self.meta_optimizer.step()
        return out.degenerate  # read after the epoch: asking now would wait for the device


class _WeightedStep:
    """The weighted loss of one batch, for the base step and the perturbed passes alike."""

    def __init__(self, search: SamaSearch, index: Tensor, share: float, images: Tensor) -> None:
        self.share = share
        self.weights = torch.empty(0)
        labels = search.data.train.labels[index]
        with torch.no_grad():
            averaged = search.average(images).softmax(dim=1)

        @sk.recorded  # keeps what the base step holds, which saves the meta step a forward pass
        def loss() -> Tensor:
            logits = search.averaging_model(images)
            losses = F.cross_entropy(logits, labels, reduction="none")
            # Uncertainty: how far the prediction is from that of the averaged model (appendix B.3).
            uncertainty = sk.stop_gradient(torch.linalg.vector_norm(logits.softmax(dim=1) - averaged, dim=1))
            self.weights = search.weight_net(sk.stop_gradient(losses), uncertainty[:, None])
            return (self.weights * losses).mean()

        self.loss = loss
