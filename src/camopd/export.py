"""What is promoted: a folder that people load, made of the last checkpoint without what only its training needs.

Optimiser moments are two thirds of a checkpoint, and rounds may be deleted one day. The weights are copied by the store, so
that they do not pass through this machine; card, facts and report are written beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from camopd import plan as layout
from camopd.evaluate import EVALUATION, REPORT, evaluation_uri, headline_table
from camopd.past import require_files
from camopd.plan import STEPS, TRAINER, Plan, is_companion, training_config
from camopd.store import Copies, Manifest, Store, digest, join
from camopd.tracking import logbook

CARD, FACTS, FLAVOUR = "README.md", "camopd.json", "MLmodel"
TOKENIZER = "components/tokenizer"  # where MLflow looks for it
OWN = (CARD, FACTS, FLAVOUR, REPORT)

# What mlflow.transformers.load_model reads: the model lies beside this file, the tokenizer once more where it is looked for.
MLMODEL = """flavors:
  transformers:
    components:
    - tokenizer
    framework: pt
    instance_type: TextGenerationPipeline
    model_binary: .
    pipeline_model_type: AutoModelForCausalLM
    source_model_name: {name}
    task: text-generation
    tokenizer_type: AutoTokenizer
"""


def export_uri(release_uri: str) -> str:
    return join(release_uri, "model")


def export(plan: Plan, release_uri: str, store: Store) -> Manifest:
    """Make ``<release>/model/``, once. Every byte that was copied is read where it lies now and compared with the checkpoint's.

    Raises:
        StoreError: the run is not trained or not evaluated.
        DamagedError: the checkpoint, or the copy of it, is not what its manifest says.
    """
    checkpoint = layout.checkpoint_uri(plan.rounds[-1])
    evaluated = evaluation_uri(plan, store)
    trained = require_files(checkpoint, store)
    is_adapter = plan.recipe.train.lora is not None and plan.recipe.train.lora.output == "adapter"
    names = released((file.name for file in trained.files), is_adapter=is_adapter)
    inputs = {"checkpoint": trained.content_id, "evaluation": store.require(evaluated).content_id}

    def write(folder: Path) -> Mapping[str, Any]:
        known = facts(plan, store, trained)
        (folder / FACTS).write_text(json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card(known), encoding="utf-8")
        (folder / REPORT).write_bytes(store.read(join(evaluated, REPORT)))
        if not is_adapter:
            (folder / FLAVOUR).write_text(MLMODEL.format(name=json.dumps(known["run"]["id"])), encoding="utf-8")
        return {}

    copies = Copies(checkpoint, names)
    return store.produce(export_uri(release_uri), stage="promote", config={}, inputs=inputs, write=write, copies=copies)


def released(names: Iterable[str], *, is_adapter: bool) -> dict[str, str]:
    """Name in the export -> name in the checkpoint, of what belongs to the model; a whole model's tokenizer twice."""
    kept = [name for name in names if name not in (STEPS, *OWN) and not name.startswith(f"{TRAINER}/")]
    tokenizer = [] if is_adapter else [name for name in kept if is_companion(name)]
    return {name: name for name in kept} | {f"{TOKENIZER}/{name}": name for name in tokenizer}


# --- Facts ----------------------------------------------------------------------------------------------------------------


def facts(plan: Plan, store: Store, trained: Manifest) -> dict[str, Any]:
    """All that is known of how the model was made; the same whoever asks again, so without a time of now."""
    recipe = plan.recipe
    evaluated = evaluation_uri(plan, store)
    known: dict[str, Any] = {
        "run": {"id": logbook.identity(plan).run_id, "uri": logbook.absolute(plan.run_uri)},
        "kind": "model",
        "content_ids": {**plan.content_ids, "checkpoint": trained.content_id},
        "settings": recipe.model_dump(mode="json", exclude={"tracking"}),
        "settings_id": digest(training_config(recipe, plan.content_ids)),
        "lineage": {
            "student": recipe.student,
            "teachers": {branch.name: recipe.teacher(branch) for branch in recipe.branches},
            "versions": recipe.sources,
        },
        "software": software(plan, store),
        "evaluation": {
            "uri": logbook.absolute(evaluated),
            "content_id": store.require(evaluated).content_id,
            **json.loads(store.read(join(evaluated, EVALUATION))),
        },
    }
    if recipe.train.lora and recipe.train.lora.output == "adapter":
        base = logbook.absolute(plan.weights(recipe.student, store).base)
        known |= {"kind": "lora-adapter", "base": {"uri": base, "content_id": plan.base_id["base"]}}
    return known


def software(plan: Plan, store: Store) -> dict[str, Any]:
    """Version, commit and image of the code that promotes, and of the stages in the last round; what the environment tells."""
    told = logbook.identity(plan).tags
    names = {"camopd.version": "camopd", "mlflow.source.git.commit": "git_sha", "camopd.image_digest": "image_digest"}
    names |= {tag: tag for tag in logbook.ATTEMPT_TAGS if tag.startswith("kfp.")}
    last = plan.rounds[-1]
    places = {"prepare": layout.plan_uri(plan.run_uri), "rollout": layout.rollout_uri(last)}
    places |= {"train": layout.checkpoint_uri(last), "evaluate": evaluation_uri(plan, store)}
    stages = {stage: done.software for stage, uri in places.items() if (done := store.manifest(uri))}
    return {name: told[tag] for tag, name in names.items() if tag in told} | {"stages": stages}


# --- Card -----------------------------------------------------------------------------------------------------------------


def card(known: Mapping[str, Any]) -> str:
    """The model card: YAML for the Hugging Face Hub and its like, and a page for people."""
    is_adapter, evaluation = known["kind"] == "lora-adapter", known["evaluation"]
    student, version = known["lineage"]["student"], known["software"]["camopd"]
    head = {
        "base_model": known["base"]["uri"] if is_adapter else student,
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["camopd", "distillation"],
    }
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())  # JSON is YAML
    header, *rows = (f"| {' | '.join(row)} |" for row in headline_table(evaluation))
    table = "\n".join([header, "|" + "---|" * (len(evaluation["branches"]) + 1), *rows])
    source = known["lineage"]["versions"].get("student")
    reasons = "\n".join(f"- {reason}" for reason in evaluation["decision"]["reasons"])
    return f"""---
{front}
---

# {known["run"]["id"]}

The domain model `{student}`{f" (`{source}`)" if source else ""} with its lost general ability recovered by camopd {version}
(CaMOPD, arXiv:2605.27115): trained on its own answers, the original model as teacher on general prompts and itself on domain
prompts.

{table}

Each number has its 95 % interval. The gate said yes:

{reasons}

`{REPORT}` shows the whole evaluation; `{FACTS}` has the content ids of all inputs, every setting and the version of the code.

## Loading it

{_loading(known)}
"""


def _loading(known: Mapping[str, Any]) -> str:
    if known["kind"] == "model":
        return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
```"""
    return f"""An adapter over `{known["base"]["uri"]}` ({known["base"]["content_id"]}): fetch that, too, and say where it is.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)
```"""
