"""A tiny model of every family in a Hugging Face folder, by transformers, with odd sizes and weights that show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,  # 259: every tensor size of the tests pads it
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": tiny.END, "pad_token_id": None,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
GEMMA3 = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 7, "query_pre_attn_scalar": 20, "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 6, "head_dim": 6, "q_lora_rank": 20, "kv_lora_rank": 14, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 20, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> (transformers' class without its ending, settings)
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 20}),
    "qwen3_moe": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": True}),
    "gemma3": ("Gemma3", GEMMA3),
    "qwen3_moe-raw": ("Qwen3Moe", MIXTURE | {"norm_topk_prob": False, "mlp_only_layers": [1]}),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
    ),
    "deepseek_v2-lite": ("DeepseekV2", LATENT | {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 1}),
    "deepseek_v3": (
        "DeepseekV3",
        LATENT | {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "rope_parameters": YARN},
    ),
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]


def make_family(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Write `folder` with config.json, model.safetensors and the byte tokenizer; returns it."""
    import torch
    import transformers

    kind, settings = MODELS[name]
    kind = getattr(transformers, kind + "ForCausalLM")
    config = kind.config_class(**COMMON | settings | changes)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = kind(config).float()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():  # norms, biases: none may pass for another, or for none
                tensor.add_(0.1 * torch.randn_like(tensor))
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder, tiny.CHAT, end="<|im_end|>")
    return folder


def logits_of(folder: Path, tokens=TOKENS):
    """[T, V] by transformers, in the folder's dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]
