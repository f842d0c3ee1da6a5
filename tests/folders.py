"""Model folders of a few kilobytes whose files agree with each other, from the tokenizers of case 03; no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CASES = Path(__file__).parent / "cases"
TOKENIZERS = CASES / "03-vocab-padding-vs-other-tokenizer"
MESSAGES_TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def model_folder(folder: Path, source: str = "student", *, template: str | None = None, **config: Any) -> Path:
    """A copy of a folder of case 03 with weights; ``config`` changes config.json, None removes a key."""
    shutil.copytree(TOKENIZERS / source, folder)
    settings = json.loads((folder / "config.json").read_bytes()) | config
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    rows = settings["vocab_size"]
    save_file(
        {"model.embed_tokens.weight": np.zeros((rows, 4), np.float32), "model.norm.weight": np.ones(4, np.float32)},
        folder / "model.safetensors",
    )
    return folder


def prompt_file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
