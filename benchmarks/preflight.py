"""How long `prepare` takes for a million prompts, and how much memory.

    python benchmarks/preflight.py         # a million rows, about two minutes; writes benchmarks/results/preflight.md

Makes a tokenizer of 32,000 tokens (byte-level BPE with Qwen's splitting, learnt from this Python's own library), a model folder
around it, and a JSONL of conversations of 8 to 24 words; then runs the stage in a process of its own. Seconds are by the clock
and by the processors (others on the machine lengthen the first), the peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from page import machine, table

RESULTS = Path(__file__).with_name("results") / "preflight.md"
VOCABULARY = 32_000
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def make_model(folder: Path) -> None:
    """A folder that passes the checks: tokenizer, configuration, and weights of one embedding."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer.train(library, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[1], pad_token=special[1], chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}))
    save_file({"model.embed_tokens.weight": np.zeros((VOCABULARY, 1), np.float32)}, folder / "model.safetensors")


def make_prompts(path: Path, rows: int) -> None:
    words = " ".join(Path(module).read_text(encoding="utf-8") for module in (argparse.__file__, tempfile.__file__)).split()
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(rows):
            content = " ".join(rng.choices(words, k=rng.randint(8, 24)))
            handle.write(json.dumps({"id": f"p-{number}", "messages": [{"role": "user", "content": content}]}) + "\n")


def measure(folder: Path) -> dict[str, object]:
    """Run the stage here; the process is this script's own second one, so that the peak is the stage's."""
    begun = time.perf_counter()
    from camopd import prepare
    from camopd.config import load_recipe
    from camopd.inputs.preflight import Findings  # noqa: F401 (transformers and torch, if installed: the fixed part)
    from camopd.store import Store

    imported, cpu = time.perf_counter(), time.process_time()
    recipe = load_recipe(folder / "recipe.toml")
    plan = prepare.run(recipe, store=Store())
    done = time.perf_counter()
    record = json.loads((Path(plan.run_uri) / "plan" / "preflight.json").read_bytes())["branches"]["general"]
    return {
        "rows": record["read"],
        "mean_tokens": record["mean_tokens"],
        "seconds": round(done - imported, 1),
        "import_seconds": round(imported - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "rows_per_second": round(record["read"] / (done - imported)),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="camopd-bench-") as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        make_prompts(folder / "prompts.jsonl", options.rows)
        (folder / "tasks").mkdir()
        (folder / "tasks" / "a.yaml").write_text("task: a\n")
        (folder / "recipe.toml").write_text(
            'student = "./model"\noutput = "./runs"\nevaluate.task_dir = "./tasks"\nrollout.max_new_tokens = 1024\n'
            '[[branches]]\nname = "general"\nrole = "recover"\nprompts = "./prompts.jsonl"\ntasks = ["a"]\n'
        )
        command = [sys.executable, __file__, "--measure", scratch]  # a process of its own: its peak memory is the preflight's
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    header = ["rows", "mean tokens", "seconds", "processor seconds", "rows a second", "peak memory"]
    cells = [f"{found['rows']:,}", str(found["mean_tokens"]), str(found["seconds"]), str(found["cpu_seconds"])]
    cells += [f"{found['rows_per_second']:,}", f"{found['peak_mib']} MiB"]
    text = (
        f"# Preflight of {options.rows:,} prompts\n\n`python benchmarks/preflight.py --rows {options.rows}`, {machine()}, one "
        f"run, imports ({found['import_seconds']} s) left out:\n\n{table(header, [cells])}\n\n"
        "The comparison with evaluation items is not in it: a second pass over the rows.\n"
    )
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
