"""The stand-in for torch.cuda: what it answers, that it changes no number, and that it can be left.

It stays in a process for ever, so only workers install it.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch

from grpo_mega.errors import ConfigError
from grpo_mega.parallel import cpu


@pytest.mark.parametrize("found", ["0.15.3", "0.16.0", "0.18.2", "0.16.10", "0.19.20"])
def test_a_version_that_was_not_checked_is_refused(monkeypatch, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"megatron-core": found}[name])
    monkeypatch.setattr(cpu, "_installed", None)
    ours = r"0\.16\.1 \(Python .* or 0\.19\.2 \(Python 3\.12\), or .* GPU"
    pattern = rf"megatron-core {found} .* install megatron-core {ours}"
    with pytest.raises(ConfigError, match=pattern):
        cpu.install()
    assert cpu._installed is None and torch.cuda.current_device.__module__ == "torch.cuda"


def test_the_installed_version_is_checked():
    cpu.check_version()  # raises for any other
    assert importlib.metadata.version("megatron-core") in cpu.CHECKED_VERSIONS


def test_what_is_checked_is_what_the_tests_run_with():
    requirements = Path(__file__).resolve().parents[2] / "requirements.txt"
    pinned = re.findall(r"^megatron-core==([\d.]+);", requirements.read_text(), re.MULTILINE)
    assert sorted(pinned) == sorted(cpu.CHECKED_VERSIONS)


def habits():
    """megatron-core's habits, each with where its tensor landed or what it was told."""
    cpu.install()
    first = torch.cuda.current_device
    cpu.install()  # does nothing
    x = torch.arange(3.0)
    landed = {
        "keyword": torch.zeros(2, dtype=torch.int, device="cuda"),
        "index": torch.tensor([1.0], device="cuda:0"),
        "device": torch.empty(2, device=torch.device("cuda", 1)),
        "like": torch.ones_like(x, device="cuda"),
        "current": torch.zeros(1, device=torch.cuda.current_device()),
        "to": x.to("cuda"),
        "to device": x.to(torch.device("cuda")),
        "to keyword": x.to(device="cuda", dtype=torch.float64),
        "to both": x.to("cuda", torch.bfloat16),
        "cuda": x.cuda(),
        "new": x.new_zeros(2, device="cuda"),
        "parameter": torch.nn.Linear(2, 2, device="cuda").weight,
    }
    types = [torch.zeros(1, dtype=d).type() for d in (torch.float32, torch.bfloat16, torch.float64, torch.int64)]
    state = torch.cuda.get_rng_state()
    before = torch.rand(2)
    torch.cuda.set_rng_state(state)
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.current_stream().record_event()
        torch.cuda.current_stream().wait_event(event)
        torch.cuda.synchronize()
    return {
        "devices": {name: tensor.device.type for name, tensor in landed.items()},
        "dtypes": [landed[name].dtype for name in ("keyword", "to keyword", "to both")],
        "same tensor": x.cuda() is x and x.to("cuda").data_ptr() == x.data_ptr(),
        "types": types,
        "typed": x.type(torch.float64).dtype,
        "random": torch.equal(before, torch.rand(2)),
        "installed once": torch.cuda.current_device is first,
    }


def test_what_is_meant_for_cuda_lands_on_the_cpu(ranks):
    (found,) = ranks(1, habits)
    assert set(found["devices"].values()) == {"cpu"} and len(found["devices"]) == 12
    assert found["dtypes"] == [torch.int, torch.float64, torch.bfloat16]
    assert found["types"] == [f"torch.cuda.{kind}Tensor" for kind in ("Float", "BFloat16", "Double", "Long")]
    assert found["typed"] == torch.float64  # with an argument, type() converts as ever
    assert found["same tensor"] and found["random"] and found["installed once"]


def test_without_it_a_cuda_tensor_is_an_error():
    assert cpu._installed is None  # in this process
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with cpu.suspended():
        assert torch.zeros(1).type() == "torch.FloatTensor"


def counted_calls():
    """Operators that reached the mode: inside `suspended`, after it, and after an exception in it."""
    cpu.install()
    calls = []
    inner = cpu.CudaOnCpu.__torch_function__

    def counting(self, func, types, args=(), kwargs=None):
        calls.append(func)
        return inner(self, func, types, args, kwargs)

    cpu.CudaOnCpu.__torch_function__ = counting
    try:
        x = torch.ones(3)
        with cpu.suspended():
            calls.clear()
            value = (x * 2 + x).sum()
            inside, kind = len(calls), x.type()
            refused = False
            try:
                torch.zeros(1, device="cuda")
            except (RuntimeError, AssertionError):
                refused = True
        try:
            with cpu.suspended():
                raise ArithmeticError
        except ArithmeticError:
            calls.clear()
        value = value + (x * 2).sum()
        return inside, kind, refused, len(calls) > 0, x.type(), float(value)
    finally:
        cpu.CudaOnCpu.__torch_function__ = inner


def test_suspended_leaves_the_mode_and_comes_back(ranks):
    assert ranks(1, counted_calls) == [(0, "torch.FloatTensor", True, True, "torch.cuda.FloatTensor", 15.0)]
