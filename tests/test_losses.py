"""The objective against float64 arithmetic written out from method sections 2 and 9, whole and in chunks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from camopd.losses import (
    Full,
    Sampled,
    Signal,
    Terms,
    TopK,
    chunked_objective,
    importance_weight,
    objective,
    rows_at_once,
    token_logprobs,
    token_weights,
)
from camopd.presets import Tokens, log_ratio
from camopd.presets.off_policy_kd import imitate
from camopd.presets.relaxed import floored
from camopd.presets.selectkd import accepted

VOCAB, PADDED, WIDTH, TOKENS = 11, 14, 6, 9  # the last three rows of the output layer belong to no token
SIGNALS = ["sampled", "teacher's top k", "student's top k", "full"]
RULES: dict[str, tuple[Callable, Callable[[float, float], float]]] = {  # ours, and A from the two probabilities
    "log-ratio": (log_ratio, lambda q, p: math.log(q / p)),
    "floor": (floored, lambda q, p: max(math.log(q / p), math.log(0.1) / 0.9)),
    "acceptance": (accepted, lambda q, p: (min(q / p, 1) + 0.01 * (1 - min(q / p, 1))) * math.log(q / p)),
    "imitation": (imitate, lambda q, p: 1.0),
}


def setup(seed: int = 0, vocab: int = VOCAB, tokens: int = TOKENS, dtype: torch.dtype = torch.float32):
    """Hidden states and output layer of a student and a teacher, and the sampled tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    student = normal(tokens, WIDTH).requires_grad_(), normal(vocab + PADDED - VOCAB, WIDTH).requires_grad_()
    return student, (normal(tokens, WIDTH), normal(vocab, WIDTH)), torch.randint(vocab, (tokens,), generator=generator)


def exact(hidden: torch.Tensor, weight: torch.Tensor, vocab: int = VOCAB) -> np.ndarray:
    """Probabilities (T, V), float64."""
    scores = hidden.detach().double().numpy() @ weight.detach().double().numpy()[:vocab].T
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def make_signal(kind: str, teacher, p: np.ndarray, q: np.ndarray, targets: torch.Tensor, k: int = 3) -> Signal:
    """What a teacher with probabilities q tells a student with probabilities p."""
    if kind == "sampled":
        return Sampled(torch.from_numpy(np.log(q[np.arange(len(q)), targets])).float())
    if kind == "full":
        return Full(*teacher)
    ids = np.argsort(-(q if kind == "teacher's top k" else p), axis=-1)[:, :k].copy()
    return TopK(torch.from_numpy(ids), torch.from_numpy(np.log(np.take_along_axis(q, ids, -1))).float())


def make_terms(p: np.ndarray, targets: torch.Tensor, **options) -> Terms:
    """Three samples whose engine is off by -0.9 to 0.9 nats: some tokens leave the limits on either side."""
    drift = np.linspace(-0.9, 0.9, len(targets))
    engine = torch.from_numpy(np.log(p[np.arange(len(p)), targets]) - drift).float()
    lengths = torch.tensor([2, 3, len(targets) - 5])
    return Terms(token_weights(lengths, 2.0, 5), engine, **options)


def worked(p: np.ndarray, q: np.ndarray, targets: torch.Tensor, signal: Signal, terms: Terms, advantage: Callable):
    """The loss and its gradient with respect to the logits, in closed form, float64.

    Of token v in candidate c(v) it is -weight p_v (A_c(v) - E[A]); of the sampled-token loss -weight w A (1[v = y] - p_v).
    """
    value, gradient, kept = 0.0, np.zeros_like(p), []
    for t, y in enumerate(targets.tolist()):
        ratio = p[t, y] / math.exp(terms.engine_T[t])
        weight = float(terms.weight_T[t])
        inside = 0.5 <= ratio <= 2.0
        kept.append(inside)
        if isinstance(signal, Sampled):
            a = ratio * inside * advantage(math.exp(signal.teacher_T[t]), p[t, y])
            value -= weight * a * math.log(p[t, y])
            gradient[t] = weight * a * p[t]
            gradient[t, y] -= weight * a
        elif inside:
            ids = list(range(p.shape[1])) if isinstance(signal, Full) else signal.ids_TK[t].tolist()
            teacher = q[t, ids] if isinstance(signal, Full) else np.exp(signal.teacher_TK[t].double().numpy())
            rest = np.ones(p.shape[1], bool)
            rest[ids] = False
            a_v = np.zeros(p.shape[1])
            a_v[ids] = [advantage(theirs, own) for theirs, own in zip(teacher, p[t, ids], strict=True)]
            if rest.any():
                a_v[rest] = advantage(1 - teacher.sum(), p[t, rest].sum())
            value -= weight * (p[t] @ a_v)
            gradient[t] = -weight * p[t] * (a_v - p[t] @ a_v)
    return value, gradient, kept


# --- The objective --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", SIGNALS)
def test_value_and_gradients_equal_float64(kind: str, rule: str) -> None:
    (hidden, weight), teacher, targets = setup()
    p, q = exact(hidden, weight), exact(*teacher)
    signal, terms = make_signal(kind, teacher, p, q, targets), make_terms(p, targets, rule=RULES[rule][0])
    loss, seen = chunked_objective(hidden, weight, targets, signal, terms, vocab_size=VOCAB)
    loss.backward()
    value, gradient, kept = worked(p, q, targets, signal, terms, RULES[rule][1])
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert seen.kept_T.tolist() == kept
    assert 0 < sum(kept) < TOKENS
    np.testing.assert_allclose(hidden.grad, gradient @ weight.detach().double().numpy()[:VOCAB], atol=2e-6)
    np.testing.assert_allclose(weight.grad[:VOCAB], gradient.T @ hidden.detach().double().numpy(), atol=2e-6)


@pytest.mark.parametrize("kind", SIGNALS)
def test_the_clip_limits_the_advantage_and_not_the_reported_gap(kind: str) -> None:
    (hidden, weight), teacher, targets = setup()
    p, q = exact(hidden, weight), exact(*teacher)
    signal, terms = make_signal(kind, teacher, p, q, targets), make_terms(p, targets, advantage_clip=0.3)
    loss, seen = chunked_objective(hidden, weight, targets, signal, terms, vocab_size=VOCAB)
    value, _, _ = worked(p, q, targets, signal, terms, lambda q, p: min(max(math.log(q / p), -0.3), 0.3))
    assert loss.item() == pytest.approx(value, rel=1e-5)
    unclipped = objective(torch.from_numpy(p).log(), targets, signal, make_terms(p, targets))[1]
    torch.testing.assert_close(seen.gap_T, unclipped.gap_T.float(), atol=1e-5, rtol=0)


def test_the_sampled_token_by_hand() -> None:
    """Two samples of 2 and 1 tokens, r = 2: -(1/2) [ (1/2)(2 * 0.5 * -1 + 2 * -0.5 * -2) + 2 * 1 * -3 ]."""
    logprobs = torch.log(torch.tensor([[math.exp(-1)], [math.exp(-2)], [math.exp(-3)]]))
    terms = Terms(token_weights(torch.tensor([2, 1]), 2.0, 2), torch.tensor([-1.0, -2.0, -3.0]))
    targets = torch.zeros(3, dtype=torch.long)
    loss, seen = objective(logprobs, targets, Sampled(torch.tensor([-0.5, -2.5, -2.0])), terms)
    assert loss.item() == pytest.approx(-0.5 * (0.5 * (2 * 0.5 * -1 + 2 * -0.5 * -2) + 2 * 1 * -3))
    assert seen.gap_T.tolist() == pytest.approx([0.5, 0.5, 1.0])


def test_the_top_k_by_hand() -> None:
    """p = (1/2, 1/4 | 1/4), q = (1/4, 1/2 | 1/4): KL = 1/2 ln 2 - 1/4 ln 2 + 0."""
    student = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
    signal = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.5]], dtype=torch.float64).log())
    loss, seen = objective(student, torch.tensor([0]), signal, Terms(torch.ones(1), student[:, 0]))
    assert loss.item() == pytest.approx(0.25 * math.log(2))
    assert seen.gap_T.item() == pytest.approx(0.25 * math.log(2))
    assert seen.covered_T.item() == pytest.approx(0.75)


def test_statistics_equal_float64() -> None:
    (hidden, weight), teacher, targets = setup()
    p, q = exact(hidden, weight), exact(*teacher)
    terms = make_terms(p, targets)
    _, seen = chunked_objective(hidden, weight, targets, Full(*teacher), terms, vocab_size=VOCAB)
    np.testing.assert_allclose(seen.entropy_T, -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(seen.gap_T, (p * np.log(p / q)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(seen.drift_T, np.abs(np.linspace(-0.9, 0.9, TOKENS)), atol=1e-5)
    assert seen.covered_T.tolist() == [1.0] * TOKENS
    assert not any(column.requires_grad for column in vars(seen).values())


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_teacher_equal_to_the_student_gives_nothing(kind: str) -> None:
    """The frozen copy cannot move the student before its first step."""
    (hidden, weight), _, targets = setup()
    own = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, chunk=4, top_k=3)
    signal: Signal = TopK(own.top_ids_TK, own.chosen_TK)
    if kind == "sampled":
        signal = Sampled(own.sampled_T)
    elif kind == "full":
        signal = Full(hidden.detach(), weight.detach()[:VOCAB])
    loss, _ = chunked_objective(hidden, weight, targets, signal, Terms(torch.ones(TOKENS), own.sampled_T), vocab_size=VOCAB)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert hidden.grad.abs().max().item() < 1e-6


# --- Signals and rules ----------------------------------------------------------------------------------------------------


def distributions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 1, VOCAB, dtype=torch.float64, generator=generator)
    return student.log_softmax(-1), teacher.log_softmax(-1)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, VOCAB - 1), st.booleans())
def test_top_k_grows_to_the_full_divergence_from_below(seed: int, k: int, of_student: bool) -> None:
    """To put tokens into one bucket never raises a divergence, whosever most likely tokens stand alone."""
    student, teacher = distributions(seed)

    def coarse(size: int) -> float:
        ids = (student if of_student else teacher).topk(size, dim=-1).indices
        terms = Terms(torch.ones(1), student[0, :1])
        return objective(student, torch.tensor([0]), TopK(ids, teacher.gather(1, ids)), terms)[0].item()

    whole = objective(
        student, torch.tensor([0]), Full(teacher.exp().log(), torch.eye(VOCAB).double()), Terms(torch.ones(1), None)
    )
    full = (student.exp() * (student - teacher)).sum().item()
    assert whole[0].item() == pytest.approx(full, abs=1e-5)
    assert -1e-7 <= coarse(k) <= coarse(k + 1) + 1e-7 <= full + 2e-7
    assert coarse(VOCAB) == pytest.approx(full, abs=1e-6)


def test_the_sampled_token_has_the_full_gradient_in_expectation() -> None:
    """Weighted by its probability and summed over the vocabulary, the sampled token's gradient is the exact divergence's."""
    student, teacher = distributions(3)
    logits = student.clone().requires_grad_()
    (full,) = torch.autograd.grad((logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - teacher)).sum(), logits)
    everything = logits.log_softmax(-1).expand(VOCAB, VOCAB)
    terms = Terms(student[0].exp(), student[0])
    loss, _ = objective(everything, torch.arange(VOCAB), Sampled(teacher[0]), terms)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], full, atol=1e-12, rtol=0)


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_rules_of_presets_keep_their_bounds(seed: int) -> None:
    tokens = Tokens(*distributions(seed))
    plain = log_ratio(tokens)
    assert torch.equal(floored(tokens), plain.clamp(min=math.log(0.1) / 0.9))
    weighted = accepted(tokens)
    assert torch.equal(weighted[plain >= 0], plain[plain >= 0])  # the teacher takes every token that it likes better
    assert ((weighted / plain >= 0.01) & (weighted / plain <= 1)).all()
    assert (imitate(tokens) == 1).all()


def test_importance_weights_keep_the_ratio_inside_and_zero_outside() -> None:
    logprobs = torch.full((5,), -1.0, dtype=torch.float64)
    drift = torch.tensor([0.0, math.log(2.0) - 1e-12, math.log(2.1), math.log(0.5) + 1e-12, math.log(0.4)], dtype=torch.float64)
    weights = importance_weight(logprobs, Terms(torch.ones(5), logprobs - drift))
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.0, 0.5, 0.0])
    assert importance_weight(logprobs, Terms(torch.ones(5), None)).tolist() == [1.0] * 5  # off-policy: nothing to correct


def test_token_weights_by_hand() -> None:
    weights = token_weights(torch.tensor([2, 1]), 2.0, num_selected=4)
    assert weights.tolist() == [0.25, 0.25, 0.5]  # 2 / (2 * 4) twice, then 2 / (1 * 4)


# --- In chunks ------------------------------------------------------------------------------------------------------------

LARGE = 2**17  # 1 MiB of float32 logits is two rows of this vocabulary


@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize(("vocab", "mib"), [(VOCAB, 0), (LARGE, 1), (LARGE, 2), (LARGE, 64)])
def test_chunks_change_nothing(kind: str, vocab: int, mib: int) -> None:
    """1, 2, 4 and all rows at once: value, gradients and statistics are those of the objective on all positions."""
    assert rows_at_once(vocab, mib) == {(VOCAB, 0): 1, (LARGE, 1): 2, (LARGE, 2): 4, (LARGE, 64): 128}[vocab, mib]
    (hidden, weight), teacher, targets = setup(vocab=vocab)
    p, q = exact(hidden, weight, vocab), exact(*teacher, vocab)
    signal, terms = make_signal(kind, teacher, p, q, targets), make_terms(p, targets)
    loss, seen = chunked_objective(hidden, weight, targets, signal, terms, vocab_size=vocab, logits_mib=mib)
    loss.backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    whole, whole_seen = objective((hidden @ weight[:vocab].T).log_softmax(-1), targets, signal, terms)
    whole.backward()
    torch.testing.assert_close((loss, *ours), (whole, hidden.grad, weight.grad), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vars(seen), vars(whole_seen), atol=1e-5, rtol=1e-4)
    assert ours[1][vocab:].abs().max().item() == 0  # padding of the output layer is no token


@pytest.mark.parametrize("kind", SIGNALS)
def test_logits_alive_are_bounded_by_the_chunk(kind: str) -> None:
    """Forward and backward pass: no tensor over the vocabulary has more rows than the chunk."""
    (hidden, weight), teacher, targets = setup(vocab=LARGE, tokens=16)
    p, q = exact(hidden, weight, LARGE), exact(*teacher, LARGE)
    signal, terms = make_signal(kind, teacher, p, q, targets), make_terms(p, targets)
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [r for r in (result if isinstance(result, tuple) else (result,)) if isinstance(r, torch.Tensor)]
            seen.extend(r.numel() // LARGE for r in tensors if r.dim() and r.shape[-1] == LARGE and r.shape[0] != WIDTH)
            return result

    with Watch():
        chunked_objective(hidden, weight, targets, signal, terms, vocab_size=LARGE, logits_mib=1)[0].backward()
        token_logprobs(hidden, weight, targets, vocab_size=LARGE, chunk=2, top_k=3)
    assert max(seen) == 2


def test_bfloat16_is_close() -> None:
    (hidden, weight), teacher, targets = setup(dtype=torch.bfloat16)
    p, q = exact(hidden, weight), exact(*teacher)
    signal, terms = Full(*teacher), make_terms(p, targets)
    loss, _ = chunked_objective(hidden, weight, targets, signal, terms, vocab_size=VOCAB, logits_mib=0)
    loss.backward()
    value, gradient, _ = worked(p, q, targets, signal, terms, RULES["log-ratio"][1])
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert loss.item() == pytest.approx(value, rel=2e-2)
    expected = gradient @ weight.detach().double().numpy()[:VOCAB]
    np.testing.assert_allclose(hidden.grad.float(), expected, atol=2e-2 * np.abs(expected).max())


def test_micro_batches_add_up_in_one_backward_pass() -> None:
    """Two pieces of a batch in one graph, in two, and scaled: the gradients are the same."""
    (hidden, weight), teacher, targets = setup()
    p, q = exact(hidden, weight), exact(*teacher)
    terms = make_terms(p, targets)

    def part(where: slice) -> torch.Tensor:
        signal = Sampled(torch.from_numpy(np.log(q[np.arange(TOKENS), targets])).float()[where])
        own = Terms(terms.weight_T[where], terms.engine_T[where])
        return chunked_objective(hidden[where], weight, targets[where], signal, own, vocab_size=VOCAB)[0]

    def gradients(run: Callable[[], None]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden.grad = weight.grad = None
        run()
        return hidden.grad, weight.grad

    whole = gradients(lambda: part(slice(None)).backward())
    together = gradients(lambda: (part(slice(0, 5)) + part(slice(5, None))).backward())
    apart = gradients(lambda: [part(where).backward() for where in (slice(0, 5), slice(5, None))])
    scaled = gradients(lambda: (3 * part(slice(None)) - 2 * part(slice(None))).backward())
    for found in (together, apart, scaled):
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-4)


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    (hidden, weight), teacher, targets = setup()
    frozen = weight.detach()
    chunked_objective(hidden, frozen, targets, Full(*teacher), Terms(torch.ones(TOKENS), None), vocab_size=VOCAB)[0].backward()
    assert frozen.grad is None
    assert hidden.grad.abs().max().item() > 0


def test_what_the_chunks_cannot_do_is_refused() -> None:
    """Their gradients are made once: neither a second pass through the graph nor a second derivative is silently wrong."""
    (hidden, weight), teacher, targets = setup()

    def loss() -> torch.Tensor:
        terms = Terms(torch.ones(TOKENS), None)
        return chunked_objective(hidden, weight, targets, Full(*teacher), terms, vocab_size=VOCAB)[0]

    twice = loss()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice.backward()
    with pytest.raises(AssertionError, match="no second derivatives"):
        torch.autograd.grad(loss(), hidden, create_graph=True)


# --- Log-probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_token_logprobs_equal_float64_and_mask_the_padded_rows(chunk: int) -> None:
    (hidden, weight), _, targets = setup()
    p = np.log(exact(hidden, weight))
    ids = torch.tensor([[0, 5, 10]] * TOKENS)
    out = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, chunk=chunk, ids_TK=ids)
    np.testing.assert_allclose(out.sampled_T, p[np.arange(TOKENS), targets], atol=1e-5)
    np.testing.assert_allclose(out.chosen_TK, np.take_along_axis(p, ids.numpy(), -1), atol=1e-5)
    top = token_logprobs(hidden, weight, targets, vocab_size=VOCAB, chunk=chunk, top_k=4)
    np.testing.assert_allclose(top.chosen_TK, np.sort(p)[:, :-5:-1], atol=1e-5)
    np.testing.assert_array_equal(top.top_ids_TK, np.argsort(-p)[:, :4])
