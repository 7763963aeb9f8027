"""difference="exact" and "forward" on transformers' own models, against exact double backward in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import Bilevel, direct_gradient, flat, meta_grad, mixed_derivative, relative_error
from test_real_models import CONFIG, classifier
from torch import Tensor, nn
from torch.func import functional_call

import sama_kernels as sk

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("difference", "alpha", "tolerance"), [("exact", 1.0, 1e-12), ("forward", 1e-6, 1e-4)])
def test_bert_with_eager_attention_and_dropout(difference: str, alpha: float, tolerance: float, dropout: float) -> None:
    """The very loss that the recorded base step differentiated: its masks, its held values."""
    problem = classifier(dropout)
    g_loss = problem.base_loss()
    torch.randn(100)  # the generator moves on
    state = torch.get_rng_state()
    d = direct_gradient(problem)
    torch.set_rng_state(state)
    out = meta_grad(problem, None, adaptation="none", difference=difference, alpha=alpha)
    expected = mixed_derivative(Bilevel(problem.net, problem.weigher, lambda: g_loss, problem.meta_loss), d)
    assert relative_error(flat(out.grads), expected) < tolerance


def test_soft_prompt_of_bert_with_tied_weights() -> None:
    """lambda enters below every layer of theta, and theta's output matrix is its input embedding."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**CONFIG, "is_decoder": False})
    net = transformers.BertForMaskedLM(config).double().eval()
    table = net.get_input_embeddings().weight
    assert net.get_output_embeddings().weight is table
    ids = torch.randint(1, 60, (2, 6, 10))
    prompt = (0.1 * torch.randn(10, 32, dtype=torch.float64)).requires_grad_()

    def loss(k: int, prompted: bool) -> Tensor:
        inputs = F.embedding(ids[k], table)
        logits = net(inputs_embeds=inputs + prompt if prompted else inputs).logits
        return F.cross_entropy(logits.transpose(1, 2), ids[k])

    theta = tuple(net.parameters())
    d = torch.autograd.grad(loss(1, False), theta, allow_unused=True)
    g = torch.autograd.grad(loss(0, True), theta, create_graph=True, allow_unused=True)
    along = sum((a * b).sum() for a, b in zip(g, d, strict=True) if a is not None and b is not None)
    (expected,) = torch.autograd.grad(-along, prompt)
    for difference, tolerance in (("exact", 1e-11), ("central", 1e-4)):
        out = sk.meta_grad(
            lambda: loss(0, True), lambda: loss(1, False), base_params=net, meta_params=[prompt], optimizer=None,
            adaptation="none", alpha=1e-3, difference=difference,
        )  # fmt: skip
        assert relative_error(out.grads[0], expected) < tolerance


def test_fused_attention_is_named_and_the_math_kernel_works() -> None:
    torch.manual_seed(0)
    options = {**CONFIG, "attn_implementation": "sdpa", "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    net = transformers.BertForSequenceClassification(transformers.BertConfig(**options)).double()
    problem = classifier(0.0)
    net.load_state_dict(problem.net.state_dict())
    weights = torch.rand(8, dtype=torch.float64, requires_grad=True)
    ids, labels = torch.randint(1, 60, (8, 12)), torch.randint(0, 3, (8,))

    def run(model: torch.nn.Module) -> Tensor:
        each = lambda: F.cross_entropy(model(ids).logits, labels, reduction="none")  # noqa: E731
        return sk.meta_grad(
            lambda: (weights * each()).sum(), lambda: each().mean(), base_params=model, meta_params=[weights],
            optimizer=None, adaptation="none", difference="exact",
        ).grads[0]  # fmt: skip

    with pytest.raises(NotImplementedError, match=r"operator _scaled_dot_product_flash.*attn_implementation=\"eager\""):
        run(net)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(run(net), run(problem.net), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("difference", "bound"), [("central", 1e-7), ("forward", 1e-2), ("exact", 1e-12)])
def test_a_gradient_penalty_by_torch_func(difference: str, bound: float) -> None:
    """A base loss with the gradient of another one inside, which reads theta as an argument; theta itself is frozen."""
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, y, x_meta = (torch.randn(8, k, dtype=torch.float64) for k in (4, 1, 4))
    lam = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def losses(params: dict[str, Tensor]) -> Tensor:
        return (functional_call(net, params, (x,)) - y).square().squeeze(1)

    def base_loss() -> Tensor:
        params = dict(net.named_parameters())
        inner = torch.func.grad(lambda p: losses(p).mean())(params)
        penalty = torch.stack([g.square().sum() for g in inner.values()]).sum()
        return (lam.sigmoid() * losses(params)).mean() + lam.exp().mean() * penalty

    def meta_loss() -> Tensor:
        return (net(x_meta) - y).square().mean()

    theta = list(net.parameters())
    g = torch.autograd.grad(base_loss(), theta, create_graph=True)
    d = torch.autograd.grad(meta_loss(), theta)
    along = torch.stack([(a * b).sum() for a, b in zip(g, d, strict=True)]).sum()
    (expected,) = torch.autograd.grad(-along, lam)
    out = sk.meta_grad(
        base_loss, meta_loss, base_params=net, meta_params=[lam], optimizer=None, adaptation="none", alpha=1e-4,
        difference=difference,
    )  # fmt: skip
    assert relative_error(out.grads[0], expected) < bound
