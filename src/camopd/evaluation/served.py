"""A served teacher in the evaluation: lm-eval's own wrapper around a Hugging Face model, whose questions go to the server.

Chat template, tokens, truncation and stop texts are those of every other model's evaluation, since the code is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

if TYPE_CHECKING:
    from camopd.engines.remote import RemoteEngine


@dataclass(frozen=True)
class ServedTeacher:
    """What stands for a model in the evaluation.

    Attributes:
        engine: asks the server.
        config: of a model of the same kind: an empty one stands where HFLM wants one, and holds no weights.
        eos_ids: tokens that end an answer.
    """

    engine: RemoteEngine
    config: PreTrainedConfig
    eos_ids: tuple[int, ...]


class ServedLM(HFLM):
    """As ``HFLM``, with a teacher that is not here; ``options`` are HFLM's."""

    def __init__(self, teacher: ServedTeacher, **options: Any) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(teacher.config)
        super().__init__(pretrained=model, max_length=teacher.engine.max_length, **options)
        self._engine, self._eos_ids = teacher.engine, sorted({*teacher.eos_ids, self.eot_token_id})
        self._device = torch.device("cpu")  # of the tokens on their way

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *args: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest."""
        room = self.max_length
        contexts = [context[-(room - len(wanted)) :] for _, context, wanted in requests]
        scores = dict(self._engine.score(contexts, [wanted for _, _, wanted in requests], top_k=1))
        found = [scores[index] for index in range(len(requests))]
        return [
            (float(score.logprobs.sum()), score.topk_ids[:, 0].tolist() == wanted)
            for score, (_, _, wanted) in zip(found, requests, strict=True)
        ]

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Answers behind their prompts, filled up with the padding that HFLM takes away again."""
        prompts = [row[seen.bool()].tolist() for row, seen in zip(context, attention_mask, strict=True)]
        sampling = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name)}
        end = self.tokenizer.decode([self.eot_token_id])
        answers = self._engine.greedy(
            prompts,
            max_new_tokens=max_length - context.shape[1],
            eos_ids=self._eos_ids,
            stop=[text for text in stop if text and text != end],
            **(sampling if options.get("do_sample") else {}),
        )
        rows = [torch.from_numpy(answer).long() for answer in answers]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return torch.cat([context, padded], 1)
