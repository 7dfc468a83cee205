from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from grpo_mega.data.packing import bundle_rows, bundles, pack, split
from grpo_mega.types import Sample

# prompt 11 12, completion 13 0: the sampled token 0 equals the padding's id
FIRST = Sample(
    order=0,
    group=0,
    prompt_tokens=2,
    token_ids=(11, 12, 13, 0),
    loss_mask=(False, False, True, True),
    sampler_logprobs=(0.0, 0.0, -0.25, -0.5),
    advantage=2.0,
    weight=0.5,
)
# prompt 21, completion 22 23
SECOND = Sample(
    order=1,
    group=1,
    prompt_tokens=1,
    token_ids=(21, 22, 23),
    loss_mask=(False, True, True),
    sampler_logprobs=(0.0, -1.0, -2.0),
    advantage=-1.0,
    weight=0.25,
)
# prompt 31, completion 32, which does not count
SILENT = Sample(
    order=2,
    group=2,
    prompt_tokens=1,
    token_ids=(31, 32),
    loss_mask=(False, False),
    sampler_logprobs=(0.0, -3.0),
    advantage=5.0,
    weight=0.0,
)
# FIRST's prompt once more: completion 14
THIRD = replace(
    FIRST,
    order=3,
    token_ids=(11, 12, 14),
    loss_mask=(False, False, True),
    sampler_logprobs=(0.0, 0.0, -4.0),
    weight=1.0,
)


def packed(samples, rows, scale=1.0, dtype=torch.float32):
    """Every sample in a bundle of its own."""
    return pack([[sample] for sample in samples], rows, scale=scale, dtype=dtype, device="cpu")


def test_two_samples_shifted_masked_and_padded():
    batch = packed([FIRST, SECOND], 7, scale=8.0)
    assert batch.input_ids.tolist() == [11, 12, 13, 21, 22, 0, 0]
    assert batch.targets.tolist() == [12, 13, 0, 22, 23, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert batch.segment_ids.tolist() == [0, 0, 0, 1, 1, -1, -1]
    assert batch.loss_weights.tolist() == [0.0, 4.0, 4.0, 2.0, 2.0, 0.0, 0.0]
    assert batch.advantages.tolist() == [0.0, 2.0, 2.0, -1.0, -1.0, 0.0, 0.0]
    assert batch.sampler_logprobs.tolist() == [0.0, -0.25, -0.5, -1.0, -2.0, 0.0, 0.0]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.prefixes, batch.rows) == ((-1, -1), 7)
    assert batch.old_logprobs is None and batch.ref_logprobs is None
    assert [bundle_rows([sample]) for sample in (FIRST, SECOND)] == [3, 2]


def test_completions_of_one_prompt_share_its_rows():
    batch = pack([[SECOND], [FIRST, THIRD]], 7, scale=2.0, dtype=torch.float32, device="cpu")
    # SECOND | the prompt but its last token | 12 13 of FIRST | 12 of THIRD | padding
    assert batch.input_ids.tolist() == [21, 22, 11, 12, 13, 12, 0]
    assert batch.targets.tolist() == [22, 23, 12, 13, 0, 14, 0]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 1, 0]
    assert batch.segment_ids.tolist() == [0, 0, 1, 2, 2, 3, -1]
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0.0, 1.0, 1.0, 2.0, 0.0]
    assert batch.sampler_logprobs.tolist() == [-1.0, -2.0, 0.0, -0.25, -0.5, -4.0, 0.0]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5, 6]
    assert batch.prefixes == (-1, -1, 1, 1)
    assert bundle_rows([FIRST, THIRD]) == 4


def test_a_prompt_of_one_token_has_nothing_to_share():
    batch = pack([[SECOND, replace(SECOND, order=4)]], 4, scale=1.0, dtype=torch.float32, device="cpu")
    assert batch.input_ids.tolist() == [21, 22, 21, 22] and batch.prefixes == (-1, -1)


def test_bundles_are_runs_of_one_group_within_the_capacity():
    assert bundles([FIRST, THIRD, SECOND], 4) == [[FIRST, THIRD], [SECOND]]
    assert bundles([FIRST, THIRD, SECOND], 3) == [[FIRST], [THIRD], [SECOND]]
    assert bundles([FIRST], 1) == [[FIRST]]  # too long for any: alone, never cut
    with pytest.raises(ValueError, match="samples 0 and 1 of one bundle have different prompts"):
        pack([[FIRST, SECOND]], 9, scale=1.0, dtype=torch.float32, device="cpu")


def test_dtypes():
    batch = packed([FIRST], 3, dtype=torch.float64)
    ids = (batch.input_ids, batch.targets, batch.position_ids, batch.segment_ids)
    assert {tensor.dtype for tensor in ids} == {torch.int64}
    assert {t.dtype for t in (batch.loss_weights, batch.advantages, batch.sampler_logprobs)} == {torch.float64}
    assert batch.cu_seqlens.dtype == torch.int32


def test_a_sampled_token_that_looks_like_padding_is_trained_on():
    batch = packed([FIRST], 5)
    assert batch.targets[2] == 0 and batch.loss_weights[2] == 0.5
    assert batch.targets[3:].tolist() == [0, 0] and batch.loss_weights[3:].tolist() == [0.0, 0.0]


def test_a_sample_that_does_not_count_is_read_and_not_trained_on():
    batch = packed([SILENT], 1)
    assert (batch.input_ids.tolist(), batch.targets.tolist()) == ([31], [32])
    assert batch.loss_weights.tolist() == batch.advantages.tolist() == batch.sampler_logprobs.tolist() == [0.0]


def test_loss_weights_are_rounded_once_from_float64():
    weight, scale = 1 / 3, 7 / 9
    sample = Sample(0, 0, 1, (1, 2), (False, True), (0.0, -1 / 3), 1 / 7, weight)
    exact = packed([sample], 1, scale, torch.float64)
    assert exact.loss_weights.item() == weight * scale
    assert exact.advantages.item() == 1 / 7 and exact.sampler_logprobs.item() == -1 / 3
    rounded = packed([sample], 1, scale).loss_weights
    assert rounded.item() == torch.tensor(weight * scale, dtype=torch.float64).float().item()


def test_a_microbatch_of_padding_alone():
    batch = packed([], 2)
    assert batch.segment_ids.tolist() == [-1, -1] and batch.loss_weights.tolist() == [0.0, 0.0]
    assert batch.cu_seqlens.tolist() == [0] and batch.prefixes == () and batch.rows == 2


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="segments of 5 rows do not fit into 4; nothing is ever cut"):
        packed([FIRST, SECOND], 4)
    for tokens, mask in (((1,), (False,)), ((1, 2), (True, True))):
        with pytest.raises(ValueError, match=f"sample 3 of {len(tokens)} tokens: nothing predicts its first trained"):
            packed([Sample(3, 0, 1, tokens, mask, (0.0,) * len(tokens), 1.0, 1.0)], 9)


def test_split_follows_global_positions_wherever_their_groups_are():
    # 6 prompts in 3 minibatches: positions 0 1 | 2 3 | 4 5
    assert split([5, 0, 3, 1], 6, 3) == [[1, 3], [2], [0]]
    assert split([4], 6, 3) == [[], [], [0]]
    assert split([2, 0, 1], 3, 1) == [[1, 2, 0]]
    # two ranks' shares together are the whole step's split
    whole, left, right = ([4, 1, 0, 3, 2, 5], [4, 1, 0], [3, 2, 5])
    for k in range(2):
        both = {left[i] for i in split(left, 6, 2)[k]} | {right[i] for i in split(right, 6, 2)[k]}
        assert both == {whole[i] for i in split(whole, 6, 2)[k]} == {3 * k, 3 * k + 1, 3 * k + 2}
    with pytest.raises(ValueError, match="6 prompts do not split into 4 equal minibatches"):
        split([0], 6, 4)
    for outside in (-1, 6):
        with pytest.raises(ValueError, match=f"position {outside} is outside the step's 6 prompts"):
            split([outside], 6, 3)
