"""Diagnostics of method section 6: do the branches' gradients pull together, and do the selected samples agree?

All of it comes from the gradients of single samples, which are added up one after another: N samples and P parameters never
take N x P numbers. Parameters and their ``.grad`` stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from camopd.schedule import seed_of
from camopd.student import learning

Row = Mapping[str, Any]
MAX_PARAMETERS = 2**27  # 0.5 GiB a float32 vector; two are held for each branch and two more while a gradient is made
# A branch whose samples' gradients are this much smaller than another's has none: what is left is the rounding of a gap of zero
# (log-probabilities of one model differ by some 1e-6 between batches of different shape).
ROUNDING = 1e-5


def measure(
    model: nn.Module,
    batches: Mapping[str, Sequence[Row]],
    loss_of: Callable[[Row], Tensor],
    *,
    max_rows: int = 8,
    max_parameters: int = MAX_PARAMETERS,
) -> dict[str, float | str]:
    """Compare the branches' gradients, and the selected samples with all, at the model's present parameters.

    Each branch is heard through a few samples drawn by their keys, half of them selected ones. The gradient of a branch is the
    mean over these. With so few the cosine is drawn towards 0 by noise; the dot product is not.

    Args:
        model: the student, in evaluation mode.
        batches: branch -> samples of one batch, each with ``prompt_id``, ``sample_index``, and ``kept`` if it was selected.
        loss_of: the scalar loss of one sample, with gradient; a sample's scale r_b belongs in it.
        max_rows: samples a branch; the time is one forward and backward pass for each.
        max_parameters: above it gradients are taken on a sample of blocks (``gradient_blocks``).

    Returns:
        ``parameters``, which says what the gradients are taken on, and numbers, all finite; what is undefined is left out:
        ``<branch>/num_gradients``, ``/gradient_norm``, ``/coherence_all``, ``/coherence_selected``, ``/gcg`` (percent),
        ``/pair_cosine_all``, ``/pair_cosine_selected``; ``gradient/cosine_<a>_<b>`` and ``gradient/dot_<a>_<b>`` for each pair.
        A branch without a gradient (the domain branch before the first update) has the first two alone.
    """
    blocks = gradient_blocks(model, max_parameters=max_parameters)
    parameters = [parameter for block in blocks.values() for parameter in block]
    sums = {branch: branch_sums(rows, loss_of, parameters, max_rows=max_rows) for branch, rows in batches.items()}
    loudest = max((every.mean_norm for every, _ in sums.values()), default=0.0)
    heard = {branch: pair for branch, pair in sums.items() if pair[0].mean_norm > ROUNDING * loudest}
    numbers: dict[str, float] = {}
    for branch, (every, selected) in sums.items():
        numbers |= {f"{branch}/num_gradients": every.count, f"{branch}/gradient_norm": selected.mean.norm().item()}
    for branch, (every, selected) in heard.items():
        numbers |= {
            f"{branch}/coherence_all": every.coherence,
            f"{branch}/coherence_selected": selected.coherence,
            f"{branch}/gcg": gcg(selected.coherence, every.coherence),
            f"{branch}/pair_cosine_all": every.pair_cosine,
            f"{branch}/pair_cosine_selected": selected.pair_cosine,
        }
    numbers |= compare_branches({branch: selected.mean for branch, (_, selected) in heard.items()})
    finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return {"parameters": ", ".join(blocks), **finite}


# --- What the gradients are taken on --------------------------------------------------------------------------------------


def gradient_blocks(model: nn.Module, *, max_parameters: int) -> dict[str, list[nn.Parameter]]:
    """All parameters of a small model; of a larger one as many transformer blocks as fit, evenly spread from first to last.

    Args:
        model: a transformer whose outermost ``ModuleList`` holds its blocks.
        max_parameters: how many parameters may be taken; one block, the middle one, is taken even where it does not fit.

    Returns:
        Block -> its parameters: ``{"all parameters": [...]}`` or ``{"model.layers.0": [...], "model.layers.27": [...]}``.
    """
    everything = list(learning(model).values())
    if sum(parameter.numel() for parameter in everything) <= max_parameters:
        return {"all parameters": everything}
    name, layers = next((name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList))
    largest = max(sum(parameter.numel() for parameter in learning(layer).values()) for layer in layers)
    places = spread(len(layers), min(max(max_parameters // largest, 1), len(layers)))
    return {f"{name}.{place}": list(learning(layers[place]).values()) for place in places}


def spread(length: int, count: int) -> list[int]:
    """``count`` of the places 0 .. length - 1, evenly: both ends among them, or the middle one alone."""
    return [length // 2] if count == 1 else [i * (length - 1) // (count - 1) for i in range(count)]


# --- Gradients of single samples ------------------------------------------------------------------------------------------


@dataclass
class GradientSum:
    """What is remembered of the gradients g_i of a set of samples.

    Attributes:
        vector: sum_i g_i, length P.
        count: how many.
        norms: sum_i ||g_i||.
        pair_dots: sum_{i<j} g_i . g_j.
        pair_norms: sum_{i<j} ||g_i|| ||g_j||.
    """

    vector: Tensor
    count: int = 0
    norms: float = 0.0
    pair_dots: float = 0.0
    pair_norms: float = 0.0

    def add(self, gradient: Tensor) -> None:
        norm = gradient.norm().item()
        self.pair_dots += torch.dot(self.vector, gradient).item()
        self.pair_norms += self.norms * norm
        self.vector += gradient
        self.norms += norm
        self.count += 1

    @property
    def mean(self) -> Tensor:
        """The mean gradient, length P; NaN of an empty set."""
        return self.vector / self.count

    @property
    def mean_norm(self) -> float:
        """The mean length of a sample's gradient; 0 of an empty set."""
        return self.norms / max(self.count, 1)

    @property
    def coherence(self) -> float:
        """Coh = ||sum_i g_i|| / sum_i ||g_i|| (method section 6): 1 where all point the same way, 0 where they cancel.

        It depends on the number of samples: N gradients of one length that have nothing in common have 1 / sqrt(N).
        """
        return _ratio(self.vector.norm().item(), self.norms)

    @property
    def pair_cosine(self) -> float:
        """The mean cosine of two different samples, weighted by their norms: 0 where they have nothing in common, for any N."""
        return _ratio(self.pair_dots, self.pair_norms)


def draw(rows: Sequence[Row], count: int) -> list[tuple[Row, float]]:
    """At most ``count`` of the rows, by their keys alone (neither order nor time matters), half of them selected ones.

    Selection keeps a few samples of many: without their half there would often be none, and so no gradient of the branch.

    Returns:
        Rows with weights of mean 1 that give both groups the share of the batch which they have: N_group / n_group, scaled.
    """
    ordered = sorted(rows, key=lambda row: seed_of("diagnostics", row["prompt_id"], row["sample_index"]))
    groups = [[row for row in ordered if row["kept"]], [row for row in ordered if not row["kept"]]]
    selected = max((count + 1) // 2, count - len(groups[1]))
    drawn = [groups[0][:selected], groups[1][: count - min(selected, len(groups[0]))]]
    total = sum(map(len, drawn))
    return [
        (row, len(group) / len(part) * total / len(rows)) for group, part in zip(groups, drawn, strict=True) for row in part
    ]


def per_sample_gradients(
    rows: Sequence[Row], loss_of: Callable[[Row], Tensor], parameters: Sequence[nn.Parameter]
) -> Iterator[Tensor]:
    """The gradient of each row's loss, one after another, length P: the parameters laid end to end.

    A parameter that a row does not reach, such as an expert it was not sent to, has a gradient of zero.
    """
    for row in rows:
        gradients = torch.autograd.grad(loss_of(row), parameters, materialize_grads=True)
        yield torch.cat([gradient.flatten() for gradient in gradients])


def branch_sums(
    rows: Sequence[Row], loss_of: Callable[[Row], Tensor], parameters: Sequence[nn.Parameter], *, max_rows: int
) -> tuple[GradientSum, GradientSum]:
    """The gradients of rows drawn from all, weighted to stand for them, and those of the selected ones among them."""
    size = sum(parameter.numel() for parameter in parameters)
    every, selected = GradientSum(parameters[0].new_zeros(size)), GradientSum(parameters[0].new_zeros(size))
    drawn = draw(rows, max_rows)
    gradients = per_sample_gradients([row for row, _ in drawn], loss_of, parameters)
    for (row, weight), gradient in zip(drawn, gradients, strict=True):
        every.add(weight * gradient)
        if row["kept"]:
            selected.add(gradient)
    return every, selected


# --- Comparison (pure) ----------------------------------------------------------------------------------------------------


def gcg(selected: float, every: float) -> float:
    """Gradient coherence gain of selection, percent: (Coh(selected) - Coh(all)) / Coh(all) * 100 (method section 6)."""
    return 100 * _ratio(selected - every, every)


def compare_branches(means: Mapping[str, Tensor]) -> dict[str, float]:
    """Cosine and dot product of each pair of branches' mean gradients; a negative one is counteraction (method section 6).

    A pair is named in alphabetical order, so that its name never depends on which branch came first.
    """
    numbers = {}
    for (a, first), (b, second) in combinations(sorted(means.items()), 2):
        dot = torch.dot(first, second).item()
        numbers[f"gradient/cosine_{a}_{b}"] = _ratio(dot, first.norm().item() * second.norm().item())
        numbers[f"gradient/dot_{a}_{b}"] = dot
    return numbers


def _ratio(part: float, whole: float) -> float:
    """NaN where it is undefined: callers leave such a number out."""
    return part / whole if whole else math.nan
