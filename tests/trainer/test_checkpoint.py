"""Checkpoints: what one layout saves another loads, a resumed run is the run, and damage is told in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import psutil
import pytest
import ranks as pool
import tiny
import torch
import torch.distributed as dist
from assembled import assembled
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_mega.config import load_recipe, validate_recipe
from grpo_mega.errors import CheckpointError, ConfigError, RunDirectoryError
from grpo_mega.model import bridge
from grpo_mega.model.architecture import padded_vocab_size
from grpo_mega.parallel import mesh
from grpo_mega.trainer import checkpoint, collect, loop, main
from grpo_mega.trainer.progress import Progress
from grpo_mega.trainer.setup import build_run, read_inputs


def length(text, answer, row):
    return len(text) % 3


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A recipe's sections but for parallel and run."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = {"num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
    model = tiny.make_model(folder / "model", num_key_value_heads=2, **shape)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 6)))
    return {
        "model": {"path": str(model)},
        "data": {"jsonl": str(data), "heldout": 0},
        "reward": {"function": f"{__name__}:length"},
        "sampling": {"max_completion_tokens": 5},
        "grpo": {"group_size": 3},
        "batch": {"prompts_per_step": 3},
        "optimizer": {"lr": 0.01, "warmup_steps": 3, "weight_decay": 0.1},
    }


def with_run(tree, directory, steps, *, save_every=0, **parallel):
    run = {"directory": str(directory), "num_steps": steps, "save_every": save_every}
    return tree | {"parallel": parallel, "run": run}


# ---- on the ranks


def built(tree):
    recipe = validate_recipe(tree)
    inputs = read_inputs(recipe, mesh.world_size_from_environment())
    grid = mesh.initialize(**recipe.parallel.sizes)
    return build_run(recipe, inputs, grid, Progress(None))


def contents(run, scratch):
    """{"weight", "exp_avg", "exp_avg_sq": tensors by name}, the optimizer's step and what the schedule says next."""
    where = (run.policy.model, run.inputs.arch, run.mesh, run.inputs.layers)
    optimizers = getattr(run.policy.optimizer, "chained_optimizers", [run.policy.optimizer])
    states = {p: state for optimizer in optimizers for p, state in optimizer.optimizer.state.items()}
    result = {"weight": assembled(*where, lambda parameter: parameter, scratch / "weight")}
    for name in ("exp_avg", "exp_avg_sq"):
        result[name] = assembled(*where, lambda parameter, name=name: states[parameter][name], scratch / name)
    steps = {int(state["step"]) for state in states.values()}
    run.policy.begin_step()
    return result, steps, run.policy.learning_rate


def train_and_save(tree, scratch):
    run = built(tree)
    if run.mesh.is_writer:
        run.inputs.directory.open(1)
    loop.train(run)
    left = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not any("spawn_main" in words for words in left), left  # a rank that fails later would leave it behind
    return contents(run, scratch)


def load_latest(tree, scratch):
    run = built(tree)
    start = main.resume(run)
    return contents(run, scratch), start, run.inputs.prompts.state()


def load_and_fail(tree, directories):
    """The error's text for each directory of checkpoints, loaded one after the other."""
    run, messages = built(tree), []
    for directory in directories:
        try:
            checkpoint.load(checkpoint.latest(directory), run.policy)
            messages.append("it was loaded")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def train_whole(tree, fail_in_step=None):
    """The whole command on this rank; with `fail_in_step` it dies in that step, once completions are sampled."""
    real = collect._round

    def interrupted(run, step, count):
        groups = real(run, step, count)
        if step + 1 == fail_in_step:
            raise KeyboardInterrupt
        return groups

    with mock.patch.object(collect, "_round", interrupted):
        try:
            main.train(validate_recipe(tree))
        except KeyboardInterrupt:
            return "interrupted"
    return "done"


def save_on_a_full_disk(tree, unwritable):
    """What a save says whose files `unwritable` meet a full disk, and what it leaves."""
    run = built(tree)
    real = checkpoint.dist_checkpointing.save

    def save(state, partial):
        if run.mesh.is_writer:
            for name in unwritable:
                Path(partial, name).symlink_to("/dev/full")
        dist.barrier()
        real(state, partial)

    with mock.patch.object(checkpoint.dist_checkpointing, "save", save):
        try:
            checkpoint.save(run.inputs.directory.checkpoints, 1, run.policy, {}, run.mesh, run.inputs.arch)
        except RunDirectoryError as error:
            return str(error)


# ---- the tests


@pytest.fixture(scope="module")
def saved(tree, tmp_path_factory):
    """The run directory of three steps at tensor 2, and what was in it."""
    folder = tmp_path_factory.mktemp("saved")
    return folder / "run", pool.ranks(2, train_and_save, with_run(tree, folder / "run", 3, tensor=2), folder)[0]


INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
MOVES = [({"tensor": 2}, layout) for layout in ({"tensor": 2}, {"pipeline": 2}, INTERLEAVED, {})]


@pytest.mark.parametrize(("first", "parallel"), [*MOVES, (INTERLEAVED, {"tensor": 2})], ids=str)
def test_another_layout_loads_every_number(ranks, tree, saved, tmp_path, first, parallel):
    directory, (before, steps, rate) = saved
    if first == INTERLEAVED:
        directory = tmp_path / "run"
        before, steps, rate = ranks(2, train_and_save, with_run(tree, directory, 3, **first), tmp_path / "first")[0]
    assert steps == {3}
    again = with_run(tree, directory, 3, **parallel)
    (after, loaded_steps, loaded_rate), start, prompts = ranks(2 if parallel else 1, load_latest, again, tmp_path)[0]
    for kind, tensors in before.items():
        assert tensors.keys() == after[kind].keys()
        for name, tensor in tensors.items():
            assert tensor.equal(after[kind][name]), f"{kind} of {name}"
            assert tensor.abs().sum() > 0
    assert (loaded_steps, loaded_rate, start, prompts["cursor"]) == (steps, rate, 3, 9)


def remove(name):
    return lambda step: (step / name).unlink()


def keep(share, pattern):
    """Cut files to a share of their length."""

    def damage(step):
        for file in step.glob(pattern):
            file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return damage


DAMAGE = {  # what the sentence must name -> how
    "lacks metadata.json": remove("metadata.json"),
    "lacks .metadata": remove(".metadata"),
    "__1_0.distcp": remove("__1_0.distcp"),
    "EOFError": keep(0.5, "__1_*.distcp"),
    "pickle data was truncated": keep(0.5, ".metadata"),
    "JSONDecodeError": keep(0.5, "trainer.json"),
    "KeyError: 'scheduler'": lambda step: (step / "trainer.json").write_text("{}"),
    "names the checkpoint 'step_3', which is not there; delete it": shutil.rmtree,
    "names the checkpoint 'step_9', which is not there; write step_3 in it": lambda step: (
        step.parent / "latest"
    ).write_text("step_9\n"),
}


def by_newer_megatron(step):
    (step / "common.pt").unlink()
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


if "common.pt" in checkpoint._FILES:  # of megatron-core 0.16.1; 0.19.2 keeps what was in it in a shard
    DAMAGE |= {
        "lacks common.pt": remove("common.pt"),
        "zip archive": keep(0.5, "common.pt"),
        "a newer megatron-core wrote; go on with that one (Python 3.12), or delete it": by_newer_megatron,
    }


def test_damage_is_one_sentence_on_every_rank(ranks, tree, saved, tmp_path):
    folders = []
    for number, damage in enumerate(DAMAGE.values()):
        folders.append(tmp_path / str(number))
        shutil.copytree(saved[0] / "checkpoints", folders[-1])
        damage(folders[-1] / "step_3")
    answers = ranks(2, load_and_fail, with_run(tree, tmp_path / "new", 3, pipeline=2), folders)
    for words, folder, *messages in zip(DAMAGE, folders, *answers, strict=True):
        for message in messages:
            assert words in message and str(folder) in message, message
            assert len(message.splitlines()) == 1 and len(message) < 250 + 3 * len(str(folder)), message


def resume_and_fail(tree):
    try:
        return main.resume(built(tree))
    except CheckpointError as error:
        return str(error)


def test_a_wrong_pointer_ends_every_rank_alike(ranks, tree, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_9\n")
    said = (
        f"{tmp_path}/checkpoints/latest names the checkpoint 'step_9', which is not there; delete it to begin at step 0"
    )
    assert ranks(2, resume_and_fail, with_run(tree, tmp_path, 3, pipeline=2)) == [said] * 2


@pytest.mark.parametrize("unwritable", [["__1_0.distcp", "__1_1.distcp"], ["trainer.json"]])
def test_a_full_disk_is_one_sentence_on_every_rank(ranks, tree, tmp_path, unwritable):
    answers = ranks(2, save_on_a_full_disk, with_run(tree, tmp_path, 3, pipeline=2), unwritable)
    folder = tmp_path / "checkpoints"
    reason = "No space left on device"
    if "common.pt" not in checkpoint._FILES and unwritable != ["trainer.json"]:  # megatron-core 0.19.2 logs it
        reason = "megatron's line 'Local worker ... encountered an error' has the reason"
    sentence = f"{folder} can be written no more ({reason}); the run stops: free space, "
    assert all(answer is not None and answer.startswith(sentence) for answer in answers), answers
    assert [path.name for path in folder.iterdir() if path.suffix != ".partial"] == []


def test_checkpoint_of_another_model(ranks, tree, saved, tmp_path):
    shape = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    other = tree | {"model": {"path": str(tiny.make_model(tmp_path / "wider", **shape))}}
    for (message,) in ranks(2, load_and_fail, with_run(other, tmp_path / "new", 3), [saved[0] / "checkpoints"]):
        print(message)
        assert "is damaged or of another model" in message and len(message.splitlines()) == 1


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def lines_and_weights(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(directory / "hf" / "model.safetensors")


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.8, "pipeline": 1}], ids=str)
def test_an_interrupted_run_goes_on_bit_for_bit(ranks, tree, tmp_path, sampling):
    """It dies in step 4, two steps of which one is recorded after the last checkpoint, and goes on from step 2.

    The second draws from nuclei, on replicas that hold a copy of the weights: what is resumed must reach the copy.
    """
    tree = tree | {"sampling": tree["sampling"] | sampling}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert ranks(2, train_whole, with_run(tree, straight, 5, pipeline=2)) == ["done"] * 2
    again = with_run(tree, resumed, 5, save_every=2, pipeline=2)
    assert ranks(2, train_whole, again, 4) == ["interrupted"] * 2
    assert [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert ranks(2, train_whole, again) == ["done"] * 2
    lines, weights = lines_and_weights(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for name in ("metrics.jsonl", *(f"rollouts/step_{step:06d}.parquet" for step in range(1, 6))):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name  # no time, no place is in them
    events = EventAccumulator(str(resumed / "tensorboard" / "training")).Reload()
    assert [event.step for event in events.Scalars("metrics/loss")] == [1, 2, 3, 4, 5]
    assert all(weight.equal(lines_and_weights(resumed)[1][name]) for name, weight in weights.items())
    assert len({line["lr"] for line in lines}) == 3  # the schedule went on too: it warms up for three steps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_distributed_optimizer_is_the_optimizer_and_goes_on_bit_for_bit(ranks, tree, tmp_path, dtype):
    """Its checkpoint resumes at data 2 bit for bit, and at pipeline 2 like the plain optimizer's."""

    def with_optimizer(name, steps, distributed, **options):
        optimizer = tree["optimizer"] | {"distributed": distributed}
        changed = tree | {"precision": {"dtype": dtype}, "optimizer": optimizer}
        return with_run(changed, tmp_path / name, steps, **options)

    for name, distributed in (("plain", False), ("straight", True)):
        assert ranks(2, train_whole, with_optimizer(name, 5, distributed)) == ["done"] * 2
    plain, straight = (lines_and_weights(tmp_path / name) for name in ("plain", "straight"))
    for ours, theirs in zip(straight[0], plain[0], strict=True):
        if dtype == "fp32":  # a mean of rounding errors, some 2e-7: two runs have no such error in common
            assert max(ours["sampler_mismatch"], theirs["sampler_mismatch"]) < 1e-6
            theirs = theirs | {"sampler_mismatch": ours["sampler_mismatch"]}
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    again = with_optimizer("resumed", 5, True, save_every=2)
    assert ranks(2, train_whole, again, 4) == ["interrupted"] * 2
    shutil.copytree(tmp_path / "resumed", tmp_path / "moved")
    assert ranks(2, train_whole, again) == ["done"] * 2
    lines, weights = lines_and_weights(tmp_path / "resumed")
    assert lines == straight[0]
    assert all(weight.equal(straight[1][name]) for name, weight in weights.items())
    assert all(
        str(weight.dtype).endswith({"fp32": "float32", "bf16": "bfloat16"}[dtype]) for weight in weights.values()
    )
    moved = with_optimizer("moved", 5, True, save_every=2, pipeline=2)
    assert ranks(2, train_whole, moved) == ["done"] * 2
    tolerance = {"fp32": 1e-4, "bf16": 0.2}[dtype]  # bf16 rounds its activations where the layout says
    for ours, theirs in zip(lines_and_weights(tmp_path / "moved")[0], straight[0], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance)
        assert ours["reward"] == theirs["reward"] or dtype == "bf16"


def main_weights(tree):
    """Of each parameter: is its main weight here the folder's number, is that more than bf16 holds, its size."""
    run = built(tree)
    fine = bridge.tensors(
        run.policy.model, run.inputs.arch, bridge.Place.of(run.mesh, run.inputs.layers), torch.float32
    )
    found = []
    for parameter, value in fine:
        main, owner = parameter.main_param, run.policy.optimizer
        if main is None:
            continue
        if getattr(parameter, "main_param_sharded", False):
            owner = getattr(owner, "chained_optimizers", [owner])[0]
            mine = owner._get_model_param_range_map(parameter)["param"]
            value = value.flatten()[mine.start : mine.end]
        found.append((main.equal(value), not value.equal(value.bfloat16().float()), main.numel()))
    return found


@pytest.mark.parametrize(
    ("parallel", "distributed"), [({"tensor": 2}, False), ({"pipeline": 2}, False), ({}, True)], ids=str
)
def test_bf16s_main_weights_start_where_the_folder_has_them(ranks, tree, tmp_path, parallel, distributed):
    """Not at its weights rounded to bf16, from which small updates do not show."""
    optimizer = tree["optimizer"] | {"distributed": distributed}
    tree = with_run(tree | {"precision": {"dtype": "bf16"}, "optimizer": optimizer}, tmp_path / "run", 3, **parallel)
    by_rank = ranks(2, main_weights, tree)
    assert all(same for found in by_rank for same, _, _ in found)
    assert all(any(finer for _, finer, _ in found) for found in by_rank)
    if distributed:  # the ranks' parts are the whole, once
        weights = load_file(Path(tree["model"]["path"]) / "model.safetensors")
        padding = (padded_vocab_size(tiny.VOCABULARY, 1) - tiny.VOCABULARY) * 16
        assert sum(n for found in by_rank for _, _, n in found) == sum(w.numel() for w in weights.values()) + padding


def test_phases_have_a_precision_of_their_own(ranks, tree, tmp_path):
    """bf16 rounds what was sampled from, and the reference (0 nats away at step 1 in float32); the policy stays."""
    for name in ("sampling", "reference"):
        changed = with_run(tree | {"precision": {name: "bf16"}}, tmp_path / name, 3)
        assert ranks(1, train_whole, changed) == ["done"]
    (sampling, weights), (reference, _) = (lines_and_weights(tmp_path / name) for name in ("sampling", "reference"))
    assert 1e-4 < sampling[0]["sampler_mismatch"] < 0.1 and sampling[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert reference[0]["sampler_mismatch"] < 1e-4 and 1e-9 < reference[0]["kl"] < 0.1
    assert all(str(weight.dtype) == "torch.float32" for weight in weights.values())


def test_a_run_may_go_on_at_another_layout(ranks, tree, tmp_path):
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    assert ranks(1, train_whole, with_run(tree, straight, 5)) == ["done"]
    assert ranks(2, train_whole, with_run(tree, moved, 3, pipeline=2)) == ["done"] * 2
    assert ranks(2, train_whole, with_run(tree, moved, 5, tensor=1)) == ["done"] * 2  # data parallel
    for ours, theirs in zip(lines_and_weights(moved)[0], lines_and_weights(straight)[0], strict=True):
        assert ours["reward"] == theirs["reward"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_other_settings_are_refused(tree, saved):
    changed = with_run(tree | {"grpo": {"group_size": 4}}, saved[0], 3)
    with pytest.raises(ConfigError, match=r"holds a run with grpo\.group_size=3, this recipe says 4; "):
        read_inputs(validate_recipe(changed), 1)
    # what says how long and where, not what is computed, may change; and the recipe that was kept is the recipe
    read_inputs(validate_recipe(with_run(tree, saved[0], 9, save_every=5, pipeline=2)), 2)
    assert load_recipe(saved[0] / "recipe.yaml") == validate_recipe(with_run(tree, saved[0], 3, tensor=2))
