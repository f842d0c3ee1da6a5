"""A contestant of benchmarks/against_trl.py: the loop one would write with torch and transformers alone.

Branches in turns, `generate`, the teacher's forward pass, the sampled-token loss on every response. Takes one argument, the job
as JSON: student, branches (prompts, teacher), cycle (index of the branch at each step), prompts_per_step, max_new_tokens,
learning_rate, betas, weight_decay, max_grad_norm, seed.
"""

import itertools
import json
import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import Turns


def batches(path, tokenizer, size, rng):
    """Prompts without end, in a new order each epoch, padded on the left."""
    with open(path, encoding="utf-8") as lines:
        conversations = [json.loads(line)["messages"] for line in lines]
    while True:
        rng.shuffle(conversations)
        for start in range(0, len(conversations) - size + 1, size):
            yield tokenizer.apply_chat_template(
                conversations[start : start + size],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )


def sampled_logprobs(model, tokens, mask, length):
    """Log-probabilities of the last `length` tokens (B, length)."""
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[:, -length:, None]).squeeze(-1)


def update(student, teacher, optimizer, prompts, job):
    """One step of sampled-token on-policy distillation: loss = - mean of the sequences' means of A log pi_theta."""
    tokens = student.generate(**prompts, max_new_tokens=job["max_new_tokens"], do_sample=True)
    response = tokens[:, prompts["input_ids"].shape[1] :]
    ended = (response == student.config.eos_token_id).cumsum(-1)
    kept = (ended - (response == student.config.eos_token_id).long() == 0).long()  # up to the end token, that one included
    mask = torch.cat([prompts["attention_mask"], kept], -1)
    with torch.no_grad():
        taught = sampled_logprobs(teacher, tokens, mask, response.shape[1])
    own = sampled_logprobs(student, tokens, mask, response.shape[1])
    loss = -(((taught - own.detach()) * own * kept).sum(-1) / kept.sum(-1)).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), job["max_grad_norm"])
    optimizer.step()


def main(job):
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["student"], padding_side="left")
    student, *teachers = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (job["student"], *(branch["teacher"] for branch in job["branches"]))
    )
    rng = random.Random(job["seed"])
    prompts = [batches(branch["prompts"], tokenizer, job["prompts_per_step"], rng) for branch in job["branches"]]
    optimizer = torch.optim.AdamW(
        student.parameters(), job["learning_rate"], betas=job["betas"], weight_decay=job["weight_decay"], fused=True
    )
    turns = Turns(student.save_pretrained)
    for branch in itertools.cycle(job["cycle"]):
        update(student, teachers[branch], optimizer, next(prompts[branch]), job)
        turns.update_done()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
