"""Weights on their way to an engine: the file, the digests, and which of its tensors an engine computes with."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from camopd.engines.handover import check_taken, digest, running_copy, weights_file
from camopd.errors import EngineError
from tests.tiny import tiny_model

LAYER = "model.layers.1.self_attn"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_the_weights_of_this_moment_rounded_once_and_goes_away(dtype) -> None:
    model = tiny_model()
    with weights_file(model, dtype) as (path, before):
        held = load_file(path)
        assert set(held) == set(before) == set(dict(model.named_parameters()))  # a tied output layer once
        for name, weight in model.named_parameters():
            assert torch.equal(held[name], weight.to(dtype))
        assert {name: digest(tensor) for name, tensor in held.items()} == before
    assert not path.parent.exists()
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    with weights_file(model, dtype) as (_, after):
        assert {name for name in before if before[name] != after[name]} == {"model.norm.weight"}


def test_without_shared_memory_the_file_lies_in_the_temporary_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("camopd.engines.handover.SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with weights_file(tiny_model(), torch.float32) as (path, _):
        assert path.parent.parent == tmp_path
    monkeypatch.setattr("camopd.engines.handover.SHARED_MEMORY", tmp_path)
    monkeypatch.setattr("camopd.engines.handover.SPARE", 2**60)
    (tmp_path / "other").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "other"))
    with weights_file(tiny_model(), torch.float32) as (path, _):
        assert path.parent.parent == tmp_path / "other", "shared memory that is full is left alone"


def test_digests_are_of_values_and_type_and_not_of_layout() -> None:
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert digest(tensor) == digest(tensor.t().contiguous().t())
    assert digest(tensor) != digest(tensor.to(torch.bfloat16))
    assert digest(tensor) != digest(tensor.t())


def test_the_running_copy_is_the_parameter_or_its_part_of_a_fused_one() -> None:
    whole = torch.arange(8)[:, None]
    running = {f"{LAYER}.qkv_proj.weight": whole, f"{LAYER}.o_proj.weight": torch.ones(4, 4)}
    heights = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
    shapes = {f"{LAYER}.{name}.weight": [height, 1] for name, height in heights.items()} | {f"{LAYER}.o_proj.weight": [4, 4]}

    def of(name: str, **other: list[int]) -> torch.Tensor | None:
        return running_copy(f"{LAYER}.{name}.weight", {**shapes, **other}, running, FUSED)

    assert [of(name).flatten().tolist() for name in ("q_proj", "k_proj", "v_proj")] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert of("o_proj") is running[f"{LAYER}.o_proj.weight"]
    assert of("k_proj", **{f"{LAYER}.q_proj.weight": [8, 1]}) is None, "half of the query's rows are another process's"
    assert of("o_proj", **{f"{LAYER}.o_proj.weight": [4, 8]}) is None, "half of its columns, too"
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        assert running_copy(name, shapes | {name: [4, 4]}, running, FUSED) is None


def test_other_weights_are_named() -> None:
    expected = {"a": "1", "b": "2", "c": "3"}
    check_taken(expected, dict(expected), 0)
    with pytest.raises(EngineError, match=r"process 1 .* 1 of 3 tensors differ, among them b;"):
        check_taken(expected, expected | {"b": "old"}, 1)
    with pytest.raises(EngineError, match=r"2 of 3 tensors differ, among them c, d;"):
        check_taken(expected, {"a": "1", "b": "2", "d": "3"}, 0)
