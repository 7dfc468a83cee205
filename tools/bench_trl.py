"""TRL's side of tools/bench_step.py: the same work by GRPOTrainer, a step whenever the referee says go.

Runs in an environment of its own (trl, accelerate, datasets), with this repository on PYTHONPATH for the reward.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from multiprocessing.connection import Client
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_mega.rewards.exact import exact


class Stopwatch:
    """Seconds spent in wrapped methods since the last reset."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, owner, method: str, name: str) -> None:
        real = getattr(owner, method)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, method, timed)


class TurnTaking(TrainerCallback):
    """Waits for its turn before a step, and reports after it."""

    def __init__(self, connection, watch: Stopwatch, lengths: list[int]):
        self.connection, self.watch, self.lengths = connection, watch, lengths

    def on_step_begin(self, *_, **__):
        self.connection.recv()
        self.watch.seconds.clear()
        self.lengths.clear()
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        spent = {name: self.watch.seconds.get(name, 0.0) for name in ("sample", "reward", "prepare")}
        logprobs = max(0.0, spent.pop("prepare") - sum(spent.values()))
        self.connection.send(
            {
                **spent,
                "log-probs": logprobs,
                "update": wall - sum(spent.values()) - logprobs,
                "gather": 0.0,
                "rest": 0.0,
                "wall": wall,
                "cpu": cpu,
                "tokens": sum(self.lengths),
                "sampled": sum(self.lengths) / spent["sample"],
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "processes": 1,
            }
        )


def main(job_file: str, address: str) -> None:
    job = json.loads(Path(job_file).read_text())
    recipe, prompts = job["recipe"], job["prompts"]
    sampling, grpo, optimizer = recipe["sampling"], recipe["grpo"], recipe["optimizer"]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe["precision"]["dtype"]]
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["path"], padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for row in prompts[:32]:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        if list(ids) != row["token_ids"]:
            sys.exit(f"error: TRL's tokens of {row['prompt']} are {list(ids)}, ours {row['token_ids']}")
    completions = recipe["batch"]["prompts_per_step"] * grpo["group_size"]
    config = GRPOConfig(
        output_dir=job["output"],
        per_device_train_batch_size=job["microbatch"],
        gradient_accumulation_steps=completions // job["microbatch"],
        num_generations=grpo["group_size"],
        max_completion_length=sampling["max_completion_tokens"],
        temperature=sampling["temperature"],
        generation_kwargs={"eos_token_id": job["stop_token_ids"]},
        beta=grpo["kl_coef"],
        epsilon=grpo["clip_low"],
        epsilon_high=grpo["clip_high"],
        loss_type="grpo",
        learning_rate=optimizer["lr"],
        max_grad_norm=optimizer["clip_grad"],
        lr_scheduler_type="constant",
        max_steps=job["steps"],
        shuffle_dataset=False,
        use_cpu=True,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1000,
        save_strategy="no",
        disable_tqdm=True,
    )
    watch, lengths = Stopwatch(), []

    def reward(completions, answer, completion_ids, **_):
        lengths.extend(len(ids) for ids in completion_ids)
        return [exact(c[0]["content"], a, {}) for c, a in zip(completions, answer, strict=True)]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=dtype),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "answer": row["answer"]} for row in prompts]),
        processing_class=tokenizer,
        callbacks=[TurnTaking(Client(address, "AF_UNIX"), watch, lengths)],
    )
    watch.wrap(trainer, "_generate", "sample")
    watch.wrap(trainer, "_calculate_rewards", "reward")
    watch.wrap(trainer, "_generate_and_score_completions", "prepare")
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
