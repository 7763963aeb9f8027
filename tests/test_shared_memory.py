"""Parameters in the same memory are found, whatever their strides; views that share no cell are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels.shared_memory import apart

WHOLE = torch.zeros(24)
APART: dict[str, list[Tensor]] = {
    "columns of one matrix": [WHOLE.view(4, 6)[:, :2], WHOLE.view(4, 6)[:, 2:5], WHOLE.view(4, 6)[:, 5]],
    "even and odd": [WHOLE[::2], WHOLE[1::2]],
    "halves": [WHOLE[:12], WHOLE[12:]],
    "channels last": [torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), WHOLE],
    "no elements": [WHOLE[3:3], WHOLE, torch.zeros(0, 4)],
    "two dtypes in one storage": [WHOLE[:8].view(torch.bfloat16)[8:], WHOLE[:4]],
}
TOGETHER: dict[str, list[Tensor]] = {
    "transposed": [WHOLE.view(4, 6), torch.ones(3), WHOLE.view(4, 6).T],
    "overlapping": [WHOLE[:13], WHOLE[12:]],
    "a row and a column": [WHOLE.view(4, 6)[1], WHOLE.view(4, 6)[:, 2]],
    "one inside": [WHOLE, WHOLE[5:6]],
    "far apart in the order of addresses": [WHOLE.view(4, 6)[:, 0], WHOLE[1:3], WHOLE[8:10], WHOLE[18:19]],
    "two dtypes in one storage": [WHOLE[:8].view(torch.bfloat16)[7:], WHOLE[:4]],
}


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("turn", [1, -1])
def test_tensors_that_share_no_cell(name: str, turn: int) -> None:
    for _ in range(2):  # the second time from memory
        apart(APART[name][::turn])


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("turn", [1, -1])
def test_tensors_that_share_a_cell(name: str, turn: int) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="two parameters in the same memory"):
            apart(TOGETHER[name][::turn])


def test_weights_tied_by_their_transposed_data() -> None:
    """An auto-encoder of two parameters in one memory: theta would move twice, and the meta gradient be anything."""
    coder = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Tanh(), nn.Linear(3, 5, bias=False))
    coder[2].weight.data = coder[0].weight.data.T
    x, lam = torch.randn(6, 5), torch.zeros(6, 1, requires_grad=True)
    with pytest.raises(ValueError, match=r"base_params: tensors 0 and 1 \(shape \(5, 3\)\).*same memory"):
        sk.meta_grad(
            lambda: (lam.sigmoid() * (coder(x) - x).square()).mean(), lambda: coder(x).square().mean(),
            base_params=coder, meta_params=[lam], optimizer=None, adaptation="none",
        )  # fmt: skip
