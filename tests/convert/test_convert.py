"""`grpo-mega convert` between Hugging Face folders and GGUF: what is proved, and what is caught."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from converting import commands
from families import logits_of, make_family
from pieces import path_of
from safetensors.torch import load_file, save_file

UP, Q, K = "model.layers.1.mlp.up_proj.weight", *(f"model.layers.0.self_attn.{k}_proj.weight" for k in "qk")


@pytest.fixture
def convert(ranks):
    """Run one command on some ranks; the exit code and words of the first."""

    def run(*arguments, world=1):
        return ranks(world, commands, [arguments])[0][0]

    return run


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_report(folder):
    return json.loads((folder / "conversion_report.json").read_text())


# ---- what is proved


@pytest.mark.parametrize("world", [1, 2])
def test_another_dtype_on_one_process_or_two(convert, folder, tmp_path, world):
    code, words = convert(folder, tmp_path / "made", "--to", "huggingface", "--dtype", "bf16", world=world)
    assert code == 0 and "each was read once, written once as bfloat16" in words, words
    made, wanted = (load_file(path / "model.safetensors") for path in (tmp_path / "made", folder))
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name].bfloat16()) for name in wanted)
    found = read_report(tmp_path / "made")
    assert found["verdict"] == "proved" and found["destination"]["dtypes"] == ["bfloat16"]
    assert found["source"]["tensors"] == len(wanted) and found["source"]["architecture"] == "Qwen2ForCausalLM"
    for name, digest in found["digests"].items():
        assert digest == hashlib.sha256(made[name].view(torch.uint8).numpy().tobytes()).hexdigest()
    assert list(found["digests"]) and set(found["digests"]) == set(wanted)
    logits = found["logits"]
    difference = (logits_of(tmp_path / "made").float() - logits_of(folder)).abs().max().item()
    assert 0 < logits["max_difference"] < 3 * difference + 0.1 and logits["kl"] > 0 and logits["positions"] > 100
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "made" / name).read_bytes() == (folder / name).read_bytes()
    tokens = found["tokenizer"]
    assert (
        tokens["tokens"] == 259 and tokens["stop_token_ids"] == [258] and tokens["special_tokens"]["<|im_end|>"] == 258
    )
    assert tokens["chat_template_sha256"] and tokens["embedding_rows_without_a_token"] == 0
    assert not list(tmp_path.glob("*.partial"))


def test_a_sentencepiece_model_comes_along(convert, tmp_path):
    folder = make_family(tmp_path / "model", "llama", vocab_size=32003, num_hidden_layers=1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    shutil.copy2(path_of("v1"), folder / "tokenizer.model")
    code, words = convert(folder, tmp_path / "mega", "--to", "megatron", "--skip-logits")
    assert code == 0, words
    assert (tmp_path / "mega" / "tokenizer.model").read_bytes() == path_of("v1").read_bytes()
    found = read_report(tmp_path / "mega")
    assert found["tokenizer"]["files"] == ["tokenizer.model"] and found["tokenizer"]["special_tokens"]["</s>"] == 2
    assert found["tokenizer"]["tokens"] == 32000 and found["tokenizer"]["embedding_rows_without_a_token"] == 3
    assert (found["vocabulary_rows"], found["destination"]["vocabulary_rows"]) == (32003, 32128)  # 251 x 128
    shutil.copy2(path_of("v3"), folder / "tokenizer.model")
    code, words = convert(folder, tmp_path / "other", "--to", "megatron", "--skip-logits")
    assert (
        code == 3
        and "32768 tokens and the model's embedding 32003 rows: " in words
        and "and 760 more have none" in words
    )


def test_without_logits_the_report_says_so(convert, folder, tmp_path):
    code, words = convert(folder, tmp_path / "made", "--to", "huggingface", "--skip-logits")
    assert code == 0 and "logits were not compared: --skip-logits was given" in words
    found = read_report(tmp_path / "made")
    assert found["verdict"] == "tensors proved, logits not compared"
    assert found["logits"] == {"skipped": "--skip-logits was given"}


def test_a_source_that_predicts_nothing_is_pointed_at(convert, folder, tmp_path):
    _, words = convert(folder, tmp_path / "made", "--to", "huggingface")
    assert "warning: the source predicts plain text no better than chance" in words  # its weights are random


def in_8_bit_blocks(folder):
    """The folder's projections as float8_e4m3fn in blocks of 128 x 128 with scale_inv beside, as DeepSeek-V3's are."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))

    def change(tensors):
        for name in [name for name in tensors if "proj" in name]:
            scale = tensors[name].abs().max() / 448  # one block each: no dimension reaches 128
            tensors[name + "_scale_inv"] = scale.reshape(1, 1)
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)

    spoil(folder, change)


def test_8_bit_blocks_come_out_dequantised(convert, tmp_path):
    folder = make_family(tmp_path / "model", "deepseek_v3")
    plain = load_file(folder / "model.safetensors")
    in_8_bit_blocks(folder)
    code, words = convert(folder, tmp_path / "made", "--to", "huggingface")
    assert code == 0, words
    made, found = load_file(tmp_path / "made" / "model.safetensors"), read_report(tmp_path / "made")
    assert made.keys() == plain.keys() and found["source"]["stored"]["stored as"]["F8_E4M3"] == sum(
        "proj" in n for n in plain
    )
    for name, tensor in plain.items():
        assert made[name].dtype == (torch.bfloat16 if "proj" in name else torch.float32)
        assert (made[name].float() - tensor).abs().max() <= tensor.abs().max() / 16, name  # 4 bits of mantissa
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 0


# ---- what is caught


def truncated(tensors):
    tensors[UP] = tensors[UP][:-1].clone()


def renamed(tensors):
    tensors[UP.replace("up_proj", "upp_proj")] = tensors.pop(UP)


def shuffled(tensors):
    tensors[UP] = tensors[UP][torch.randperm(len(tensors[UP]), generator=torch.Generator().manual_seed(1))].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (truncated, f"{UP} has shape (71, 48), config.json says (72, 48)"),
        (renamed, f"lacks 1 tensors, the first is {UP}; fetch it again"),
        (shuffled, f"{UP} is not what was written there (its SHA-256 differs from the conversion report's)"),
    ],
)
def test_a_damaged_source_is_named(convert, folder, tmp_path, change, words):
    """The source is itself a conversion's destination, so that its report knows every tensor."""
    source = tmp_path / "source"
    assert convert(folder, source, "--to", "huggingface", "--skip-logits")[0] == 0
    spoil(source, change)
    code, found = convert(source, tmp_path / "made", "--to", "huggingface", "--skip-logits")
    assert code and words in found, found
    assert not list(tmp_path.glob("made*"))


def test_a_download_is_compared_with_its_publishers_digest(convert, folder, tmp_path):
    file = folder / "model.safetensors"
    note = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"a-revision\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n1700000000.0\n")
    assert convert(folder, tmp_path / "made", "--to", "huggingface", "--skip-logits")[0] == 0
    assert read_report(tmp_path / "made")["source"]["files_checked_against_their_download"] == 1
    spoil(folder, shuffled)
    code, words = convert(folder, tmp_path / "again", "--to", "huggingface", "--skip-logits")
    assert code and "model.safetensors has SHA-256" in words and "its publisher's has" in words
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shutil.rmtree(folder / ".cache")
    file.rename(blobs / hashlib.sha256(b"another").hexdigest())
    file.symlink_to(next(blobs.iterdir()))  # as a hub's cache keeps it
    code, words = convert(folder, tmp_path / "again", "--to", "huggingface", "--skip-logits")
    assert code and "its publisher's has" in words


def swapped(several):
    """Commands under a table that takes query rows for key rows (of equal number in this model)."""
    from unittest.mock import patch

    from grpo_mega.convert import main, write
    from grpo_mega.convert.source import Source

    read = Source.read

    def wrong(self, name, *where):
        return read(self, {Q: K, K: Q}.get(name, name), *where)

    with patch.object(Source, "read", wrong), patch.object(main, "read_back", lambda *_: {}):
        assert write.read_back
        return commands(several)


def test_a_wrong_table_is_refused_by_the_logits(ranks, tmp_path):
    """Exit code 1, nothing under the name, and the report as its reader sees it."""
    source = make_family(tmp_path / "model", "qwen2-tied")
    ((code, words),) = ranks(1, swapped, [(source, tmp_path / "made", "--to", "huggingface")])[0]
    assert code == 1 and not (tmp_path / "made").exists()
    assert "refused: the max difference of logits is" in words and "Nothing was published" in words
    found = read_report(tmp_path / "made.refused")
    assert found["verdict"] == "refused: logits differ" and not found["logits"]["passes"]
    assert found["logits"]["max_difference"] > 100 * found["logits"]["bound"]


def altered(several):
    """Commands whose writing loses a bit."""
    from unittest.mock import patch

    from grpo_mega.model.formats.hugging_face import Writer

    put = Writer.put

    def wrong(self, name, value):
        if name == UP:
            value = value.clone()
            value[3, 4] += 1e-6
        put(self, name, value)

    with patch.object(Writer, "put", wrong):
        return commands(several)


def test_what_comes_out_otherwise_is_named(ranks, folder, tmp_path):
    ((code, words),) = ranks(1, altered, [(folder, tmp_path / "made", "--to", "huggingface", "--skip-logits")])[0]
    assert code == 5 and f"{UP} came out otherwise than it went in" in words and "bytes of 3456 numbers differ" in words
    assert not list(tmp_path.glob("made*"))


# ---- bad input


def test_mistakes_are_one_sentence(convert, folder, tmp_path, monkeypatch):
    def refused(*arguments):
        code, words = convert(*arguments)
        assert code in (2, 3) and len(words.strip().splitlines()) == 1, words
        return words

    made = tmp_path / "made"
    assert "does not exist; give a Hugging Face folder" in refused(tmp_path / "absent", made)
    made.mkdir()
    assert "exists; give another destination, or --overwrite" in refused(folder, made)
    assert "is the source, or the source lies in it" in refused(folder, tmp_path, "--overwrite")
    made.rmdir()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "is a file and not a .gguf" in refused(tmp_path / "pytorch_model.bin", made)
    assert "--tensor=0 is no number of ranks" in refused(folder, made, "--tensor", "0")
    words = refused(folder, made, "--tensor", "5")
    assert "--tensor=5 does not divide the model's 6 attention heads" in words and "use tensor in [1, 2, 6]" in words
    words = refused(folder, made, "--expert", "2")
    assert "--expert=2 divides experts, and" in words
    assert "--config" in refused(folder, made, "--config", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "supported: LlamaForCausalLM, " in refused(folder, made)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    words = refused(folder, made)
    assert "ties the output layer to the embedding" in words and "holds other numbers" in words
    (folder / "config.json").write_text(json.dumps(config))
    spoil(folder, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))
    assert f"{UP} is of type I8; supported: F64, F32" in refused(folder, made)
    assert not made.exists()


def test_a_tokenizer_of_more_tokens_than_rows(convert, tmp_path):
    folder = make_family(tmp_path / "model", "llama", vocab_size=257)
    code, words = convert(folder, tmp_path / "made", "--to", "huggingface")
    assert code == 3 and "'<|im_start|>' (257), '<|im_end|>' (258) have none; use the tokenizer" in words


def full_disk(several):
    from unittest.mock import patch

    from grpo_mega.convert import write

    with patch.object(write.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})):
        return commands(several)


def interrupted(several):
    from unittest.mock import patch

    from grpo_mega.model.formats.hugging_face import Writer

    put = Writer.put

    def stop(self, name, value):
        if name == UP:
            raise KeyboardInterrupt
        put(self, name, value)

    with patch.object(Writer, "put", stop):
        return commands(several)


def test_too_little_disk_and_interruptions_leave_nothing(ranks, folder, tmp_path):
    ((code, words),) = ranks(1, full_disk, [(folder, tmp_path / "made", "--to", "huggingface", "--skip-logits")])[0]
    assert code == 2 and "GB free; make room, or give another destination" in words
    ((code, _),) = ranks(1, interrupted, [(folder, tmp_path / "made", "--to", "huggingface", "--skip-logits")])[0]
    assert code == 130 and not list(tmp_path.glob("made*"))
