"""What loading the student for several processes takes of each one's memory.

    python benchmarks/loading.py           # a minute or two; writes benchmarks/results/loading.md

A random Qwen3 model of 101 million parameters, bfloat16 in its file as models come, float32 in memory as it is trained, on a
CPU, shared by two and four processes over gloo. Read by *the first* is what `train` does, which hands them to the others,
tensor by tensor; by *each* is what it did before. Memory is the largest resident set (VmHWM) until the
model is spread, above what was resident before; *spread* is what stays. Who reads has 4 bytes a parameter and 2 of the file's
pages, which the system may drop, and which several readers share, though the sums count them for each. The others have their
parts and, for a moment, the embedding (here 96 MiB), which is received whole. On GPUs both lie there and not on the host; that
has not been run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from cost import MIB, memory, resident
from page import machine, table
from saving import recipe
from transformers import Qwen3Config, Qwen3ForCausalLM

from camopd.engines.transformers import load_model
from camopd.group import current
from camopd.student import Student
from camopd.workers import run_workers

RESULTS = Path(__file__).with_name("results") / "loading.md"


def measured(by_each: bool, folder: str) -> list[dict[str, float]]:
    """Load and spread the model once: peak and lasting MiB and seconds of each process by rank, and the parameters."""
    torch.set_num_threads(1)
    group = current()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now (man 5 proc)
    begun = time.monotonic()
    where = torch.device("cpu" if by_each or group.rank == 0 else "meta")
    student = Student(load_model(Path(folder), where), recipe().train)
    seconds = time.monotonic() - begun
    peak, stays = memory("VmHWM") - before, resident() - before
    number = sum(parameter.numel() for parameter in student.parameters())
    return group.gather({"peak": peak / MIB, "stays": stays / MIB, "seconds": seconds, "parameters": number})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)  # of the workers: large blocks go back as soon as they are free
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_768, hidden_size=768, intermediate_size=2_304, num_hidden_layers=11, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
        for size in (2, 4):
            for by_each in (True, False):
                found = run_workers("loading:measured", {"by_each": by_each, "folder": folder}, num_processes=size)
                first, *others = found
                peaks = [first["peak"], max(other["peak"] for other in others), sum(own["peak"] for own in found)]
                per = f"{peaks[2] * MIB / first['parameters']:.1f}"
                stays, seconds = (max(own[name] for own in found) for name in ("stays", "seconds"))
                *sizes, spread = (f"{value:,.0f} MiB" for value in (*peaks, stays))
                rows.append([str(size), "each" if by_each else "the first", *sizes, per, spread, f"{seconds:.1f} s"])
                print(*rows[-1], flush=True)
    header = ["processes", "read by", "first", "largest other", "all together", "bytes a parameter", "spread, each", "time"]
    RESULTS.write_text(
        f"# Loading\n\n{__doc__.split(chr(10) * 2, 2)[2]}\n{table(header, rows)}\n\n"
        f"{first['parameters']:,.0f} parameters. {machine('safetensors', note='one thread a process')}.\n"
    )


if __name__ == "__main__":
    main()
