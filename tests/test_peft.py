"""peft's adapters as theta, peft's prompts as lambda, and accelerate's optimizer: the real libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Bilevel, flat, meta_grad, relative_error, same_bits, snapshot
from test_checkpointing import bert, enable, exact, gpt2, reweighting, sama_na
from torch import Tensor, nn

import sama_kernels as sk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def lora(net: nn.Module, **options: Any) -> nn.Module:
    """Adapters on the attention, with weights that are not zero at the start, in float64."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["query", "value"],
        init_lora_weights=False, **options,
    )  # fmt: skip
    return peft.get_peft_model(net, config).double().train()  # type: ignore[no-any-return]


def names(params: list[Tensor] | tuple[Tensor, ...], net: nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if any(p is q for q in params)}


@pytest.mark.parametrize("adaptation", ["paper", "none"])
def test_only_the_adapters_are_theta(adaptation: str) -> None:
    torch.manual_seed(0)
    problem = reweighting(lora(bert()))
    trained = [p for p in problem.theta if p.requires_grad]
    assert all("lora_" in n or "classifier" in n for n in names(trained, problem.net)) and len(trained) == 10
    before = snapshot(problem.theta)
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    problem.step(optimizer)
    problem.step(optimizer)
    moved = snapshot(problem.theta)
    seen: list[list[Tensor]] = []
    inner = problem.base_loss

    def base_loss() -> Tensor:
        seen.append(snapshot(problem.theta))
        return inner()

    problem.base_loss = base_loss
    out = meta_grad(problem, optimizer, adaptation=adaptation, alpha=0.01)
    assert not out.degenerate
    at_plus = seen[-2]
    for p, old, plus, first in zip(problem.theta, moved, at_plus, before, strict=True):
        assert (
            same_bits(p, old) and same_bits(old, plus) != p.requires_grad and same_bits(old, first) != p.requires_grad
        )


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"modules_to_save": ["pooler"]}], ids=str)
def test_adapters_against_double_backward(variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    problem = reweighting(lora(bert(), **variant))
    assert relative_error(sama_na(problem), exact(problem)) < 1e-6


def test_a_detach_inside_an_adapter_is_noticed() -> None:
    """DoRA holds its weight norms by a plain detach (its paper, Eq. 5), which a finite difference does not see: the
    error does not fall with alpha. peft's code cannot use stop_gradient, so a warning is all there can be."""
    torch.manual_seed(0)
    problem = reweighting(lora(bert(), use_dora=True))
    expected = exact(problem)
    inner = problem.base_loss
    problem.base_loss = lambda: inner() * 1  # code that was not watched before
    with pytest.warns(UserWarning, match="detached"):
        got = sama_na(problem)
    assert 1e-6 < relative_error(got, expected) < 1e-3


def test_adapters_with_checkpointing() -> None:
    torch.manual_seed(0)
    problem = reweighting(lora(bert()))
    expected = exact(problem)
    enable(problem.net, use_reentrant=False)
    assert relative_error(sama_na(problem), expected) < 1e-6


def test_a_learned_prompt_of_peft() -> None:
    """lambda is part of the model: the soft prompt is meta-learned while adapted layers are theta."""
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    net: Any = peft.get_peft_model(gpt2(), config).double().train()
    prompt = net.prompt_encoder
    theta = [p for name, p in net.named_parameters() if "h.1." in name]  # the last layer is finetuned
    for p in theta:
        p.requires_grad_(True)
    ids = torch.randint(1, 60, (2, 4, 8))

    def loss(k: int) -> Tensor:
        logits = net(ids[k]).logits[:, 3:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[k][:, 1:].flatten())

    problem = Bilevel(net, prompt, lambda: loss(0), lambda: loss(1))
    out = sk.meta_grad(
        problem.base_loss, problem.meta_loss, base_params=theta, meta_params=prompt, optimizer=None,
        adaptation="none", alpha=1e-4,
    )  # fmt: skip
    d = torch.autograd.grad(loss(1), theta)
    g = torch.autograd.grad(loss(0), theta, create_graph=True)
    along_d = sum((a * b).sum() for a, b in zip(g, d, strict=True))
    (mixed,) = torch.autograd.grad(-along_d, problem.lam, retain_graph=True)
    (explicit,) = torch.autograd.grad(loss(1), problem.lam)
    assert relative_error(flat(out.grads), flat([mixed + explicit])) < 1e-5
    assert relative_error(flat([mixed + explicit]), flat([explicit])) > 1e-3  # the difference quotient counts


def test_a_prompt_left_among_the_base_parameters_is_named() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    net: Any = peft.get_peft_model(gpt2(), config)
    with pytest.raises(
        ValueError, match=r"meta_params: 1 of .*'prompt_encoder\.default\.embedding\.weight'.*base_params"
    ):
        sk.meta_grad(
            lambda: net(torch.ones(1, 2, dtype=torch.long)).logits.mean(), lambda: torch.zeros(()),
            base_params=net, meta_params=net.prompt_encoder, optimizer=None, adaptation="none",
        )  # fmt: skip


def test_a_training_loop_with_accelerate_and_a_schedule() -> None:
    """Its wrapper may be passed as it is. D uses the rate of the step, not the scheduler's next."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    problem = reweighting(bert())
    plain = torch.optim.AdamW(problem.theta, lr=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(plain, num_warmup_steps=1, num_training_steps=4)
    net, optimizer, schedule = accelerator.prepare(problem.net, plain, schedule)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(problem.base_loss())
        optimizer.step()
        before = meta_grad(problem, optimizer).norm
        assert meta_grad(problem, optimizer.optimizer).norm == before
        rate = plain.param_groups[0]["lr"]
        schedule.step()
        assert plain.param_groups[0]["lr"] != rate
        assert meta_grad(problem, optimizer).norm == before
        norms.append(float(before))
    assert norms[0] == 0 and norms[1] > 0 and net is problem.net  # the warm-up starts from a rate of 0
