"""The micro example's tokenizer and model: how they are made, trained, and asked."""

import time

import torch
from questions import SEED
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer: one token a byte, and five special ones.

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (PAD, END, SYSTEM, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    # The same pipeline as Qwen2Tokenizer, which AutoTokenizer may put in our class's place for a qwen3 model: it then
    # rebuilds everything but vocabulary and merges, and the ids agree only if the pipeline is the same to begin with.
    bytes_ = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def render(tokenizer, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


# ---------------------------------------------------------------------------------------------------------------------
# Models

# A question's letters are random and cannot be predicted: at full weight their noise drowns the answers.
GENERAL = {"steps": 1700, "lr": 4e-3, "batch": 96, "decay": 0.05, "prompt_weight": 0.05}
# Gentle: a rougher tuning leaves nothing to recover. Answers only, as instruction tuning mostly does.
DOMAIN = {"steps": 700, "lr": 1e-3, "batch": 64, "decay": 0.0, "prompt_weight": 0.0}


def make_model(tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=264,  # 261 tokens, rounded up to a multiple of 8
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM takes
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager")  # a quarter faster at this size
    # The recipe samples at temperature 1 from the whole distribution: say so here, for every engine reads this file.
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    return model


def collate(tokenizer, pairs: list[tuple[str, str]], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and loss weights [B, T], padded on the right.

    The answer and its end token weigh 1. The question and its end token weigh `prompt_weight`. What the chat template
    puts in by itself, and the padding, weigh nothing: nobody samples these.
    """
    rows = [(render(tokenizer, q), [*tokenizer.encode(a), tokenizer.eos_token_id]) for q, a in pairs]
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    weights = torch.zeros(len(rows), width)
    for i, (p, a) in enumerate(rows):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        weights[i, 1 : len(p) - 1] = prompt_weight  # between the user's mark and the assistant's
        weights[i, len(p) : len(p) + len(a)] = 1.0
    return ids, weights


def fit(model, tokenizer, draw, *, steps: int, lr: float, batch: int, decay: float, prompt_weight: float) -> None:
    """Trains on `draw()`, one (question, answer) a call, with a short warm-up and a linear way down to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 50, (steps - t) / steps * 1.1, 1.0))
    started = time.time()
    for step in range(steps):
        ids, weights = collate(tokenizer, [draw() for _ in range(batch)], prompt_weight)
        # No attention mask: the padding stands on the right, where causal attention never looks.
        logits = model(input_ids=ids[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = losses @ weights[:, 1:].flatten() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.4f}  {time.time() - started:5.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def answers(model, tokenizer, questions: list[str], *, sample: bool = False) -> list[str]:
    prompts = tokenizer.pad({"input_ids": [render(tokenizer, q) for q in questions]}, return_tensors="pt")
    out = model.generate(**prompts, max_new_tokens=16, do_sample=sample)
    return tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def sampled_questions(model, tokenizer, num: int) -> list[str]:
    """What the model asks after the bare user turn, at temperature 1: one text a row, what follows its end token cut off.

    A model trained on prompts as well as answers writes prompts of its own, as in Magpie (Xu et al. 2024,
    arXiv:2406.08464). An unfinished question keeps all of its tokens.
    """
    turn = torch.full((num, 1), tokenizer.convert_tokens_to_ids(USER))
    out = model.generate(turn, attention_mask=torch.ones_like(turn), max_new_tokens=32, do_sample=True)
    return [text.split(END)[0] for text in tokenizer.batch_decode(out[:, 1:])]


def score(model, tokenizer, rows: list[dict], *, sample: bool = False) -> dict[str, float]:
    """Exact match by kind."""
    hits: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers(model, tokenizer, [r["question"] for r in rows], sample=sample), strict=True):
        hits.setdefault(row["kind"], []).append(answer == row["answer"])
    return {kind: sum(h) / len(h) for kind, h in hits.items()}
