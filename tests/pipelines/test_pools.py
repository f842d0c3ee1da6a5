"""The pools file: what is wrong with it is said in one go and by name."""

import re
from pathlib import Path

import pytest

from camopd.errors import InputError
from camopd.trainjob import JobSpec
from components import TRAINER
from pipelines.pools import Pools, load_pools

NODES = '[training]\nnodes = 2\nruntime = "torch-distributed"\n'


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "pools.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_pools(path)
    return str(caught.value)


def test_without_a_file_everything_runs_on_cpu():
    assert load_pools(None) == Pools()
    assert Pools().training.accelerator is None


def test_the_example_holds_all_three_pools():
    pools = load_pools(Path("pipelines/pools.example.toml"))
    assert (pools.cpu.accelerator, pools.inference.count, pools.training.count) == (None, 1, 8)


def test_every_problem_is_named_at_once(tmp_path):
    message = refused(tmp_path, '[training]\nmemory = "lots"\ngpus = 8\n[inferense]\ncount = 1\n')
    assert message.startswith("3 problems")
    for part in ("training.memory", "Kubernetes quantity", "training.gpus", "inferense", "cpu, inference and training"):
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
        ("[training]\nnodes = 0\n", "training.nodes"),
        (
            "[training]\nnodes = 2\n",
            'training: nodes above 1 need a runtime of Kubeflow Trainer, such as runtime = "torch-distributed"',
        ),
        ('[training]\nqueue = "gpus"\nenv = {A = "1"}\n', "env, queue belong to a job on several nodes: set nodes above 1"),
        ("[inference]\nnodes = 2\n", "inference.nodes"),
        (f'{NODES}runtime_kind = "Runtime"\n', "training.runtime_kind"),
        (f'{NODES}service_account = "Default Editor"\n', "training.service_account: String should match"),
        (f'{NODES}resources = {{ "rdma/ib" = "some" }}\n', "training.resources.rdma/ib"),
        (f'{NODES}env = {{ PET_NNODES = "2" }}\n', "training.env: PET_NNODES are set by the runtime"),
        (f'{NODES}env = {{ A = "2" }}\nsecrets = {{ A = "a/b" }}\n', "training: A are in env and in secrets: leave one out"),
        (f'{NODES}env = {{ "A-B" = "2" }}\n', "write the name of a variable"),
        (f'{NODES}env = {{ AWS_SECRET_ACCESS_KEY = "AKIA" }}\n', "training.env: AWS_SECRET_ACCESS_KEY look like secrets"),
        (f'{NODES}secrets = {{ HF_TOKEN = "hf_abc" }}\n', 'write VARIABLE = "secret-name/key"'),
    ],
)
def test_a_pool_that_cannot_work_is_refused(tmp_path, text, part):
    assert part in refused(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        load_pools(tmp_path / "none.toml")


def test_what_a_job_on_several_nodes_asks_for_is_what_the_pool_says(tmp_path):
    path = tmp_path / "pools.toml"
    example = Path("pipelines/pools.example.toml").read_text(encoding="utf-8")
    settings = """
service_account = "camopd-nodes"
queue = "gpus"
resources = { "rdma/ib" = "8" }
env = { TOKENIZERS_PARALLELISM = "false" }
secrets = { AWS_SECRET_ACCESS_KEY = "camopd-s3/secret-key" }
"""
    path.write_text(example.replace("[training] ", NODES + settings + "#"), encoding="utf-8")
    assert JobSpec.model_validate_json(load_pools(path).training.job()) == JobSpec(
        nodes=2,
        runtime="torch-distributed",
        image=TRAINER,
        accelerator="nvidia.com/gpu",
        count=8,
        cpu="64",
        memory="512Gi",
        shm="64Gi",
        selectors={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        tolerations=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
        service_account="camopd-nodes",
        queue="gpus",
        resources={"rdma/ib": "8"},
        env={"TOKENIZERS_PARALLELISM": "false"},
        secrets={"AWS_SECRET_ACCESS_KEY": "camopd-s3/secret-key"},
        timeout_minutes=1440,
    )


def test_what_the_docs_and_the_example_say_of_several_nodes_is_taken(tmp_path):
    (block,) = re.findall(r"(?s)```toml\n(\[training\].*?)```", Path("docs/scale.md").read_text(encoding="utf-8"))
    example = Path("pipelines/pools.example.toml").read_text(encoding="utf-8")
    for text in (block, re.sub(r"(?m)^# (?=\w+ = )", "", example)):
        (tmp_path / "pools.toml").write_text(text, encoding="utf-8")
        training = load_pools(tmp_path / "pools.toml").training
        assert (training.nodes, training.runtime) == (2, "torch-distributed")
        assert training.secrets["AWS_ACCESS_KEY_ID"] == "camopd-s3/access-key"
