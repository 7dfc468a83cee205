"""Weights that wait in host memory: the same bits in the same objects, and nothing on the device meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grpo_mega.model.offload import HostWeights


class Odd(nn.Module):
    """Tied parameters, two views of one storage with a gap between them, a buffer, bf16, a weight of no elements."""

    def __init__(self):
        super().__init__()
        whole = torch.arange(20.0)
        self.first, self.second = nn.Parameter(whole[2:8].view(2, 3)), nn.Parameter(whole[11:17].view(3, 2).t())
        self.tied = self.first
        self.narrow = nn.Parameter(torch.full((3,), 1.5, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.register_buffer("counts", torch.tensor([4, 5]))


def bytes_of(model):
    return sum(weight.untyped_storage().nbytes() for weight in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_weights_come_as_they_went_and_go_again(device):
    model, same = Odd().to(device), Odd().to(device)
    before = dict(model.named_parameters(remove_duplicate=False))
    host = HostWeights(model)
    assert bytes_of(model) == 0 and model.first.shape == (2, 3)
    for _ in range(2):
        with host.on_device():
            for weight, wanted in zip(model.state_dict().values(), same.state_dict().values(), strict=True):
                assert weight.equal(wanted) and weight.stride() == wanted.stride()
            shared = model.first.untyped_storage().data_ptr() == model.second.untyped_storage().data_ptr()
            assert shared == (device == "cpu")  # Module.to has copied them apart
        assert bytes_of(model) == 0
    assert all(before[name] is weight for name, weight in model.named_parameters(remove_duplicate=False))
    assert model.tied is model.first


def test_a_failed_use_leaves_nothing_behind():
    model = Odd()
    host = HostWeights(model)
    with pytest.raises(ZeroDivisionError), host.on_device():
        assert bytes_of(model) > 0
        raise ZeroDivisionError
    assert bytes_of(model) == 0
