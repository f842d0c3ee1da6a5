"""A contestant of benchmarks/against_trl.py: TRL's DistillationTrainer, on-policy with full-vocabulary reverse KL.

Runs in TRL's own environment. Takes the same job as with_torch.py, of which it reads the first branch: it has one teacher. Its
settings are the fastest that it offers without a GPU: no activation checkpointing, no bfloat16 (slower on most processors),
nothing logged or saved, the fused optimiser. Its loss is the chunked one whatever is asked for; Liger's kernels need a GPU.
"""

import json
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from turns import Turns


class TakeTurns(TrainerCallback):
    def on_train_begin(self, args, state, control, *, model, **_):
        self.turns = Turns(model.save_pretrained)

    def on_step_end(self, args, state, control, **_):
        self.turns.update_done()


def main(job, folder):
    torch.set_num_threads(1)
    branch = job["branches"][0]
    tokenizer = AutoTokenizer.from_pretrained(job["student"], padding_side="left")
    with open(branch["prompts"], encoding="utf-8") as lines:
        conversations = [json.loads(line)["messages"] for line in lines]
    # Rendered once: it would apply the chat template again in each step.
    texts = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    arguments = DistillationConfig(
        output_dir=folder,
        beta=1.0,  # reverse KL
        temperature=1.0,
        max_completion_length=job["max_new_tokens"],
        per_device_train_batch_size=job["prompts_per_step"],
        max_steps=100_000,  # the end of the input ends it
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        weight_decay=job["weight_decay"],
        max_grad_norm=job["max_grad_norm"],
        optim="adamw_torch_fused",
        seed=job["seed"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    DistillationTrainer(
        model=job["student"],
        teacher_model=branch["teacher"],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[TakeTurns()],
    ).train()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(json.loads(sys.argv[1]), scratch)
