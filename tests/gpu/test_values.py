"""Losses, passes and updates on the device against float64 and against the same code on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from camopd.engines.packing import PACKED, hidden_states, use_packing
from camopd.losses import Sampled, Terms, chunked_objective, token_logprobs
from camopd.student import Student
from camopd.update import make_optimizer, update
from tests.gpu.memory import peak_bytes
from tests.in_workers import STEPS, make_plan, make_step
from tests.reference import SHARED
from tests.test_losses import RULES, SIGNALS, VOCAB, exact, make_signal, make_terms, setup, worked
from tests.tiny import tiny_model

SEQUENCES = [torch.tensor(ids) for ids in ([3, 4, 5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [9, 9])]


def moved(value: Any, where: torch.device) -> Any:
    """A tensor, or a dataclass of them, on the device."""
    if isinstance(value, Tensor):
        return value.to(where)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: moved(getattr(value, field.name), where) for field in fields(value)})
    return value


# --- The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits_mib", [0, 1, 64])
@pytest.mark.parametrize("kind", SIGNALS)
def test_losses_and_gradients_equal_float64(where: torch.device, kind: str, logits_mib: int) -> None:
    (hidden, weight), teacher, targets = setup()
    p, q = exact(hidden, weight), exact(*teacher)
    signal, terms = make_signal(kind, teacher, p, q, targets), make_terms(p, targets)
    value, gradient, _ = worked(p, q, targets, signal, terms, RULES["log-ratio"][1])
    ours = [part.detach().to(where).requires_grad_() for part in (hidden, weight)]
    given = (targets.to(where), moved(signal, where), moved(terms, where))
    loss, _ = chunked_objective(*ours, *given, vocab_size=VOCAB, logits_mib=logits_mib)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-4, abs=1e-6)
    expected = gradient @ weight.detach().double().numpy()[:VOCAB], gradient.T @ hidden.detach().double().numpy()
    np.testing.assert_allclose(ours[0].grad.cpu(), expected[0], atol=1e-5)
    np.testing.assert_allclose(ours[1].grad.cpu()[:VOCAB], expected[1], atol=1e-5)


def test_log_probabilities_equal_float64(where: torch.device) -> None:
    (hidden, weight), _, targets = setup()
    expected = np.log(exact(hidden, weight))
    at = (part.detach().to(where) for part in (hidden, weight, targets))
    found = token_logprobs(*at, vocab_size=VOCAB, chunk=4, top_k=3)
    np.testing.assert_allclose(found.sampled_T.cpu(), expected[np.arange(len(targets)), targets], atol=1e-5)
    np.testing.assert_allclose(found.chosen_TK.cpu(), -np.sort(-expected)[:, :3], atol=1e-5)


def test_the_loss_needs_a_tenth_of_the_logits(where: torch.device) -> None:
    """At a real vocabulary: beyond inputs and returned gradients, forward and backward pass."""
    tokens, width, vocab_size = 512, 16, 151_936
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, width, device=where).mul_(0.1).requires_grad_() for size in (tokens, vocab_size))
    targets, numbers = torch.zeros(tokens, dtype=torch.long, device=where), torch.full((tokens,), -12.0, device=where)

    def work() -> None:
        signal, terms = Sampled(numbers), Terms(numbers, numbers)
        chunked_objective(hidden, weight, targets, signal, terms, vocab_size=vocab_size, logits_mib=4)[0].backward()

    peak = peak_bytes(work, [hidden, weight, targets, numbers])
    assert peak - hidden.nbytes - weight.nbytes < 0.1 * tokens * vocab_size * 4


# --- Passes without padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_packed_passes_and_their_gradients_are_those_of_each_sequence_alone(where, dtype, close) -> None:
    model = use_packing(tiny_model().to(where))
    assert model.config._attn_implementation == PACKED
    plain = tiny_model().double()

    def gradients(states: Sequence[Tensor], of: torch.nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(0)  # a direction for each: a norm makes the sum of squares a constant
        ahead = [torch.randn(part.shape, generator=generator, dtype=torch.double).to(part) for part in states]
        sum((part * other).sum() for part, other in zip(states, ahead, strict=True)).backward()
        return of.model.layers[0].self_attn.q_proj.weight.grad.double().cpu()

    lengths = [len(ids) for ids in SEQUENCES]
    states = hidden_states(model.to(dtype), torch.cat(SEQUENCES).to(where), torch.tensor(lengths, device=where)).split(lengths)
    alone = [plain.model(ids[None], use_cache=False).last_hidden_state[0] for ids in SEQUENCES]
    for packed, single in zip(states, alone, strict=True):
        torch.testing.assert_close(packed.double().cpu(), single, atol=close, rtol=0)
    ours, exactly = gradients(states, model), gradients(alone, plain)
    assert (ours - exactly).norm() < close * exactly.norm()


# --- Updates --------------------------------------------------------------------------------------------------------------


def after_updates(where: torch.device, precision: str, signal: str = "topk") -> tuple[list[dict[str, Any]], Tensor]:
    """What each update of the steps told, and the weights after them."""
    plan = make_plan("/runs/x", "/models/domain", signal, {"precision": precision})
    model = use_packing(tiny_model().to(where))
    student, optimizer = Student(model, plan.recipe.train), make_optimizer(model, plan.recipe)
    told = [
        update(student, optimizer, make_step(step, counts), recipe=plan.recipe, vocab_size=SHARED)
        for step, counts in enumerate(STEPS)
    ]
    return told, torch.cat([parameter.detach().flatten().cpu() for parameter in model.parameters()])


@pytest.mark.parametrize("signal", ["sampled", "topk"])
def test_updates_on_the_device_are_those_of_the_cpu(where: torch.device, signal: str) -> None:
    (ours, weights), (theirs, expected) = (after_updates(at, "float32", signal) for at in (where, torch.device("cpu")))
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "engine_gap", "entropy"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)
    torch.testing.assert_close(weights, expected, atol=2e-4, rtol=1e-3)


def test_updates_in_bfloat16_are_close_to_float32(where: torch.device) -> None:
    (half, weights), (exactly, expected) = (after_updates(where, precision) for precision in ("bfloat16", "float32"))
    for key in ("loss", "grad_norm"):
        assert half[0][key] == pytest.approx(exactly[0][key], rel=0.1)
    before = torch.cat([parameter.detach().flatten() for parameter in tiny_model().parameters()])
    moved_by = (weights - before, expected - before)
    assert torch.nn.functional.cosine_similarity(*moved_by, dim=0) > 0.9
