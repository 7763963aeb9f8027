"""The few-shot program's meta gradients and base level against closed forms and dense Hessians, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from few_shot_cases import CPU, SMALL, images_of
from problems import relative_error
from torch import Tensor

import sama_kernels as sk
from sama_experiments.few_shot.methods import METHODS, Settings
from sama_experiments.few_shot.tasks import FewShotTask, draw_task
from sama_experiments.few_shot.training import Learner, MetaTrainer, Problem


def case(method: str, settings: Settings = SMALL, width: int = 2) -> tuple[Learner, FewShotTask]:
    """A learner in float64, whose head is not zero, and a task."""
    learner = Learner(width, METHODS[method], settings, 0, CPU)
    task = draw_task(images_of(), settings.ways, 2, 3, torch.Generator().manual_seed(1), CPU)
    learner.net.double()
    with torch.no_grad():
        learner.net.head.weight.normal_(std=0.3)
    learner.initialisation = sk.nn.ProximalTerm(learner.net, settings.strength)
    return learner, replace(task, support=task.support.double(), query=task.query.double())


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def direct_gradient(learner: Learner, task: FewShotTask) -> Tensor:
    return flat(torch.autograd.grad(learner.meta_loss(task), list(learner.net.parameters())))


def hessian(learner: Learner, task: FewShotTask) -> Tensor:
    """Dense, of the base loss in theta, at the theta that the learner is at."""
    parameters = list(learner.net.parameters())
    first = torch.autograd.grad(learner.base_loss(task), parameters, create_graph=True)
    flattened = torch.cat([g.flatten() for g in first])
    return torch.stack([flat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in flattened])


@pytest.mark.parametrize("alpha", [0.01, 1.0, 30.0])
def test_sama_with_sgd_is_strength_times_lr_times_the_direct_gradient(alpha: float) -> None:
    """The mixed derivative is -strength times the identity and the term a quadratic, so alpha does not matter."""
    learner, task = case("sama", replace(SMALL, alpha=alpha))
    grads, loss, degenerate = learner.meta_gradient(task)
    expected = SMALL.strength * SMALL.inner_lr * direct_gradient(learner, task)
    assert relative_error(flat(grads), expected) < 1e-10
    assert loss == pytest.approx(learner.meta_loss(task).item()) and not degenerate


def test_sama_with_adam_is_strength_times_its_derivative() -> None:
    """D from a difference of torch's own Adam: the last of the steps again, from gradients a little apart."""
    settings = replace(SMALL, inner_optimizer="adam", inner_lr=0.02)
    learner, task = case("sama", settings)
    grads, _, degenerate = learner.meta_gradient(task)
    d = direct_gradient(learner, task)
    learner.adapt(task, settings.inner_steps - 1)
    before = flat(learner.net.parameters())
    optimizer = learner.adapt(task, settings.inner_steps - 1)
    state = optimizer.state_dict()
    g = flat(torch.autograd.grad(learner.base_loss(task), list(learner.net.parameters())))

    def update(gradient: Tensor) -> Tensor:
        p = torch.nn.Parameter(before.clone())
        twin = torch.optim.Adam([p], lr=settings.inner_lr)
        flattened = {name: flat(entry[name] for entry in state["state"].values()) for name in ("exp_avg", "exp_avg_sq")}
        twin.load_state_dict(
            {
                "state": {0: {"step": state["state"][0]["step"].clone(), **flattened}},
                "param_groups": [{**state["param_groups"][0], "params": [0]}],
            }
        )
        p.grad = gradient.clone()
        twin.step()
        return before - p.detach()

    width = 1e-6 * g.abs()
    adaptation = torch.where(width > 0, (update(g + width) - update(g - width)) / (2 * width), 0.0)
    clear = g.abs() > 1e-4 * g.abs().max()  # elsewhere the epsilon counts, which "paper" leaves out
    assert clear.double().mean() > 0.5 and not degenerate
    assert relative_error(flat(grads)[clear], (settings.strength * adaptation * d)[clear]) < 1e-3


def test_conjugate_gradient_is_imaml() -> None:
    """strength (H + strength I)^-1 d with the dense Hessian; and the first-order gradients differ from it."""
    settings = replace(SMALL, solver_steps=150, strength=30.0, inner_lr=0.01)
    learner, task = case("conjugate_gradient", settings)
    grads, _, _ = learner.meta_gradient(task)
    whole = hessian(learner, task)
    assert torch.linalg.eigvalsh(whole)[0] > 0
    d = direct_gradient(learner, task)
    exact = settings.strength * torch.linalg.solve(whole, d)
    assert relative_error(flat(grads), exact) < 1e-6
    sama, _, _ = case("sama", settings)[0].meta_gradient(task)
    cosine = torch.cosine_similarity(flat(sama), exact, dim=0)
    assert 0.5 < cosine < 0.9999


def test_neumann_goes_the_same_way() -> None:
    settings = replace(SMALL, solver_steps=150, strength=30.0, inner_lr=0.02)
    learner, task = case("neumann", settings)
    grads, _, _ = learner.meta_gradient(task)
    whole = hessian(learner, task)
    assert torch.linalg.eigvalsh(whole)[-1] < 2 / settings.inner_lr
    exact = settings.strength * torch.linalg.solve(whole, direct_gradient(learner, task))
    assert relative_error(flat(grads), exact) < 1e-6


def test_first_order_maml_is_the_direct_gradient_without_the_proximal_term() -> None:
    learner, task = case("fomaml")
    grads, _, _ = learner.meta_gradient(task)
    assert relative_error(flat(grads), direct_gradient(learner, task)) < 1e-14
    theta = [p.detach().clone().requires_grad_() for p in learner.initialisation.start]
    names = [name for name, _ in learner.net.named_parameters()]
    for _ in range(SMALL.inner_steps):
        logits = torch.func.functional_call(learner.net, dict(zip(names, theta, strict=True)), (task.support,))
        gradient = torch.autograd.grad(F.cross_entropy(logits, task.support_labels), theta)
        theta = [(p - SMALL.inner_lr * g).detach().requires_grad_() for p, g in zip(theta, gradient, strict=True)]
    assert relative_error(flat(learner.net.parameters()), flat(theta)) < 1e-12


def test_the_base_level_stays_near_the_initialisation() -> None:
    """Every task begins at lambda; a stronger pull ends nearer to it."""
    distances = []
    for strength in (1e-6, 1.0, 4.0):
        learner, task = case("sama", replace(SMALL, strength=strength, inner_steps=20))
        learner.adapt(task, 20)
        first = flat(learner.net.parameters())
        learner.adapt(task, 20)
        assert relative_error(flat(learner.net.parameters()), first) < 1e-9
        distances.append((first - flat(learner.initialisation.start)).norm().item())
    assert distances[0] > 1.2 * distances[1] > 1.2**2 * distances[2] > 0


def test_meta_gradients_are_averaged_over_the_tasks() -> None:
    settings = replace(SMALL, meta_lr=0.1, meta_schedule="constant")
    trainer = MetaTrainer(Problem(images_of(), 2, 1), METHODS["sama"], settings, 3, CPU)
    learner = Learner(2, METHODS["sama"], settings, 3, CPU)
    generator = torch.Generator().manual_seed(3)
    tasks = [draw_task(images_of(), 3, 1, 2, generator, CPU) for _ in range(3)]
    found = [learner.meta_gradient(task) for task in tasks]
    trainer.step()
    for index, p in enumerate(trainer.meta_parameters):
        mean = torch.stack([grads[index] for grads, _, _ in found]).mean(dim=0)
        assert p.grad is not None and torch.allclose(p.grad, mean, rtol=1e-4, atol=1e-7)
    assert trainer.losses == [pytest.approx(sum(loss.item() for _, loss, _ in found) / 3, rel=1e-4)]


def test_meta_training_lowers_the_query_loss() -> None:
    settings = replace(SMALL, meta_steps=16, meta_batch=2, meta_lr=0.02, inner_lr=0.3)
    for method in ("sama", "fomaml"):
        trainer = MetaTrainer(Problem(images_of(), 4, 1), METHODS[method], settings, 0, CPU)
        for _ in range(settings.meta_steps):
            trainer.step()
        assert sum(trainer.losses[-4:]) < 0.9 * sum(trainer.losses[:4]), method
        assert trainer.degenerate == 0
