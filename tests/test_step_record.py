"""What is remembered of an optimizer's last step: its gradients, its parameters, and the checkpoint of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from clipped import adapted_through_meta_grad
from problems import same_bits
from torch import Tensor

import sama_kernels as sk


def after_steps(optimizer_type: Any = torch.optim.Adam, **options: Any) -> tuple[list[Tensor], Any]:
    params = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4,))]
    optimizer = optimizer_type(params, **{"lr": 0.1, **options})
    for _ in range(3):
        optimizer.zero_grad()
        loss(params).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return params, optimizer


def loss(params: list[Tensor]) -> Tensor:
    return sum(((torch.randn(p.shape).double() * p).sum() + p.square().sum() for p in params), torch.zeros(()))


def ones(params: list[Tensor]) -> list[Tensor | None]:
    return [torch.ones_like(p).detach() for p in params]


def another_backward(params: list[Tensor]) -> None:
    loss(params).backward()  # type: ignore[no-untyped-call]


def replaced(params: list[Tensor]) -> None:
    for p in params:
        p.grad = None
    another_backward(params)  # a new tensor, quite likely at the old address, with the old version


def one_replaced_by_its_copy(params: list[Tensor]) -> None:
    params[1].grad = params[1].grad.clone()  # type: ignore[union-attr]


def clipped_afterwards(params: list[Tensor]) -> None:
    torch.nn.utils.clip_grad_norm_(params, 1e-3)


def zeroed(params: list[Tensor]) -> None:
    for p in params:
        p.grad.zero_()  # type: ignore[union-attr]


def zeroed_by_foreach(params: list[Tensor]) -> None:
    torch.optim.SGD(params).zero_grad(set_to_none=False)


CHANGES = [another_backward, replaced, one_replaced_by_its_copy, clipped_afterwards, zeroed, zeroed_by_foreach]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_gradients_of_another_backward_are_an_error(change: Callable[[list[Tensor]], None], fused: bool) -> None:
    params, optimizer = after_steps(fused=fused)
    adapted_through_meta_grad(params, optimizer, ones(params))
    adapted_through_meta_grad(params, optimizer, ones(params))  # a meta step itself changes nothing
    change(params)
    before = [p.detach().clone() for p in params]
    which = "1" if change is one_replaced_by_its_copy else "0"
    with pytest.raises(ValueError, match=rf"base_params: the \.grad of tensor {which} .*right after optimizer\.step"):
        adapted_through_meta_grad(params, optimizer, ones(params))
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    optimizer.step()  # now it is the gradient of the last step
    adapted_through_meta_grad(params, optimizer, ones(params))


def test_sgd_and_sama_na_do_not_read_the_gradient() -> None:
    params, optimizer = after_steps(torch.optim.SGD, momentum=0.9)
    expected, _ = adapted_through_meta_grad(params, optimizer, ones(params))
    another_backward(params)
    got, _ = adapted_through_meta_grad(params, optimizer, ones(params))
    assert all(map(torch.equal, got, expected))
    params, optimizer = after_steps()
    another_backward(params)
    adapted_through_meta_grad(params, optimizer, ones(params), adaptation="none")


def test_a_step_that_was_not_seen_is_not_checked() -> None:
    params, optimizer = after_steps()
    stranger = torch.optim.Adam(params, lr=0.1)
    stranger.load_state_dict(optimizer.state_dict())
    another_backward(params)
    adapted_through_meta_grad(params, stranger, ones(params))


def test_gradients_changed_by_the_users_own_hooks_are_those_of_the_step() -> None:
    params, optimizer = after_steps()
    optimizer.register_step_pre_hook(lambda *_: clipped_afterwards(params))
    optimizer.step()
    adapted_through_meta_grad(params, optimizer, ones(params))


def test_a_first_step_with_a_closure() -> None:
    """The gradients come into being inside the step."""
    p = torch.randn(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = p.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    (v,), _ = adapted_through_meta_grad([p], optimizer, ones([p]))
    torch.testing.assert_close(v, torch.full((4,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.Adam])
def test_d_right_after_a_resume_is_that_of_the_step(optimizer_type: Any, tensor_lr: bool) -> None:
    """A scheduler has changed lr since, one parameter sat the last step out, SGD's dampening knows its first step."""
    rate = torch.tensor(0.3) if tensor_lr else 0.3
    options = {"dampening": 0.5, "momentum": 0.9} if optimizer_type is torch.optim.SGD else {"betas": (0.7, 0.8)}

    def build() -> tuple[list[Tensor], Any]:
        params = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        groups: Any = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01, "name": "head", "of_mine": object()}]
        return params, optimizer_type(groups, lr=copy.deepcopy(rate), **options)

    params, optimizer = build()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = torch.randn(3).double() if i != step else None  # 0: its first step is the last; 1: sits it out
        optimizer.step()
    scheduler.step()
    expected, _ = adapted_through_meta_grad(params, optimizer, ones(params))
    assert (expected[1] == 0).all() and all((expected[i] != 0).all() for i in (0, 2))
    saved = json.loads(json.dumps(sk.state_dict(optimizer)))

    twins, resumed = build()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, twin in zip(params, twins, strict=True):
        twin.data, twin.grad = p.detach().clone(), p.grad
    without, _ = adapted_through_meta_grad(twins[:1], resumed, ones(twins[:1]))
    sk.load_state_dict(resumed, saved)
    got, _ = adapted_through_meta_grad(twins, resumed, ones(twins))
    assert all(map(torch.equal, got, expected))
    assert not torch.equal(without[0], expected[0])  # without the state D takes today's lr
    assert sk.state_dict(resumed) == saved


def test_the_state_is_small_and_plain() -> None:
    params, optimizer = after_steps()
    state = sk.state_dict(optimizer)
    assert state["steps"] == 3 and state["rounding_base"] == torch.initial_seed()
    assert [g["size"] for g in state["groups"]] == [2] and state["groups"][0]["hyperparameters"]["lr"] == 0.1
    torch.manual_seed(1 + torch.initial_seed())
    assert sk.state_dict(optimizer) == state  # the rounding base stays what it was
    fresh = torch.optim.Adam(params)
    assert sk.state_dict(fresh)["steps"] == 0 and sk.state_dict(fresh)["groups"] == []


def test_bad_states() -> None:
    _, optimizer = after_steps()
    state = sk.state_dict(optimizer)
    other = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match=r"state: .*groups of \[2\] tensors, and this one's have \[1\]"):
        sk.load_state_dict(other, state)
    assert sk.state_dict(other)["steps"] == 0
    with pytest.raises(ValueError, match=r"state: expected what sama_kernels\.state_dict returns"):
        sk.load_state_dict(optimizer, optimizer.state_dict())
    with pytest.raises(ValueError, match="state: its version is 7"):
        sk.load_state_dict(optimizer, {**state, "version": 7})
    with pytest.raises(TypeError, match=r"optimizer: expected a torch\.optim\.Optimizer, got dict"):
        sk.state_dict({})  # type: ignore[arg-type]


def test_an_optimizers_own_pre_hooks_come_before_the_record() -> None:
    """torch runs them after the global ones: they may set lr, take a gradient away, or bring the gradients."""
    params = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    made: list[Tensor] = []

    def prepare(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.001
        made[:] = [torch.randn_like(p) for p in params]
        params[0].grad, params[1].grad = made[0], None

    optimizer.register_step_pre_hook(prepare)
    for later in (False, True):  # a hook that is registered after the first step comes before the record, too
        if later:
            optimizer.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=0.002))
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        mu = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        out = sk.meta_grad(
            lambda mu=mu: (params[0] * mu).sum() + params[1].sum(),  # type: ignore[misc]
            lambda: (params[0] + params[1]).sum(), base_params=params, meta_params=[mu], optimizer=optimizer,
            difference="exact",
        )  # fmt: skip
        rate = 0.002 if later else 0.001
        assert float(out.norm) == pytest.approx(2 * rate)  # of four ones; the second parameter did not move
        torch.testing.assert_close(out.grads[0], torch.full((4,), -rate).double())
    assert copy.deepcopy(optimizer).state_dict()["param_groups"][0]["lr"] == 0.002


KINDS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_was_added_after_the_step_has_sat_it_out(kind: Any) -> None:
    params, optimizer = after_steps(kind)
    before = adapted_through_meta_grad(params, optimizer, ones(params))[0]
    added = torch.randn(5, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": [added], "lr": 7.0})
    found = adapted_through_meta_grad([added, *params], optimizer, ones([added, *params]))[0]
    assert not found[0].any()
    torch.testing.assert_close(found[1:], before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_was_removed_after_the_step(kind: Any) -> None:
    """Each of the others keeps the record of its own step."""
    torch.manual_seed(0)
    params, optimizer = after_steps(kind)
    second = torch.randn(5, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": [second], "lr": 0.7})
    optimizer.zero_grad()
    loss([*params, second]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    before = adapted_through_meta_grad([second], optimizer, ones([second]))[0]
    del optimizer.param_groups[0]
    optimizer.param_groups[0]["lr"] = 100.0
    found = adapted_through_meta_grad([second], optimizer, ones([second]))[0]
    assert same_bits(found[0], before[0]) and before[0].any()


def test_parameters_that_joined_or_mixed_groups() -> None:
    params, optimizer = after_steps(torch.optim.SGD)
    before = adapted_through_meta_grad(params, optimizer, ones(params))[0]
    joined = torch.randn(5, dtype=torch.float64, requires_grad=True)
    optimizer.param_groups[0]["params"].append(joined)
    found = adapted_through_meta_grad([*params, joined], optimizer, ones([*params, joined]))[0]
    assert not found[2].any()
    torch.testing.assert_close(found[:2], before, rtol=1e-12, atol=0)
    optimizer.add_param_group({"params": [torch.ones(1, dtype=torch.float64, requires_grad=True)], "lr": 1.0})
    optimizer.zero_grad()
    loss([*params, joined]).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.param_groups[0]["params"].append(optimizer.param_groups.pop()["params"][0])
    with pytest.raises(ValueError, match="parameters from several groups of its last step; make a base step"):
        adapted_through_meta_grad(params, optimizer, ones(params))[0]


def test_groups_that_change_after_a_checkpoint() -> None:
    params, optimizer = after_steps(torch.optim.AdamW)
    before = adapted_through_meta_grad(params, optimizer, ones(params))[0]
    resumed = torch.optim.AdamW(params, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    sk.load_state_dict(resumed, sk.state_dict(optimizer))
    added = torch.randn(5, dtype=torch.float64, requires_grad=True)
    resumed.add_param_group({"params": [added]})
    found = adapted_through_meta_grad([added, *params], resumed, ones([added, *params]))[0]
    assert not found[0].any()
    torch.testing.assert_close(found[1:], before, rtol=1e-12, atol=0)
    assert [group["size"] for group in sk.state_dict(resumed)["groups"]] == [2, 1]
    resumed.param_groups.pop(0)
    assert [group["size"] for group in sk.state_dict(resumed)["groups"]] == [1]
