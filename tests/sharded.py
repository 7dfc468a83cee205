"""What tests of sharded gradients share: samples with a loss of every token, transformers' gradients in float64,
and how ranks' gradients become whole tensors under their Hugging Face names.
"""

from __future__ import annotations

from functools import partial

import tiny
import torch

from grpo_mega.types import Sample

TEMPERATURE, ENTROPY = 0.8, 0.3


def samples():
    """Two completions of one prompt, then two other sequences: prompt and completion lengths, advantage."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda n: tuple(torch.randint(tiny.VOCABULARY, (n,), generator=generator).tolist())  # noqa: E731
    prompts = [draw(6)] * 2 + [draw(3), draw(1)]
    made = []
    for order, (prompt, length, advantage) in enumerate(
        zip(prompts, (7, 9, 12, 5), (1.5, -0.7, 0.9, -1.2), strict=True)
    ):
        coefficients = torch.randn(length, generator=generator).tolist()  # in the place of sampler log-probs
        made.append(Sample(
            order=order, group=max(order - 1, 0), prompt_tokens=len(prompt), token_ids=prompt + draw(length),
            loss_mask=(False,) * len(prompt) + (True,) * length,
            sampler_logprobs=(0.0,) * len(prompt) + tuple(coefficients), advantage=advantage, weight=0.1 * (order + 1),
        ))  # fmt: skip
    return made


def token_loss(logprobs, entropies, weights, advantages, coefficients):
    """A fixed weighted sum: every token's log-prob and entropy with a weight of its own."""
    return (weights * (advantages * coefficients * logprobs + ENTROPY * entropies)).sum()


def objective(logprobs, entropies, batch):
    return token_loss(logprobs, entropies, batch.loss_weights, batch.advantages, batch.sampler_logprobs), {}


def loss_of(model):
    """The samples' loss by transformers."""
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples():
        tokens = torch.tensor(sample.token_ids)
        logp = torch.log_softmax(model(tokens[None, :-1]).logits[0] / TEMPERATURE, dim=1)[sample.prompt_tokens - 1 :]
        taken = logp.gather(1, tokens[sample.prompt_tokens :, None])[:, 0]
        coefficients = torch.tensor(sample.sampler_logprobs[sample.prompt_tokens :], dtype=torch.float64)
        entropies = -(logp.exp() * logp).sum(dim=1)
        loss = loss + token_loss(taken, entropies, sample.weight, sample.advantage, coefficients)
    return loss


def hugging_face(model, arch, place):
    """This rank's gradients as parts of Hugging Face tensors: (name, dim, source, values)."""
    from grpo_mega.model.bridge import pieces

    parameters, found = dict(model.named_parameters()), []
    for name, parts in pieces(arch, place):
        parameter = parameters.pop(name)
        if not parameter.requires_grad:
            continue
        gradient = parameter.main_grad.double()
        rest = gradient.clone()
        for piece in parts:
            found.append((piece.name, piece.dim, piece.source, gradient.narrow(piece.dim, piece.start, piece.length)))
            rest.narrow(piece.dim, piece.start, piece.length).zero_()
        assert torch.count_nonzero(rest) == 0, f"{name}: a gradient where there is no weight"
    assert not parameters
    return found


def whole(by_rank, wanted):
    """Full tensors from every rank's parts. Where two ranks hold the same part they must hold the same bits."""
    full = {name: torch.full_like(tensor, float("nan")) for name, tensor in wanted.items()}
    for rank in by_rank:
        for name, dim, source, values in rank["gradients"]:
            part = full[name].narrow(dim, source, values.shape[dim])
            held = ~part.isnan()
            assert torch.equal(part[held], values[held]), f"{name}: copies on several ranks differ"
            part.copy_(values)
    return full


def gradients_of(model):
    """{name in the folder: gradient}; transformers joins the experts of a layer, folders have one tensor for each."""
    mixtral = type(model).__name__ == "MixtralForCausalLM"
    mlp = "block_sparse_moe." if mixtral else "mlp."
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found = {}
    for name, parameter in model.named_parameters():
        layer, _, part = name.partition("mlp.")
        if part == "gate.weight":
            found[f"{layer}{mlp}gate.weight"] = parameter.grad
        elif part.startswith("experts."):
            for n, gradient in enumerate(parameter.grad):
                cut = {gate: gradient.chunk(2)[0], up: gradient.chunk(2)[1]} if "up" in part else {down: gradient}
                found |= {f"{layer}{mlp}experts.{n}.{kind}.weight": g for kind, g in cut.items()}
        else:
            found[name] = parameter.grad
    return found


def load_in_float64(folder):
    """transformers' model; its norms and Mixtral's routers round to float32, so torch's take their place."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").double()
    for module in list(model.modules()):
        if type(module).__name__ == "MixtralTopKRouter":
            module.forward = partial(choose, module)
        for name, child in module.named_children():
            if type(child).__name__ == "Gemma3RMSNorm":
                child.forward = partial(normed, child)
            elif type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif type(child).__name__ == "Gemma3TextScaledWordEmbedding":
                child.embed_scale = torch.tensor(child.scalar_embed_scale, dtype=torch.float64)
    return model


def normed(norm, x):
    """Gemma's RMSNorm without its rounding."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps) * (1 + norm.weight)


def choose(router, hidden):
    """(scores, weights, experts): softmax over all experts, the highest k divided by their sum."""
    scores = torch.nn.functional.linear(hidden.flatten(0, -2), router.weight)
    weights, experts = scores.softmax(dim=1).topk(router.top_k, dim=1)
    return scores, weights / weights.sum(dim=1, keepdim=True), experts
