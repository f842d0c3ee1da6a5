"""Objectives against float64 and against worked numbers (method sections 2 and 9)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.losses import Terms, importance_mask, sampled_token_loss, token_logprobs, token_weights, topk_loss

VOCAB, WIDTH = 11, 6


def setup(seed: int = 0, tokens: int = 9) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(WIDTH, VOCAB + 3, bias=False)  # three padded rows
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB + 3, WIDTH, generator=generator))
    hidden = torch.randn(tokens, WIDTH, generator=generator, requires_grad=True)
    return hidden, head, torch.randint(VOCAB, (tokens,), generator=generator)


def plain_terms(lengths: list[int], engine: torch.Tensor, scale: float = 1.0) -> Terms:
    weight = token_weights(torch.tensor(lengths), torch.full((len(lengths),), scale), len(lengths))
    return Terms(weight.to(engine.dtype), engine, 0.5, 2.0)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_token_logprobs_equal_float64_and_mask_the_padded_head(chunk: int) -> None:
    hidden, head, targets = setup()
    ids = torch.tensor([[0, 5, 10]] * len(targets))
    out = token_logprobs(hidden, head, targets, vocab_size=VOCAB, chunk=chunk, ids_TK=ids)
    exact = (hidden.double() @ head.weight.double().T)[:, :VOCAB].log_softmax(-1)
    torch.testing.assert_close(out.sampled_T.double(), exact.gather(1, targets[:, None]).squeeze(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.chosen_TK.double(), exact.gather(1, ids), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.entropy_T.double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [2, 100])
def test_chunking_keeps_the_gradient(chunk: int) -> None:
    hidden, head, targets = setup()
    token_logprobs(hidden, head, targets, vocab_size=VOCAB, chunk=chunk).sampled_T.sum().backward()
    exact = hidden.detach().double().requires_grad_()
    (exact @ head.weight.double().T)[:, :VOCAB].log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=1e-5, rtol=0)


def test_logits_alive_are_bounded_by_the_chunk() -> None:
    """Forward and backward pass: no tensor over the vocabulary has more rows than the chunk."""
    hidden, head, targets = setup(tokens=64)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [
                r for r in (result if isinstance(result, tuple) else (result,)) if isinstance(r, torch.Tensor) and r.dim() == 2
            ]
            seen.extend(len(r) for r in tensors if r.shape[1] in (VOCAB, VOCAB + 3))
            return result

    with Watch():
        token_logprobs(hidden, head, targets, vocab_size=VOCAB, chunk=8).sampled_T.sum().backward()
    assert max(seen) == 8


def test_token_weights_by_hand() -> None:
    weights = token_weights(torch.tensor([2, 1]), torch.tensor([2.0, 1.0]), num_selected=4)
    assert weights.tolist() == [0.25, 0.25, 0.25]  # 2 / (2 * 4) twice, then 1 / (1 * 4)


def test_importance_mask_keeps_the_ratio_inside_and_zero_outside() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    engine = logprobs - torch.tensor([0.0, math.log(2.0) - 1e-12, math.log(2.1), math.log(0.4)], dtype=torch.float64)
    terms = Terms(torch.ones(4), engine, 0.5, 2.0)
    assert importance_mask(logprobs, terms).tolist() == pytest.approx([1.0, 2.0, 0.0, 0.0])


def test_sampled_token_loss_by_hand() -> None:
    """Two samples of 2 and 1 tokens, r = 2: -(1/2) [ (1/2)(1 * 2 * 0.5 * -1 + 1 * 2 * -0.5 * -2) + (1 * 2 * 1 * -3) ]."""
    student = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    teacher = torch.tensor([-0.5, -2.5, -2.0])
    loss, sums = sampled_token_loss(student, teacher, plain_terms([2, 1], student.detach(), scale=2.0))
    assert loss.item() == pytest.approx(-0.5 * (0.5 * (2 * 0.5 * -1 + 2 * -0.5 * -2) + 2 * 1 * -3))
    loss.backward()
    assert student.grad.tolist() == pytest.approx([-0.25, 0.25, -1.0])  # - weight * w * A; weight = 2 / (L * 2)
    assert (sums["kept"].item(), sums["gap"].item()) == (3, 2.0)


def test_advantage_clip_limits_the_gradient_and_not_the_reported_gap() -> None:
    student = torch.tensor([-1.0], requires_grad=True)
    loss, sums = sampled_token_loss(student, torch.tensor([-9.0]), plain_terms([1], student.detach()), advantage_clip=5.0)
    loss.backward()
    assert student.grad.item() == 5.0
    assert sums["gap"].item() == 8.0


def test_equal_teacher_and_student_give_exactly_nothing() -> None:
    hidden, head, targets = setup()
    out = token_logprobs(hidden, head, targets, vocab_size=VOCAB, chunk=4)
    own = out.sampled_T.detach()
    loss, _ = sampled_token_loss(out.sampled_T, own, plain_terms([4, 5], own))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().max().item() == 0


@pytest.mark.parametrize("signal", ["sampled", "topk"])
def test_following_the_gradient_moves_the_student_toward_the_teacher(signal: str) -> None:
    """Descending the loss over all tokens weighted by their probability lowers the exact KL(student || teacher)."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, VOCAB, dtype=torch.float64, generator=generator, requires_grad=True)
    teacher = torch.randn(1, VOCAB, dtype=torch.float64, generator=generator).log_softmax(-1)

    def kl() -> torch.Tensor:
        own = logits.log_softmax(-1)
        return (own.exp() * (own - teacher)).sum()

    (exact,) = torch.autograd.grad(kl(), logits)
    own = logits.log_softmax(-1)
    engine = own.detach()[0]
    if signal == "sampled":  # the expectation over the sampled token, taken exactly
        weight = own.detach().exp()[0]
        loss, _ = sampled_token_loss(own[0], teacher[0], Terms(weight, engine, 0.5, 2.0))
    else:
        everything = torch.arange(VOCAB)[None]
        loss, _ = topk_loss(
            own[0, :1], own.gather(1, everything), teacher, torch.zeros(1), Terms(torch.ones(1), engine[:1], 0.5, 2.0)
        )
    (ours,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(ours, exact, atol=1e-8, rtol=0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, VOCAB - 1))
def test_topk_is_a_lower_bound_that_grows_to_the_full_divergence(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(1, VOCAB, dtype=torch.float64, generator=generator).log_softmax(-1)
    teacher = torch.randn(1, VOCAB, dtype=torch.float64, generator=generator).log_softmax(-1)

    def coarse(size: int) -> float:
        top, ids = teacher.topk(size, dim=-1)
        tail = (1 - top.exp().sum(-1)).clamp_min(0)
        terms = Terms(torch.ones(1), student[0, :1], 0.5, 2.0)
        return topk_loss(student[0, :1], student.gather(1, ids), top, tail, terms)[0].item()

    full = (student.exp() * (student - teacher)).sum().item()
    assert coarse(k) <= coarse(k + 1) + 1e-7 <= full + 2e-7
    assert coarse(VOCAB) == pytest.approx(full, abs=1e-6)


def test_topk_by_hand() -> None:
    """p = (1/2, 1/4 | 1/4), q = (1/4, 1/2 | 1/4): KL = 1/2 ln 2 - 1/4 ln 2 + 0."""
    student = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.25, 0.5]], dtype=torch.float64).log()
    terms = Terms(torch.ones(1), student[:, 0], 0.5, 2.0)
    loss, _ = topk_loss(student[:, 0], student, teacher, torch.tensor([0.25], dtype=torch.float64), terms)
    assert loss.item() == pytest.approx(0.25 * math.log(2))
