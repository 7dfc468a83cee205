"""A tiny Llama or Mixtral in a Hugging Face folder, with random weights and a byte tokenizer: to shard in a test."""

from __future__ import annotations

import json
from pathlib import Path

VOCABULARY = 259  # 256 bytes and three special tokens: 3 x a prime, so that every tensor size but 3 pads it
END = 258
CHAT = (  # the user's text between two special tokens
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
)


def make_model(folder: Path, *, tied: bool = True, seed: int = 0, scale: float = 0.2, **changes) -> Path:
    """Write `folder` (config.json, model.safetensors, tokenizer) and return it.

    changes: fields of LlamaConfig, or of MixtralConfig where num_local_experts is one of them. scale: standard
    deviation of the weights; 0.2 spreads the logits over a few nats.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": scale,
        "bos_token_id": None,
        "eos_token_id": END,
        "rope_theta": 10000.0,
    } | changes
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    if "num_local_experts" in settings:
        model = MixtralForCausalLM(MixtralConfig(**settings)).float()
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # norms that are not all one: a mixed-up norm must show
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    save_tokenizer(folder, CHAT, end="<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END]}))
    return folder


def save_tokenizer(folder: Path, template: str | None, end: str) -> None:
    """A byte-level tokenizer: every byte is a token, so nothing is unknown and lengths can be counted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # 256, 257, 258
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end)
    fast.chat_template = template
    fast.save_pretrained(folder)
