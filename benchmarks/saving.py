"""What a checkpoint costs: memory of each process, and the seconds for which it holds up training.

    python benchmarks/saving.py           # some minutes; writes benchmarks/results/saving.md

A random Qwen3 model of 58 million parameters with its moments, float32, on a CPU: alone, and shared by two and four processes
over gloo. *By parts* is what `train` does. *Gathered* is what it did before: the first process collects the weights and moments
of all and writes them. Memory is the largest resident set (VmHWM) while a checkpoint is taken and written above what was
resident before, of the process that needs most, when what is free has gone back to the system. *Copied* are the seconds until
the next update may begin where `train.checkpoint_every` writes beside it; *written* the rest, in a thread.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cost import MIB, memory, resident
from page import machine, table
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from camopd.checkpoint import snapshot
from camopd.config import Branch, Recipe
from camopd.group import current
from camopd.schedule import Schedule
from camopd.student import Student, on_host, whole
from camopd.update import make_optimizer
from camopd.workers import run_workers

RESULTS = Path(__file__).with_name("results") / "saving.md"


def recipe() -> Recipe:
    general = Branch(name="general", role="recover", teacher="/models/general", prompts="/g.jsonl", steps=3)
    return Recipe(student="/models/domain", branches=(general, Branch(name="domain", role="retain", prompts="/d.jsonl")))


def measured(way: str, target: str) -> dict[str, Any]:
    """One checkpoint in this process or group: parameters, peak MiB of the process that needs most, seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_768, hidden_size=512, intermediate_size=1_536, num_hidden_layers=13, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    student = Student(Qwen3ForCausalLM(config).eval(), recipe().train)
    optimizer = make_optimizer(student.model, recipe())
    for parameter in student.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    folder = Path(target) / str(current().rank)
    folder.mkdir(parents=True)
    above = resident()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now (man 5 proc)
    begun = time.monotonic()
    write = {"parts": by_parts, "gathered": gathered}[way](student, optimizer, folder)
    copied = time.monotonic() - begun
    write()
    peak = (memory("VmHWM") - above) / MIB
    everywhere = current().gather({"peak": peak, "copied": copied, "written": time.monotonic() - begun - copied})
    slowest = {name: max(own[name] for own in everywhere) for name in everywhere[0]}
    return slowest | {"parameters": sum(parameter.numel() for parameter in student.model.parameters())}


def by_parts(student: Student, optimizer: torch.optim.Optimizer, folder: Path) -> Callable[[], None]:
    taken = snapshot(student.model, optimizer, Schedule.of(recipe()), seed=0, copy=True)
    nothing = folder / "student"
    nothing.mkdir()
    return lambda: taken.write(folder / "checkpoint", current(), student=nothing)


def gathered(student: Student, optimizer: torch.optim.Optimizer, folder: Path) -> Callable[[], None]:
    """All of it on the first process, whole tensors one after another."""
    tensors = dict(student.model.named_parameters())
    tensors |= {f"{id(p)}.{key}": value for p, state in optimizer.state.items() for key, value in state.items()}
    kept = {}
    for name, tensor in tensors.items():
        everything = whole(tensor)
        if current().rank == 0:
            kept[name] = on_host(everything, copy=True)
    return lambda: save_file(kept, folder / "all.safetensors") if kept else None


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)  # of the workers: large blocks go back as soon as they are free
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    rows = []
    for size in (1, 2, 4):
        for way in ("gathered", "parts"):
            with tempfile.TemporaryDirectory() as target:
                found = run_workers("saving:measured", {"way": way, "target": target}, num_processes=size)
            seconds = [f"{found[name]:.2f} s" for name in ("copied", "written")]
            per = f"{found['peak'] * MIB / found['parameters']:.1f}"
            rows.append([str(size), "by parts" if way == "parts" else way, f"{found['peak']:,.0f} MiB", per, *seconds])
            print(*rows[-1], flush=True)
    header = ["processes", "way", "memory", "bytes a parameter", "copied", "written"]
    RESULTS.write_text(
        f"# Saving\n\n{__doc__.split(chr(10) * 2, 2)[2]}\n{table(header, rows)}\n\n"
        f"{found['parameters']:,} parameters. {machine('safetensors', note='one thread a process')}.\n"
    )


if __name__ == "__main__":
    main()
