"""Names say layouts, and the tables hold what they should."""

from __future__ import annotations

import pytest

from grpo_mega.errors import ConfigError
from grpo_mega.selftest.cases import BRIEF, MORE, cases, parse


def test_a_name_by_hand():
    case = parse("moe-tp2-sp-pp4-vpp2-cp2-dp3-ep2-etp1-full-dist-overlap-rows64-mini2-mu3-token-ref=tp4+sp")
    assert case.parallel == {
        "tensor": 2, "sequence": True, "pipeline": 4, "virtual_pipeline": 2, "context": 2, "expert": 2,
        "expert_tensor": 1, "overlap": True,
    }  # fmt: skip
    assert (case.data, case.world, case.rows, case.recompute, case.distributed) == (3, 48, 64, "full", True)
    assert case.reference == {"tensor": 4, "sequence": True}
    assert case.problem == ("moe", "token", 2, 3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tp2-foo", "--layouts tp2-foo: 'foo' says nothing; known: "),
        ("tp0", "--layouts tp0: 'tp0' says nothing; "),
        ("tp2-selectiv", "'selectiv' says nothing; did you mean 'selective'?"),
        (
            "tp2-ref=vpp2",
            "--layouts tp2-ref=vpp2: a reference has tpN, ppN, cpN, epN, etpN and sp; drop the rest of ref=vpp2",
        ),
    ],
)
def test_a_name_that_says_nothing(name, sentence):
    with pytest.raises(ConfigError) as caught:
        parse(name)
    assert sentence in str(caught.value)


def test_the_tables_hold_each_world_and_what_was_promised():
    everything = {name for table in (BRIEF, MORE) for names in table.values() for name in names.split()}
    for table in (BRIEF, MORE):
        for world, names in table.items():
            assert all(parse(name).world == world for name in names.split())
    assert len(cases(None, everything=True)) == len(everything)
    promised = """
        tp2 tp4 pp2 pp4 pp2-vpp2 dp2 dp4-dist cp2 cp4 tp2-sp tp2-sp-cp2-dp2 tp2-cp2-dp2 pp2-vpp2-dp4-rows32 full single
        moe-dp2-ep2 moe-tp2-sp-dp2-ep2 rows32 rows64 tp2-pp2-sp-ref=tp4 dp2-mini2-mu2 dp2-token dp2-group_token
        dp2-constant
    """
    assert set(promised.split()) <= everything
    assert {world for case in cases(None, everything=False) for world in [case.world]} == {1, 2, 4}
    assert [case.name for case in cases(["pp4", "tp2"], everything=False)] == ["tp2", "pp4"]
