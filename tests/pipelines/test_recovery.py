"""The compiled pipeline: what a cluster would be given. Each test is a trap that somebody fell into (docs/decisions.md)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from camopd.trainjob import JobSpec, render
from pipelines.compile import COMMITTED, compile_pipeline
from tests.fixtures.kubernetes_api import SCHEMAS
from tests.fixtures.structural import problems

EXAMPLE_POOLS = COMMITTED.with_name("pools.example.toml")
NEEDS_GPU = {"rollout", "score", "evaluate", "train", "recover"}
ON_TWO_NODES = '[training]\nnodes = 2\nruntime = "torch-distributed"\n'
Spec = dict[str, Any]


def documents(path: Path) -> tuple[Spec, Spec]:
    """The pipeline and, where pods ask for more than a container, the platform's part."""
    spec, *platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return spec, platform[0] if platform else {}


@pytest.fixture(scope="module")
def cpu() -> Spec:
    return documents(COMMITTED)[0]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, Spec]:
    path = tmp_path_factory.mktemp("compiled") / "recovery.yaml"
    compile_pipeline(path, EXAMPLE_POOLS)
    return documents(path)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[Spec, Spec]:
    """The example's pools with training on two nodes."""
    folder = tmp_path_factory.mktemp("spread")
    pools = EXAMPLE_POOLS.read_text(encoding="utf-8").replace("[training] ", f"{ON_TWO_NODES}#")
    (folder / "pools.toml").write_text(pools, encoding="utf-8")
    compile_pipeline(folder / "recovery.yaml", folder / "pools.toml")
    return documents(folder / "recovery.yaml")


def dags(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """Every graph of the pipeline with its name: the root, loops, conditions, the exit handler, nested pipelines."""
    yield "root", spec["root"]
    yield from ((name, component) for name, component in spec["components"].items() if "dag" in component)


def tasks(spec: Spec) -> Iterator[tuple[str, str, Spec]]:
    """Every task with the name of its graph and its own."""
    for graph, component in dags(spec):
        yield from ((graph, name, task) for name, task in component["dag"]["tasks"].items())


def stage(name: str) -> str:
    """``train`` of ``train-2``: a component that stands in the graph a second time."""
    return re.sub(r"-\d+$", "", name)


def executors(spec: Spec) -> dict[str, Spec]:
    """The container of each component, by the component's name."""
    return {name.removeprefix("exec-"): e["container"] for name, e in spec["deploymentSpec"]["executors"].items()}


def reachable(spec: Spec, component: str) -> set[str]:
    """Names of the components that a graph's tasks run, those of inner graphs included."""
    found = set()
    for task in spec["components"][component].get("dag", {"tasks": {}})["tasks"].values():
        name = task["componentRef"]["name"]
        found |= {name.removeprefix("comp-")} if "dag" not in spec["components"][name] else reachable(spec, name)
    return found


# --- The committed file ---------------------------------------------------------------------------------------------------


def test_the_committed_file_is_what_the_source_compiles_to(tmp_path):
    compile_pipeline(tmp_path / "recovery.yaml")
    fresh = (tmp_path / "recovery.yaml").read_bytes() == COMMITTED.read_bytes()
    assert fresh, "pipelines/recovery.yaml is stale: run `make compile` and commit the result"


def test_compiling_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.yaml", "b.yaml"):
        compile_pipeline(tmp_path / name, EXAMPLE_POOLS)
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()


def test_the_file_is_small_whatever_the_number_of_rounds(tmp_path, cpu):
    compile_pipeline(tmp_path / "recovery.yaml", EXAMPLE_POOLS)
    assert COMMITTED.stat().st_size < 100_000
    assert (tmp_path / "recovery.yaml").stat().st_size < 100_000
    loop = cpu["components"]["comp-condition-2"]["dag"]["tasks"]["for-loop-3"]
    assert loop["parameterIterator"]["items"] == {"inputParameter": "pipelinechannel--prepare-Output"}


# --- Parameters -----------------------------------------------------------------------------------------------------------


def test_a_default_run_needs_no_typing(cpu):
    parameters = cpu["root"]["inputDefinitions"]["parameters"]
    assert len(parameters) == 17
    for name, parameter in parameters.items():
        assert parameter["defaultValue"] not in (None, ""), name
        assert parameter["parameterType"] in ("STRING", "BOOLEAN", "NUMBER_INTEGER", "NUMBER_DOUBLE"), name


def test_names_sort_and_explain_themselves(cpu):
    parameters = cpu["root"]["inputDefinitions"]["parameters"]
    assert list(parameters) == sorted(parameters)
    assert {name.partition("_")[0] for name in parameters} == {"input", "method", "output", "schedule"}
    assert all(parameter["description"] for parameter in parameters.values())


def test_people_see_names_for_people(cpu):
    assert cpu["root"]["dag"]["tasks"]["report-outcome"]["taskInfo"]["name"] == "Outcome: what happened"
    for graph, name, task in tasks(cpu):
        assert task["taskInfo"]["name"] != name, (graph, name)


# --- The graph ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["cpu", "pooled", "spread"])
def test_every_input_of_every_task_is_defined_where_it_is_read(fixture, request):
    """The SDK does not thread a parameter that only resources use into a sub-graph: the run would fail at that task."""
    spec = request.getfixturevalue(fixture)
    spec = spec if isinstance(spec, dict) else spec[0]
    for graph, component in dags(spec):
        defined = set(component.get("inputDefinitions", {}).get("parameters", {}))
        inside = component["dag"]["tasks"]
        for name, task in inside.items():
            for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
                if "componentInputParameter" in source:
                    assert source["componentInputParameter"] in defined, (graph, name, parameter)
                elif "taskOutputParameter" in source:
                    assert source["taskOutputParameter"]["producerTask"] in task["dependentTasks"], (graph, name, parameter)
                    assert source["taskOutputParameter"]["producerTask"] in inside, (graph, name, parameter)
            inputs = spec["components"][task["componentRef"]["name"]].get("inputDefinitions", {}).get("parameters", {})
            wanted = {parameter for parameter, definition in inputs.items() if not definition.get("isOptional")}
            given = set(task.get("inputs", {}).get("parameters", {})) | {task.get("parameterIterator", {}).get("itemInput")}
            assert wanted <= given, (graph, name, wanted - given)


@pytest.mark.parametrize("fixture", ["pooled", "spread"])
def test_containers_name_no_input_that_their_component_lacks(fixture, request):
    spec = request.getfixturevalue(fixture)[0]
    for name, container in executors(spec).items():
        inputs = set(spec["components"][f"comp-{name}"].get("inputDefinitions", {}).get("parameters", {}))
        used = set(re.findall(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}", yaml.safe_dump(container)))
        assert used <= inputs, name


def test_the_graph_is_the_one_of_the_architecture(cpu):
    parts = cpu["components"]
    assert set(parts["comp-exit-handler-1"]["dag"]["tasks"]) == {"resolve", "condition-2"}, "a tick that is skipped ends there"
    whole = parts["comp-condition-2"]["dag"]["tasks"]
    assert set(whole) == {"prepare", "for-loop-3", "evaluate", "condition-10"}
    assert list(parts["comp-condition-9"]["dag"]["tasks"]) == ["recover"]
    assert whole["evaluate"]["dependentTasks"] == ["for-loop-3", "prepare"], "no skipped task stops it"
    assert whole["for-loop-3"]["iteratorPolicy"] == {"parallelismLimit": 1}
    turn = parts["comp-for-loop-3"]["dag"]["tasks"]
    assert {name: task["taskInfo"]["name"] for name, task in turn.items() if name != "begin"} == {
        "condition-4": "go",
        "condition-6": "shards",
        "condition-9": "colocated",
    }
    one_round = parts["comp-condition-4"]["dag"]["tasks"]
    assert {name: task.get("dependentTasks", []) for name, task in one_round.items()} == {
        "rollout": [],
        "for-loop-5": ["rollout"],
        "select": ["for-loop-5"],
        "train": ["select"],
    }
    in_shards = parts["comp-condition-6"]["dag"]["tasks"]
    assert {name: task.get("dependentTasks", []) for name, task in in_shards.items()} == {
        "spread": [],
        "for-loop-7": ["spread"],
        "gather": ["for-loop-7"],
        "for-loop-8": ["gather"],
        "select-2": ["for-loop-8"],
        "train-2": ["select-2"],
    }
    for loop in (one_round["for-loop-5"], in_shards["for-loop-7"], in_shards["for-loop-8"]):
        assert "iteratorPolicy" not in loop, "branches and shards work side by side"
    assert cpu["root"]["dag"]["tasks"]["report-outcome"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}


def test_loops_and_conditions_read_a_single_return_value(cpu):
    """A named output makes the local runner skip the branch in silence, or raise."""
    for graph, name, task in tasks(cpu):
        if "parameterIterator" in task:
            assert task["parameterIterator"]["items"]["inputParameter"].endswith("-Output"), (graph, name)
        if "condition" in task.get("triggerPolicy", {}):
            condition = task["triggerPolicy"]["condition"]
            assert re.search(r"pipelinechannel--[a-z-]+-Output'\] == '[a-z]+'", condition), (graph, name)


def test_inside_a_loop_only_the_item_is_read(cpu):
    """The local runner puts the loop's item in the place of an outer task's output."""
    loops = {name for name in cpu["components"] if name.startswith("comp-for-loop-")}
    loops |= {"comp-condition-4", "comp-condition-6", "comp-condition-9"}
    assert len(loops) == 7
    for graph, name, task in tasks(cpu):
        if graph in loops and "dag" not in cpu["components"][task["componentRef"]["name"]]:
            for source in task["inputs"]["parameters"].values():
                outer = source.get("componentInputParameter", "-loop-item")
                assert outer.endswith("-loop-item"), (graph, name)


def test_nothing_is_cached(cpu, pooled, spread):
    """KFP's key is a URI, not what lies behind it; our manifests are the cache."""
    for spec in (cpu, pooled[0], spread[0]):
        for graph, name, task in tasks(spec):
            if "cachingOptions" in task or name.rpartition("-")[0] not in ("for-loop", "condition", "exit-handler"):
                assert task["cachingOptions"] == {}, (graph, name)


def test_no_constant_holds_a_kfp_placeholder_but_the_run_s_id(cpu):
    constants = [
        source["runtimeValue"]["constant"]
        for _, _, task in tasks(cpu)
        for source in task.get("inputs", {}).get("parameters", {}).values()
        if "runtimeValue" in source
    ]
    assert set(constants) == {"{{$.pipeline_job_uuid}}"}


# --- Resources ------------------------------------------------------------------------------------------------------------


def test_without_a_pools_file_nothing_is_asked_for(cpu):
    for name, container in executors(cpu).items():
        assert "resources" not in container, name
    assert all("retryPolicy" not in task for _, _, task in tasks(cpu))


def test_what_runs_for_a_done_or_stopped_round_asks_for_no_accelerator(pooled):
    spec = pooled[0]
    containers = executors(spec)
    wanting = {name for name, container in containers.items() if "accelerator" in container.get("resources", {})}
    assert set(map(stage, wanting)) == NEEDS_GPU
    assert reachable(spec, "comp-condition-4") == {"rollout", "score", "select", "train"}
    assert set(map(stage, reachable(spec, "comp-condition-6"))) == {"spread", "gather", "rollout", "score", "select", "train"}
    assert reachable(spec, "comp-condition-9") == {"recover"}
    behind_begin = set().union(*(reachable(spec, f"comp-condition-{number}") for number in (4, 6, 9)))
    in_the_loop = reachable(spec, "comp-for-loop-3")
    assert not (in_the_loop - behind_begin) & wanting
    assert wanting - behind_begin == {"evaluate"}, "evaluate waits for the loop; the rest stands behind begin"


def test_a_tick_that_finds_nothing_new_asks_for_no_accelerator(pooled):
    spec = pooled[0]
    inside = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert "accelerator" not in executors(spec)["resolve"].get("resources", {})
    assert inside["condition-2"]["dependentTasks"] == ["resolve"]
    assert set(map(stage, reachable(spec, "comp-condition-2"))) >= NEEDS_GPU


def test_accelerators_are_constants_and_counts_are_text(pooled):
    """The backend drops a count that is an int parameter, in silence."""
    for name, container in executors(pooled[0]).items():
        if stage(name) not in NEEDS_GPU:
            continue
        accelerator = container["resources"]["accelerator"]
        assert accelerator["resourceType"] == "nvidia.com/gpu", name
        assert accelerator["resourceCount"] == ("8" if stage(name) == "train" else "1")
        assert isinstance(accelerator["resourceCount"], str)


def test_retries_and_timeouts_are_constants_and_begin_has_no_retry(pooled):
    spec, platform = pooled
    retried = {stage(name): task["retryPolicy"]["maxRetryCount"] for _, name, task in tasks(spec) if "retryPolicy" in task}
    assert retried == dict.fromkeys(NEEDS_GPU, 2)
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert pods["exec-train"]["activeDeadlineSeconds"] == str(1440 * 60)


def train_tasks(spec: Spec) -> list[Spec]:
    """Of a round, and of a round in shards."""
    found = [task for _, name, task in tasks(spec) if stage(name) == "train"]
    assert len(found) == 2
    return found


def test_on_one_node_the_train_step_gets_no_job(cpu, pooled):
    for spec in (cpu, pooled[0]):
        for task in train_tasks(spec):
            assert [name.removeprefix("pipelinechannel--") for name in task["inputs"]["parameters"]] == ["round_uri"]
        assert spec["components"]["comp-train"]["inputDefinitions"]["parameters"]["job"]["defaultValue"] == ""


def test_on_several_nodes_the_train_step_launches_from_the_cpu_pool(spread):
    spec, platform = spread
    container = executors(spec)["train"]
    assert container["resources"] == executors(spec)["select"]["resources"]
    assert "accelerator" not in container["resources"]
    limited = map(stage, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"])
    assert "exec-train" not in limited, "waiting in a queue is no timeout"
    assert [task["retryPolicy"]["maxRetryCount"] for task in train_tasks(spec)] == [2, 2]


def test_the_job_is_one_constant_text_whose_numbers_stay_whole(spread):
    (constant,) = {task["inputs"]["parameters"]["job"]["runtimeValue"]["constant"] for task in train_tasks(spread[0])}
    assert isinstance(constant, str)
    assert "{{" not in constant, "Argo would take it for a template"
    job = JobSpec.model_validate_json(constant)
    assert (job.nodes, job.count, job.memory, job.timeout_minutes) == (2, 8, "512Gi", 1440)
    job = render(job, "s3://bucket/runs/a-0/rounds/0001")
    assert list(problems(job, yaml.safe_load(SCHEMAS["v2.3.0"].read_text(encoding="utf-8")))) == []


def test_several_nodes_change_the_train_step_alone(pooled, spread):
    one, many = (dict(executors(spec)) for spec, _ in (pooled, spread))
    assert {name for name in one if one[name] != many[name]} == {name for name in one if stage(name) == "train"}
    assert one.keys() == many.keys()
    assert pooled[0]["root"] == spread[0]["root"], "the run form stays as it is"


def test_pods_get_shared_memory_a_disk_selectors_and_tolerations(pooled):
    pods = pooled[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert {stage(name) for name in pods} == {f"exec-{name}" for name in NEEDS_GPU}
    train = pods["exec-train"]
    assert train["emptyDirMounts"] == [
        {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "64Gi", "volumeName": "shm"},
        {"mountPath": "/tmp", "sizeLimit": "1Ti", "volumeName": "scratch"},
    ]
    assert train["nodeSelector"]["labels"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert train["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]


def test_one_pod_for_all_rounds_is_a_training_pod_unless_it_has_a_pool(pooled, tmp_path):
    text = EXAMPLE_POOLS.read_text(encoding="utf-8")
    (tmp_path / "pools.toml").write_text(text.partition("\n[colocated]")[0], encoding="utf-8")
    compile_pipeline(tmp_path / "recovery.yaml", tmp_path / "pools.toml")
    without = executors(documents(tmp_path / "recovery.yaml")[0])
    assert without["recover"]["resources"] == without["train"]["resources"]
    assert executors(pooled[0])["recover"]["resources"]["accelerator"]["resourceCount"] == "1"


def test_nothing_is_named_vllm(pooled):
    """A Service of that name would set VLLM_ variables in every pod, which vLLM reads as its own."""
    text = "".join(map(yaml.safe_dump, pooled))
    names = re.findall(r"(?m)^\s*(?:- )?(?:name|volumeName): (\S+)$", text)
    assert names
    assert "vllm" not in [name.lower() for name in names]
