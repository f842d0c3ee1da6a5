"""The pools file: what is wrong with it is said in one go and by name."""

from pathlib import Path

import pytest

from camopd.errors import InputError
from pipelines.pools import Pools, load_pools


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "pools.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_pools(path)
    return str(caught.value)


def test_without_a_file_everything_runs_on_cpu():
    assert load_pools(None) == Pools()
    assert Pools().training.accelerator is None


def test_the_example_holds_all_pools():
    pools = load_pools(Path("pipelines/pools.example.toml"))
    assert (pools.cpu.accelerator, pools.inference.count, pools.training.count) == (None, 1, 8)
    assert pools.colocated is not None
    assert (pools.colocated.count, pools.colocated.selectors) == (1, pools.training.selectors)


def test_every_problem_is_named_at_once(tmp_path):
    message = refused(tmp_path, '[training]\nmemory = "lots"\ngpus = 8\n[inferense]\ncount = 1\n')
    assert message.startswith("3 problems")
    for part in ("training.memory", "Kubernetes quantity", "training.gpus", "inferense", "inference, training and colocated"):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('[training]\naccelerator = "nvidia.com/gpu"\n', "accelerator and count belong together"),
        ("[training]\ncount = 2\n", "accelerator and count belong together"),
        ('[cpu]\naccelerator = "nvidia.com/gpu"\ncount = 1\n', "cpu pool must not ask for an accelerator"),
        ("[training]\ncount = -1\n", "training.count"),
        ('[training]\ntolerations = [{ key = "gpu", effect = "Sometimes" }]\n', "training.tolerations.0.effect"),
        ("[training\n", "is not TOML"),
    ],
)
def test_a_pool_that_cannot_work_is_refused(tmp_path, text, part):
    assert part in refused(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        load_pools(tmp_path / "none.toml")
