"""What can be known of a model folder without loading a weight: its files, their headers and its configuration."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camopd.adapters import Weights, tokenizer_folder
from camopd.errors import Problem
from camopd.store import FileInfo, Store
from camopd.store.uris import join

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "download the model again, or copy it from where it was made"

_HEAD = "lm_head.weight"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_DTYPE_BITS = {"F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
_DTYPE_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64}
PICKLE = "pickle files can run code when they are loaded"
_OTHER_FORMATS = {
    ".bin": PICKLE,
    ".pt": PICKLE,
    ".pth": PICKLE,
    ".gguf": "GGUF files are quantised for inference and cannot be trained",
}

Shapes = dict[str, tuple[int, ...]]


def nonfinite_parameters(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the parameters that hold NaN or infinity: a safetensors header does not show them."""
    return [name for name, tensor in named_tensors if not tensor.isfinite().all()]


# --- Weights --------------------------------------------------------------------------------------------------------------


def check_weights(store: Store, uri: str, *, tied: bool) -> tuple[Shapes, list[Problem]]:
    """Read the 8-byte length and the header of each safetensors file and compare them with the file's size.

    Args:
        store: where the model lies.
        uri: the model's folder.
        tied: ``config.tie_word_embeddings``: then the head may be absent, because it is the embedding.

    Returns:
        The shape of each tensor, and what is wrong. Both cover what could be read.
    """
    files = {file.name: file for file in store.list(uri)}
    if SINGLE in files:
        shapes, problems = check_file(store, uri, files[SINGLE])
        named: Iterable[str] = shapes
    elif INDEX in files:
        shapes, named, problems = _check_sharded(store, uri, files, tied=tied)
    else:
        return {}, [_no_safetensors(uri, files)]
    if "model.embed_tokens.weight" in named and _HEAD not in named and not tied:
        problems.append(Problem(uri, f"has no tensor {_HEAD} and config.json does not tie it to the embedding", AGAIN))
    return shapes, problems


def _no_safetensors(uri: str, files: Mapping[str, FileInfo]) -> Problem:
    for name in files:
        reason = _OTHER_FORMATS.get(Path(name).suffix)
        if reason:
            fix = "load it where you trust it and save it with model.save_pretrained(folder)"
            return Problem(uri, f"has {name} but no {SINGLE}; {reason}", fix)
    if "adapter_config.json" in files:
        return Problem(
            uri, "is an adapter without its base model", "merge it: PeftModel.merge_and_unload(), then save_pretrained(folder)"
        )
    return Problem(uri, f"has neither {SINGLE} nor {INDEX}", "give the folder of a model saved by save_pretrained")


def _check_sharded(
    store: Store, uri: str, files: Mapping[str, FileInfo], *, tied: bool
) -> tuple[Shapes, Iterable[str], list[Problem]]:
    """Shapes that could be read, names that the index promises, and what is wrong."""
    where = join(uri, INDEX)
    try:
        weight_map = json.loads(store.read(where))["weight_map"]
        wanted = {str(key): str(shard) for key, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, (), [Problem(where, "is not an index of shards: it has no weight_map", AGAIN)]
    shapes: Shapes = {}
    problems: list[Problem] = []
    held: dict[str, Shapes] = {}
    for shard in sorted(set(wanted.values())):
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):  # "../x" would read outside the model's folder
            problems.append(Problem(where, f"points to {shard!r}, which is not a safetensors file of this folder", AGAIN))
        elif shard not in files:
            problems.append(Problem(join(uri, shard), f"is missing, although {INDEX} names it", AGAIN))
        else:
            held[shard], found = check_file(store, uri, files[shard])
            shapes |= held[shard]
            problems += found
    for key, shard in wanted.items():
        if held.get(shard) and key not in held[shard] and not (tied and key == _HEAD):
            problems.append(Problem(join(uri, shard), f"has no tensor {key}, although {INDEX} says so", AGAIN))
    return shapes, wanted, problems


def check_file(store: Store, uri: str, file: FileInfo) -> tuple[Shapes, list[Problem]]:
    """The shapes that a safetensors file's header tells, and what is wrong with it."""
    where = join(uri, file.name)
    try:
        header, length = read_header(store, where, file.size)
        shapes, end = _layout(header)
        expected = 8 + length + end
        if expected != file.size:
            raise ValueError(f"has {file.size} bytes, its header asks for {expected}")
    except ValueError as error:
        return {}, [Problem(where, str(error), AGAIN)]
    return shapes, []


def read_header(store: Store, uri: str, size: int) -> tuple[dict[str, Any], int]:
    """The header and its length in bytes. Raises ValueError with the reason."""
    start = store.read(uri, 0, min(size, 256))
    if start.startswith(b"version https://git-lfs"):
        real = re.search(rb"size (\d+)", start)
        expected = f" of a file of {int(real.group(1))} bytes" if real else ""
        raise ValueError(f"is a git-lfs pointer{expected}, {size} bytes of text; run `git lfs pull`")
    if size < 8:
        raise ValueError(f"has {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"has {size} bytes, its first eight announce a header of {length}: it is cut short or not safetensors")
    try:
        header = json.loads(store.read(uri, 8, length))
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is not JSON: it is damaged or not safetensors") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    return header, length


def _layout(header: Mapping[str, Any]) -> tuple[Shapes, int]:
    """Shape of each tensor and the number of data bytes: tensors must follow each other without gap or overlap."""
    shapes: Shapes = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            (begin, end), shape, bits = entry["data_offsets"], tuple(entry["shape"]), _DTYPE_BITS[entry["dtype"]]
            sound = (
                all(type(n) is int and n >= 0 for n in (begin, end, *shape)) and (end - begin) * 8 == math.prod(shape) * bits
            )
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise ValueError(f"the header's entry of tensor {name!r} is damaged: offsets, shape and dtype do not agree")
        shapes[name] = shape
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise ValueError(
                f"tensor {name!r} begins at byte {begin} of the data, not at {position}: tensors overlap or leave a gap"
            )
        position = end
    return shapes, position


# --- Configuration --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What a model folder says about itself.

    Attributes:
        where: the parameter that names the model.
        uri: its folder.
        folder: local copy of its small files.
        model_type: architecture.
        vocab_size: rows of the embedding and of the head.
        max_length: positions it was made for, prompt and response together; None where it does not say.
        eos_ids: end tokens of config.json and generation_config.json.
        tied: whether the head is the embedding.
    """

    where: str
    uri: str
    folder: Path
    model_type: str
    vocab_size: int
    max_length: int | None
    eos_ids: frozenset[int]
    tied: bool


def copy_description(store: Store, weights: Weights, folder: Path) -> None:
    """The small files of a model: its base's, and over them an adapter's, where that has a tokenizer of its own."""
    for uri in dict.fromkeys((weights.base, tokenizer_folder(weights, store))):
        copy_small_files(store, uri, folder)


def copy_small_files(store: Store, uri: str, folder: Path) -> None:
    """Bring configuration, tokenizer and templates to a local folder; weights stay where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in store.list(uri):
        if Path(file.name).suffix in (".json", ".jinja", ".txt", ".model") and "/" not in file.name:
            (folder / file.name).write_bytes(store.read(join(uri, file.name)))


def read_facts(where: str, uri: str, folder: Path) -> tuple[ModelFacts | None, list[Problem]]:
    """Read config.json and generation_config.json with transformers, whose defaults fill what they leave out."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        fix = (
            "merge the adapter into its base model first" if adapter else "give the folder of a model saved by save_pretrained"
        )
        return None, [Problem(where, f"{uri} has no config.json", fix)]
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        generation = folder / "generation_config.json"
        stop = json.loads(generation.read_bytes()).get("eos_token_id") if generation.is_file() else None
        eos_ids = _id_set(config.eos_token_id) | _id_set(stop)
        vocab_size, max_length = config.vocab_size, getattr(config, "max_position_embeddings", None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        return None, [
            Problem(
                where, f"{uri}/config.json cannot be used: {reason}", "give a causal language model that transformers knows"
            )
        ]
    facts = ModelFacts(where, uri, folder, config.model_type, vocab_size, max_length, eos_ids, bool(config.tie_word_embeddings))
    problems = []
    if "quantization_config" in raw:
        problems.append(
            Problem(where, f"{uri} is quantised and cannot be trained or compared", "give the bfloat16 or float32 weights")
        )
    names = raw.get("architectures") or []
    if names and not any(str(name).endswith(("CausalLM", "LMHeadModel")) for name in names):
        problems.append(
            Problem(where, f"{uri} is a {names[0]}, not a causal language model", "give a model with a language-model head")
        )
    return facts, problems


def _id_set(value: Any) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else [int(v) for v in value])


def check_shapes(facts: ModelFacts, shapes: Shapes) -> list[Problem]:
    """Embedding and head must have the rows that config.json announces."""
    return [
        Problem(facts.where, f"{facts.uri}: {name} has {shape[0]} rows, config.json says vocab_size {facts.vocab_size}", AGAIN)
        for name, shape in shapes.items()
        if (name == _HEAD or name.endswith("embed_tokens.weight")) and shape and shape[0] != facts.vocab_size
    ]


def check_same_architecture(student: ModelFacts, teacher: ModelFacts) -> list[Problem]:
    """A teacher may be larger, but must be of the student's kind."""
    if student.model_type == teacher.model_type:
        return []
    what = f"{teacher.uri} is a {teacher.model_type} model, the student is a {student.model_type} model"
    return [Problem(teacher.where, what, "give a teacher of the student's architecture and tokenizer")]
