"""A policy, an old policy and a reference on a mesh, and the same three by transformers in float64: for oracles."""

from __future__ import annotations

import math

import tiny
import torch
from assembled import assembled
from safetensors.torch import load_file, save_file

from grpo_mega.config import validate_recipe
from grpo_mega.model.build import build_model
from grpo_mega.model.families import read_architecture
from grpo_mega.model.layout import layers_per_stage
from grpo_mega.parallel import collectives, mesh
from grpo_mega.trainer.batches import minibatches, pair_cost_of, training_share, with_logprobs
from grpo_mega.trainer.heads import TokenHead
from grpo_mega.trainer.policy import Policy, Scorer
from grpo_mega.types import add_metrics

TEMPERATURE, LIMIT, PROMPTS = 0.7, 6, 4


def three_models(base):
    """Folders of policy, old policy and reference: the second and third are the first with a little noise."""
    result = [
        tiny.make_model(
            base / name, num_hidden_layers=4, hidden_size=16, intermediate_size=32, num_attention_heads=4,
            num_key_value_heads=2, tied=True,
        )
        for name in ("policy", "old", "reference")
    ]  # fmt: skip
    for seed, folder in enumerate(result[1:]):
        generator = torch.Generator().manual_seed(seed)
        weights = load_file(folder / "model.safetensors")
        noisy = {name: w + 0.03 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
        save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return result


def completion_logprobs(model, prompt, completion):
    tokens = torch.tensor([prompt.token_ids + completion.token_ids])
    logits = model(tokens).logits[0, len(prompt.token_ids) - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def dense(folder, trainable):
    """A transformers model in float64 throughout (its norm would go through float32)."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Norm(torch.nn.RMSNorm):
        """x / sqrt(mean(x^2) + eps) * weight in the dtype of x."""

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    model.requires_grad_(trainable)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = Norm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model.eval()


def recipe_of(folder, parallel, *, cut=(1, 1000), **grpo):
    """cut: minibatches, tokens_per_microbatch; grpo: keys of that section."""
    return validate_recipe(
        {
            "model": {"path": str(folder)},
            "parallel": parallel,
            "data": {"jsonl": "unused"},
            "sampling": {"temperature": TEMPERATURE, "max_completion_tokens": LIMIT},
            "grpo": {"group_size": 3, "kl_coef": 0.0} | grpo,
            "batch": {"prompts_per_step": PROMPTS, "minibatches": cut[0], "tokens_per_microbatch": cut[1]},
            "run": {"directory": "unused"},
        }
    )


def ranks_of(layout):
    parallel, positions = layout
    return math.prod(parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context")) * len(positions)


class Bench:
    """A policy, an old policy and a reference on this rank's mesh."""

    def __init__(self, folders, layout, dtype):
        """folders: of the three; layout: keys of `parallel`, and the positions of the groups of each data rank."""
        self.layout, positions = layout
        recipe = recipe_of(folders[0], self.layout)
        self.mesh = mesh.initialize(**recipe.parallel.sizes)
        self.positions = positions[self.mesh.data.rank]
        self.arch = read_architecture(folders[0])
        self.layers = layers_per_stage(self.arch, recipe.parallel.stages)
        settings = {"mesh": self.mesh, "parallel": recipe.parallel, "dtype": dtype}
        models = [
            build_model(read_architecture(folder), trainable=folder is folders[0], **settings) for folder in folders
        ]
        common = (self.arch.vocab_size, self.mesh, TEMPERATURE)
        heads = [TokenHead(model, *common) for model in models]
        self.policy = Policy(heads[0], recipe.optimizer, 1)
        self.old, self.reference = map(Scorer, heads[1:])

    def batches(self, groups, recipe, old=None):
        """The microbatches of each minibatch, with log-probs."""
        positions, pair_cost = self.positions, 0.0
        if positions is None:
            pair_cost = pair_cost_of(self.arch)
            positions = training_share(groups, recipe, self.mesh, pair_cost)
            recipe = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"fixed_rows": True})})
        mine = [groups[position] for position in positions]
        for part in minibatches(mine, positions, recipe, self.mesh, self.policy.dtype, pair_cost):
            yield with_logprobs(part, (old or self.old).logprobs(part), self.reference.logprobs(part))

    def total(self, metrics):
        mine = metrics if self.mesh.tensor.first else {}
        added = add_metrics(*collectives.gather_objects(mine, self.mesh.world.group))
        return {name: value.value() for name, value in added.items()}

    def gradients(self, scratch):
        """The gradient buffers by Hugging Face name, on the writer."""
        where = (self.policy.model, self.arch, self.mesh, self.layers)
        return assembled(*where, lambda parameter: parameter.main_grad, scratch / "gradients")
