"""Model folders that are whole, and those that are not (case 06)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load_file, save_file

from camopd.inputs.checks import (
    check_same_architecture,
    check_shapes,
    check_weights,
    copy_small_files,
    nonfinite_parameters,
    read_facts,
)
from camopd.store import Store
from tests.folders import CASES, model_folder

SHARDS = CASES / "06-checkpoint-shards"
SECOND = "model-00002-of-00002.safetensors"


def problems_of(folder: Path | str, *, tied: bool = False) -> list[str]:
    return [str(problem) for problem in check_weights(Store(), str(folder), tied=tied)[1]]


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- The case -------------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint() -> None:
    shapes, problems = check_weights(Store(), str(SHARDS / "good"), tied=False)
    assert not problems
    assert shapes.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("case", "file", "words"),
    [
        ("truncated", SECOND, "has 224 bytes, its header asks for 248"),
        ("zero-bytes", SECOND, "has 0 bytes"),
        ("lfs-pointer", SECOND, "git-lfs pointer of a file of 208 bytes, 128 bytes of text"),
        ("missing-shard", SECOND, "is missing"),
        ("key-not-in-shard", SECOND, "no tensor lm_head.weight"),
    ],
)
def test_a_damaged_checkpoint_is_named_by_file_and_bytes(case: str, file: str, words: str) -> None:
    (problem,) = problems_of(SHARDS / case)
    assert problem.startswith(str(SHARDS / case / file))
    assert words in problem


def test_a_missing_key_is_allowed_when_it_is_the_tied_head_alone(tmp_path: Path) -> None:
    assert not problems_of(SHARDS / "key-not-in-shard", tied=True)
    folder = tmp_path / "model"
    shutil.copytree(SHARDS / "key-not-in-shard", folder)
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    index["weight_map"]["model.layers.0.weight"] = SECOND
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (problem,) = problems_of(folder, tied=True)
    assert "model.layers.0.weight" in problem


def test_a_header_does_not_show_nan_but_the_parameters_do() -> None:
    assert not problems_of(SHARDS / "nan-weights")
    found = []
    for path in sorted((SHARDS / "nan-weights").glob("*.safetensors")):
        found += nonfinite_parameters((name, torch.from_numpy(array)) for name, array in load_file(path).items())
    assert found == ["model.embed_tokens.weight"]
    assert nonfinite_parameters([("a", torch.zeros(2)), ("b", torch.tensor([1.0, -torch.inf]))]) == ["b"]


# --- Others of the kind ---------------------------------------------------------------------------------------------------

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00" * 4, "has 4 bytes"),
        (b"\xff" * 100, "announce a header"),
        (safetensors_bytes({"a": TWO})[:20], "has 20 bytes, its first eight announce a header of 61"),
        (safetensors_bytes(b"{not json"), "not JSON"),
        (safetensors_bytes([1]), "not a table"),
        (safetensors_bytes({"a": TWO}, b"\0" * 12), "has 81 bytes, its header asks for 77"),
        (safetensors_bytes({"a": TWO, "b": {**TWO, "data_offsets": [4, 12]}}, b"\0" * 12), "overlap"),
        (safetensors_bytes({"a": TWO, "b": {**TWO, "data_offsets": [12, 20]}}, b"\0" * 20), "gap"),
        (safetensors_bytes({"a": {**TWO, "data_offsets": [8, 0]}}, b"\0" * 8), "do not agree"),
        (safetensors_bytes({"a": {**TWO, "data_offsets": [-8, 0]}}, b"\0" * 8), "do not agree"),
        (safetensors_bytes({"a": {**TWO, "shape": [3]}}, b"\0" * 8), "do not agree"),
        (safetensors_bytes({"a": {**TWO, "dtype": "F31"}}, b"\0" * 8), "do not agree"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "do not agree"),
        (safetensors_bytes({"a": 3}), "do not agree"),
    ],
)
def test_a_damaged_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(str(tmp_path / "model.safetensors"))
    assert words in problem


def test_tensors_may_stand_in_any_order_in_the_header(tmp_path: Path) -> None:
    header = {"b": {**TWO, "data_offsets": [8, 16]}, "__metadata__": {"format": "pt"}, "a": TWO}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(header, b"\0" * 16))
    assert not problems_of(tmp_path)


tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]),
        "shape": st.lists(st.integers(0, 3), max_size=2),
        "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2),
    }
)
whole = st.lists(st.integers(0, 3), max_size=4).map(
    lambda sizes: {
        f"t{i}": {"dtype": "F32", "shape": [n], "data_offsets": [4 * sum(sizes[:i]), 4 * sum(sizes[: i + 1])]}
        for i, n in enumerate(sizes)
    }
)
headers = st.one_of(whole, st.dictionaries(st.text(max_size=3), tensors, max_size=3))
files = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=120).map(safetensors_bytes),
    st.builds(safetensors_bytes, headers, st.integers(0, 48).map(bytes)),
    whole.map(lambda header: safetensors_bytes(header, bytes(max((e["data_offsets"][1] for e in header.values()), default=0)))),
)


@given(content=files)
@settings(deadline=None, max_examples=200)
def test_what_passes_is_what_the_library_can_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "model.safetensors").write_bytes(content)
    shapes, problems = check_weights(Store(), str(folder), tied=True)
    try:
        expected = {name: tuple(tensor["shape"]) for name, tensor in deserialize(content)}
    except SafetensorError:
        assert problems
    else:
        assert not problems
        assert shapes == expected


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "pickle.bin", ".x.safetensors"]
)
def test_an_index_must_not_point_outside_the_folder(tmp_path: Path, shard: str) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    (problem,) = problems_of(folder)
    assert "not a safetensors file of this folder" in problem


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (problem,) = problems_of(tmp_path)
    assert "no weight_map" in problem


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], "pickle"),
        (["pytorch_model-00001-of-00002.bin", "config.json"], "pickle"),
        (["consolidated.pth"], "pickle"),
        (["model-q4.gguf"], "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge"),
        (["config.json"], "neither"),
    ],
)
def test_other_formats_are_refused_with_the_reason(tmp_path: Path, names: list[str], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (problem,) = problems_of(tmp_path)
    assert words in problem


def test_a_single_file_needs_its_head_unless_tied(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert not problems_of(folder, tied=True)
    assert "no tensor lm_head.weight" in problems_of(folder, tied=False)[0]


@pytest.mark.slow
def test_shards_in_s3_are_checked_by_their_headers(s3_prefix: str) -> None:
    store = Store()
    for case in ("good", "truncated"):
        for path in (SHARDS / case).iterdir():
            store.write(f"{s3_prefix}/{case}/{path.name}", path.read_bytes())
    assert not problems_of(f"{s3_prefix}/good")
    (problem,) = problems_of(f"{s3_prefix}/truncated")
    assert f"{s3_prefix}/truncated/{SECOND}: has 224 bytes, its header asks for 248" in problem


# --- Configuration --------------------------------------------------------------------------------------------------------


def facts_of(folder: Path):
    return read_facts("student", "/models/a", folder)


def test_facts_join_the_end_tokens_of_both_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    facts, problems = facts_of(folder)
    assert not problems
    assert (facts.model_type, facts.vocab_size, facts.max_length, facts.eos_ids, facts.tied) == ("qwen3", 16, 256, {2, 3}, True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "qwen9"}, "qwen9"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"max_position_embeddings": [1]}, "max_position_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "not a causal language model"),
    ],
)
def test_a_configuration_that_cannot_be_used(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    folder = model_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_bytes()) | changed
    (folder / "config.json").write_text(json.dumps(config))
    _, problems = facts_of(folder)
    assert len(problems) == 1
    assert words in str(problems[0])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"'])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(text)
    facts, problems = facts_of(folder)
    assert facts is None
    assert "config.json cannot be used" in str(problems[0])


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    facts, problems = facts_of(tmp_path)
    assert facts is None
    assert "has no config.json" in str(problems[0])
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge the adapter" in str(facts_of(tmp_path)[1][0])


def test_rows_of_the_embedding_must_be_what_the_configuration_says(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    facts, _ = facts_of(folder)
    shapes, _ = check_weights(Store(), str(folder), tied=True)
    assert not check_shapes(facts, shapes)
    (problem,) = check_shapes(facts, shapes | {"lm_head.weight": (20, 4)})
    assert "lm_head.weight has 20 rows, config.json says vocab_size 16" in str(problem)


def test_a_teacher_of_another_architecture(tmp_path: Path) -> None:
    student, _ = facts_of(model_folder(tmp_path / "a"))
    larger, _ = facts_of(model_folder(tmp_path / "b", hidden_size=64, num_hidden_layers=4))
    other, _ = facts_of(model_folder(tmp_path / "c", model_type="qwen2", architectures=["Qwen2ForCausalLM"]))
    assert not check_same_architecture(student, larger)
    (problem,) = check_same_architecture(student, other)
    assert "qwen2" in problem.what
    assert "qwen3" in problem.what


def test_weights_are_not_copied(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", template="{{ messages }}")
    copy_small_files(Store(), str(folder), tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
