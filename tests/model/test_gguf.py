"""GGUF -> Hugging Face, against a tiny Llama whose weights the quantised formats hold exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from converting import commands
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from grpo_mega.errors import ConfigError
from grpo_mega.model.formats import gguf
from grpo_mega.model.formats.gguf import gguf_to_hugging_face

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, THETA, EPS = 64, 96, 4, 2, 2, 50000.0, 1e-5
HEAD_DIM = HIDDEN // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED = ["57", "ĠĠ"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *MERGED]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
F32, Q8, Q4 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def reference(tied: bool) -> LlamaForCausalLM:
    """A Llama whose matrices Q8_0 and Q4_1 hold without loss: each block of 32 spans the whole integer range."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=tied,
    )
    model, random = LlamaForCausalLM(config).eval(), np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                values = random.uniform(0.5, 1.5, weight.shape).astype(np.float32)
            elif "down_proj" in name:  # Q4_1: minimum -1/2, scale 1/16
                steps = random.integers(0, 16, (*weight.shape[:-1], weight.shape[-1] // 32, 32))
                steps[..., 0], steps[..., 1] = 0, 15
                values = (steps / 16 - 0.5).reshape(weight.shape)
            else:  # Q8_0: scale 1/256
                steps = random.integers(-127, 128, (*weight.shape[:-1], weight.shape[-1] // 32, 32))
                steps[..., 0] = 127
                values = (steps / 256).reshape(weight.shape)
            weight.copy_(torch.tensor(values, dtype=torch.float32))
    return model


def neighbouring_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows: row 2i of a head is Hugging Face's row i, row 2i+1 its row i + d/2."""
    out, d = np.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for i in range(d // 2):
            out[head * d + 2 * i] = weight[head * d + i]
            out[head * d + 2 * i + 1] = weight[head * d + i + d // 2]
    return out


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = {
        "token_embd.weight": (state["model.embed_tokens.weight"], Q8),
        "output_norm.weight": (state["model.norm.weight"], F32),
    }
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = (state["lm_head.weight"], Q8)
    for layer in range(LAYERS):
        for name, short in LAYER_NAMES.items():
            weight = state[f"model.layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = neighbouring_pairs(weight, HEADS if short == "attn_q" else KV_HEADS)
            kind = F32 if weight.ndim == 1 else Q4 if short == "ffn_down" else Q8
            tensors[f"blk.{layer}.{short}.weight"] = (weight, kind)
    return tensors


def write(path, tensors, architecture: str = "llama", pre: str = "smollm"):
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in TOKENS])
    writer.add_token_merges(["5 7", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, (weight, kind) in tensors.items():
        writer.add_tensor(name, weight if kind == F32 else quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors():
    return gguf_tensors(reference(tied=True))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_config_and_logits_are_the_models(tmp_path, tied):
    model = reference(tied)
    gguf_to_hugging_face(write(tmp_path / "tiny.gguf", gguf_tensors(model)), tmp_path / "hf")

    weights = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {name: p.detach().numpy() for name, p in model.named_parameters()}  # the tied head appears once
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], value, err_msg=name)

    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    found = {key: config[key] for key in ("architectures", "tie_word_embeddings", "rms_norm_eps", "dtype", "head_dim")}
    assert found == {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "dtype": "float32",
        "head_dim": HEAD_DIM,
    }
    assert config["rope_parameters"]["rope_theta"] == THETA
    assert (config["num_key_value_heads"], config["max_position_embeddings"]) == (KV_HEADS, 512)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.arange(40).reshape(2, 20) * 5 % len(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert loaded.generation_config.eos_token_id == [2]


def test_the_command_proves_it_by_transformers_own_reading(ranks, tmp_path):
    source = write(tmp_path / "tiny.gguf", gguf_tensors(reference(tied=True)))
    ((code, words),) = ranks(1, commands, [(source, tmp_path / "hf")], timeout=120)[0]
    assert code == 0, words
    found = json.loads((tmp_path / "hf" / "conversion_report.json").read_text())
    assert found["verdict"] == "proved" and found["source"]["stored"]["stored as"] == {"Q8_0": 13, "Q4_1": 2, "F32": 5}
    assert found["logits"]["max_difference"] <= 1e-5 and found["logits"]["largest_logit"] > 0.5


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("smollm", ["ĠĠ", "5", "7", "<|im_end|>"]), ("gpt-2", ["Ġ", "Ġ", "57", "<|im_end|>"])],
)
def test_tokenizer_cuts_text_as_the_file_says(tmp_path, tensors, pre, pieces):
    gguf_to_hugging_face(write(tmp_path / "tiny.gguf", tensors, pre=pre), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("  57<|im_end|>")) == pieces
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    for text in ("héllo\n\n 日本 5  7", "<|im_start|>user\nit's<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "5"}], tokenize=False)
    assert chat == "<|im_start|>5<|im_end|>"


def test_refusals_name_the_cause_and_leave_nothing(tmp_path, tensors):
    def refused(source, *words):
        with pytest.raises(ConfigError) as caught:
            gguf_to_hugging_face(source, tmp_path / "hf" / "model")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert not any(tmp_path.glob("hf/*")) and not any(tmp_path.glob("hf/.*"))

    refused(tmp_path / "absent.gguf", "absent.gguf")
    refused(write(tmp_path / "other.gguf", tensors, architecture="gemma"), "gemma", "llama")
    refused(write(tmp_path / "pre.gguf", tensors, pre="llama-bpe"), "llama-bpe", "smollm")
    unknown = {**tensors, "blk.0.attn_q.bias": (np.zeros(HIDDEN, np.float32), F32)}
    refused(write(tmp_path / "unknown.gguf", unknown), "blk.0.attn_q.bias")
    missing = {name: value for name, value in tensors.items() if name != "blk.1.ffn_up.weight"}
    refused(write(tmp_path / "missing.gguf", missing), "model.layers.1.mlp.up_proj.weight")
    short = write(tmp_path / "short.gguf", tensors)
    short.write_bytes(short.read_bytes()[:-5000])
    refused(short, "not a whole GGUF file")
    short.write_bytes(short.read_bytes()[:3000])
    refused(short, "not a whole GGUF file")


def test_how_far_a_conversion_is(tmp_path, tensors):
    seen = []
    gguf_to_hugging_face(write(tmp_path / "tiny.gguf", tensors), tmp_path / "hf", lambda *far: seen.append(far))
    assert seen == [(n, len(tensors)) for n in range(1, len(tensors) + 1)]


def test_interrupted_conversion_leaves_no_folder(tmp_path, tensors, monkeypatch):
    source = write(tmp_path / "tiny.gguf", tensors)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "dequantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gguf_to_hugging_face(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]

    gguf_to_hugging_face(source, tmp_path / "hf")
    with pytest.raises(ConfigError, match="exists"):
        gguf_to_hugging_face(source, tmp_path / "hf")
