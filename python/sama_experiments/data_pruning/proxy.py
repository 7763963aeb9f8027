"""A narrow model inside a wide one: light enough to look at all samples often, and always up to date."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..common import processes
from .models import Classifier


class Proxy:
    """The first channels of every layer of ``wide``, as a slimmable network (Yu et al., 2019) has them.

    It has no parameters of its own: a step of the one is a step of the other. Statistics of batch normalisation are its
    own, since those of fewer channels differ.

    Args:
        wide: the model that is trained.
        narrow: one of the same build with fewer channels; its values are written over.
    """

    def __init__(self, wide: nn.Module, narrow: Classifier) -> None:
        self.narrow = narrow.requires_grad_(False)
        shapes = {name: p.shape for name, p in narrow.named_parameters()}
        self._shared = {name: (p, tuple(map(slice, shapes[name]))) for name, p in wide.named_parameters()}

    def __call__(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> logits [B, K]; gradients go to the parameters of the wide model."""
        views = {name: p[corner] for name, (p, corner) in self._shared.items()}
        logits: Tensor = functional_call(self.narrow, views, (images,))
        return logits

    @torch.no_grad()
    def model(self) -> Classifier:
        """The narrow model with the present values, to look at samples with; the same on all processes."""
        for name, own in self.narrow.named_parameters():
            p, corner = self._shared[name]
            own.copy_(p[corner])
        for statistic in self.narrow.buffers():
            if statistic.is_floating_point():  # not the number of batches
                processes.sum_in_place(statistic)
                statistic /= processes.world()
        return self.narrow
