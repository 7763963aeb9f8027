"""sama_kernels: SAMA meta gradients in three first-order passes, with the model-sized work between them fused."""

from sama_kernels import nn
from sama_kernels.adaptation import carried, register_adaptation
from sama_kernels.checkpoint import load_state_dict, state_dict
from sama_kernels.clipping import clip_coef
from sama_kernels.diagnose import diagnose
from sama_kernels.diagnosis import Diagnosis
from sama_kernels.function import SamaFunction
from sama_kernels.held_values import recorded, stop_gradient
from sama_kernels.info import info
from sama_kernels.meta_gradient import meta_backward, meta_grad, sama_loss
from sama_kernels.types import MetaGradient, Relative, relative
from sama_kernels.version import __version__

__all__ = [
    "Diagnosis",
    "MetaGradient",
    "Relative",
    "SamaFunction",
    "__version__",
    "carried",
    "clip_coef",
    "diagnose",
    "info",
    "load_state_dict",
    "meta_backward",
    "meta_grad",
    "nn",
    "recorded",
    "register_adaptation",
    "relative",
    "sama_loss",
    "state_dict",
    "stop_gradient",
]
