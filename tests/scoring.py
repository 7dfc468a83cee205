"""Tiny reward models in Hugging Face folders, and their scores by transformers."""

from __future__ import annotations

from pathlib import Path

import families
import tiny

SHAPE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": tiny.END,
    "rope_theta": 10000.0,
}  # fmt: skip


def make_scored(
    folder: Path, family: str | None = None, *, kind: str = "Sequence", labels: int = 1, seed: int = 0, **changes
) -> Path:
    """Write a classification folder: a small Llama, or a family of `families`; with the byte tokenizer."""
    import torch
    import transformers

    name, settings = ("Llama", SHAPE) if family is None else families.MODELS[family]
    settings = settings if family is None else families.COMMON | settings
    name = "Gemma3Text" if name == "Gemma3" else name
    made = getattr(transformers, f"{name}For{kind}Classification")
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = made(made.config_class(**settings | {"num_labels": labels} | changes)).float()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
            if name.startswith("score"):
                tensor.copy_(torch.randn_like(tensor))
    torch.set_rng_state(state)
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder, tiny.CHAT, end="<|im_end|>")
    return folder


def by_transformers(folder: Path, texts, kind: str = "Sequence"):
    """[n, labels] float32 for conversations (user's text, answer), each alone, at the last token."""
    import torch
    import transformers

    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    model = auto.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt, answer in texts:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits
        found.append(logits[0, -1] if kind == "Token" else logits[0])
    return torch.stack(found)
