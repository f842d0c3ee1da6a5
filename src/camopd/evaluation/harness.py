"""The evaluation harness: with served.py the only file that imports lm_eval. Heavy, so nothing light imports this module."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camopd.errors import InputError, Problem

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from camopd.evaluation.served import ServedTeacher

REASONING_END = "</think>"


@dataclass(frozen=True)
class Answer:
    """What a model made of one sample.

    Attributes:
        item: the sample's name within its task, the same for every model.
        question: the sample's own text.
        prompt: what the model read: the question with examples and chat template.
        answer: what it wrote, after the task's filter; for a choice the index of the likeliest.
        target: what the task holds to be right.
        score: the task's first metric on this sample.
    """

    item: str
    question: str
    prompt: str
    answer: str
    target: str
    score: float


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's progress bars and notices; ours stand in the log instead. Exceptions pass."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def open_tasks(names: Iterable[str], task_dir: Path | None, *, seed: int) -> Iterator[dict[str, list[Task]]]:
    """The tasks behind each name, with their data; a group's tasks stand together under its name.

    Args:
        names: of tasks or groups.
        task_dir: folder of YAML tasks, whose relative ``data_files`` are found beside the YAML. Needs no network. None means
            lm-eval's own tasks, whose data come from the Hugging Face cache or hub.
        seed: for tasks that draw examples.

    Raises:
        InputError: every name that does not exist, or a metric where less is better.
    """
    import datasets

    with tempfile.TemporaryDirectory(prefix="camopd-tasks-") as cache:
        # A pod's home folder may be read-only, and a closed cluster must not wait for a hub that only wants to count.
        wanted = {"HF_DATASETS_CACHE": Path(cache), "HF_HUB_OFFLINE": True} if task_dir else {}
        usual = {name: getattr(datasets.config, name) for name in wanted}
        vars(datasets.config).update(wanted)
        try:
            with quiet():
                tasks = load_tasks(tuple(dict.fromkeys(names)), task_dir, seed=seed)
            yield tasks
        finally:
            vars(datasets.config).update(usual)


@dataclass(frozen=True)
class Harness:
    """The settings under which every model answers.

    Attributes:
        tasks: name -> its tasks, whose samples are pooled.
        tokenizer: one for all models; with a chat template, it is applied.
        batch_size: sequences evaluated together.
        limit: samples a task, the first ones; None means all.
        seed: for tasks that sample.
        enable_thinking: passed to the chat template; None leaves it out.
    """

    tasks: Mapping[str, list[Task]]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    limit: int | None = None
    seed: int = 0
    enable_thinking: bool | None = None

    def settings(self) -> dict[str, Any]:
        """What a reader needs to repeat the scores: metric, filter, examples and generation settings of each task."""
        return {
            "lm_eval": version("lm-eval"),
            "tasks": {name: [describe(task) for task in tasks] for name, tasks in self.tasks.items()},
        }

    def num_samples(self) -> int:
        """Samples of all tasks together, for one model."""
        sizes = [len(task.eval_docs) for tasks in self.tasks.values() for task in tasks]
        return sum(min(size, self.limit or size) for size in sizes)

    def evaluate(self, model: PreTrainedModel | ServedTeacher) -> Iterator[tuple[str, list[Answer]]]:
        """Each task's name with the model's answers, in the order of the samples."""
        with quiet():
            from lm_eval.models.huggingface import HFLM

            from camopd.evaluation.served import ServedLM, ServedTeacher

            vocabulary = self.tokenizer.get_vocab()
            options: dict[str, Any] = {
                "tokenizer": self.tokenizer,
                "batch_size": self.batch_size,
                # Not its own enable_thinking, which refuses templates and tasks that get along with it.
                "chat_template_args": {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking},
                "think_end_token": REASONING_END if REASONING_END in vocabulary else None,
            }
            served = ServedLM(model, **options) if isinstance(model, ServedTeacher) else None
            lm = served or HFLM(pretrained=model, **options)
        for name, tasks in self.tasks.items():
            yield name, [answer for task in tasks for answer in self._answers(lm, task, prefix=len(tasks) > 1)]

    def _answers(self, lm: Any, task: Task, *, prefix: bool) -> list[Answer]:
        import lm_eval
        import transformers

        transformers.set_seed(self.seed)
        with quiet():
            # Not simple_evaluate: it asks git and every installed package for their versions at each call.
            result = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": {task.config.task: task}},
                limit=self.limit,
                bootstrap_iters=0,
                apply_chat_template=self.tokenizer.chat_template is not None,
            )
        metric, kept = metric_of(task), None
        answers = []
        for sample in result["samples"][task.config.task]:
            kept = kept or sample["filter"]  # the first filter is the task's main one
            if sample["filter"] == kept:
                item = f"{task.config.task}/{sample['doc_id']}" if prefix else str(sample["doc_id"])
                answers.append(to_answer(sample, item=item, question=str(task.doc_to_text(sample["doc"])), metric=metric))
        return answers


def unknown_tasks(names: Sequence[str]) -> list[str]:
    """Those that are no task or group of lm-eval's own. Reads its index of 14,000 tasks: seconds, and no network."""
    with quiet():
        from lm_eval.tasks import TaskManager

        index = TaskManager().task_index
    return [name for name in names if name not in index]


def load_tasks(names: Sequence[str], task_dir: Path | None, *, seed: int) -> dict[str, list[Task]]:
    """The tasks behind each name, with their data. Raises InputError with every name that does not exist."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_dir.resolve()) if task_dir else None, include_defaults=task_dir is None)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        place = (
            f"the YAML files of {task_dir} hold {', '.join(manager.all_tasks) or 'none'}"
            if task_dir
            else "see `lm-eval ls tasks`"
        )
        raise InputError([Problem("branches.tasks", f"there is no task {name!r}", place) for name in unknown])
    found: dict[str, list[Task]] = {}
    for name in names:
        path = manager.task_index[name].yaml_path
        # Relative data files are looked up in the current directory; a task's author means the YAML's.
        with contextlib.chdir(path.parent) if task_dir and path else contextlib.nullcontext():
            found[name] = list(manager.load([name])["tasks"].values())
    for task in (task for tasks in found.values() for task in tasks):
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
        metric = metric_of(task)
        if not task.higher_is_better().get(metric, True):
            problem = f"its first metric {metric} is better when lower"
            raise InputError([Problem(f"task {task.config.task}", problem, "put one first where more is better")])
    return found


def metric_of(task: Task) -> str:
    """The task's primary metric: the first of its list."""
    listed = task.config.metric_list
    if not listed:
        return next(iter(task.higher_is_better()))
    metric = listed[0]["metric"]
    return metric if isinstance(metric, str) else metric.__name__


def describe(task: Task) -> dict[str, Any]:
    """The settings of one task that shape its scores."""
    config = task.config
    return {
        "task": config.task,
        "metric": metric_of(task),
        "output_type": config.output_type,
        "num_fewshot": config.num_fewshot,
        "num_items": len(task.eval_docs),
        "generation": dict(config.generation_kwargs or {}),
    }


def to_answer(sample: Mapping[str, Any], *, item: str, question: str, metric: str) -> Answer:
    """One logged sample of lm-eval as an answer. Raises InputError when its metric is not one number a sample."""
    score = sample.get(metric)
    if not isinstance(score, Real):  # corpus metrics (perplexity, F1) log tuples or nothing
        problem = f"its first metric {metric} is not one number a sample, so scores cannot be compared in pairs"
        raise InputError([Problem(f"item {item}", problem, "put a metric of single samples (exact_match, acc) first")])
    responses = sample["filtered_resps"]
    if isinstance(responses[0], str):
        answer = responses[0]
    else:  # (log-likelihood, is greedy) of each choice
        answer = str(max(range(len(responses)), key=lambda choice: responses[choice][0]))
    prompt = sample["arguments"][0][0]
    return Answer(item, question, str(prompt), answer, str(sample["target"]), float(score))
