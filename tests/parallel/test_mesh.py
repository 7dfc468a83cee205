"""Coordinates and groups of the mesh: tensor fastest, then data, then pipeline, as megatron numbers them."""

from __future__ import annotations

import gc
import os
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from ranks import RankError

from grpo_mega.errors import ConfigError
from grpo_mega.parallel import collectives
from grpo_mega.parallel.mesh import Axis, Mesh, another_layout, check_world, initialize, shutdown, temporary_groups

AXES = ("world", "tensor", "pipeline", "data", "replica", "tokens")


def coordinates(tensor, pipeline):
    """{axis: (rank, size, members, sum of the members' ranks as the group itself adds them)} and the rank's roles."""
    mesh = initialize(tensor, pipeline)
    found = {}
    for name in AXES:
        axis = getattr(mesh, name)
        assert (axis.first, axis.last) == (axis.rank == 0, axis.rank == axis.size - 1)
        members = dist.get_process_group_ranks(axis.group)
        found[name] = (axis.rank, axis.size, members, collectives.sum_int(mesh.rank, axis.group))
    roles = (mesh.rank, mesh.is_writer, mesh.leads_replica, str(mesh.device), mesh.tokens.group is mesh.pipeline.group)
    shutdown()
    return found, roles, dist.is_initialized()


LAYOUTS = {  # (tensor, pipeline, world): axis -> groups
    (2, 2, 4): {
        "tensor": [[0, 1], [2, 3]],
        "pipeline": [[0, 2], [1, 3]],
        "data": [[0], [1], [2], [3]],
        "replica": [[0, 1, 2, 3]],
    },
    (2, 1, 4): {
        "tensor": [[0, 1], [2, 3]],
        "pipeline": [[0], [1], [2], [3]],
        "data": [[0, 2], [1, 3]],
        "replica": [[0, 1], [2, 3]],
    },
    (1, 2, 4): {
        "tensor": [[0], [1], [2], [3]],
        "pipeline": [[0, 2], [1, 3]],
        "data": [[0, 1], [2, 3]],
        "replica": [[0, 2], [1, 3]],
    },
    (1, 1, 2): {"tensor": [[0], [1]], "pipeline": [[0], [1]], "data": [[0, 1]], "replica": [[0], [1]]},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_and_groups(ranks, layout):
    tensor, pipeline, world = layout
    wanted = LAYOUTS[layout] | {"world": [list(range(world))], "tokens": LAYOUTS[layout]["pipeline"]}
    for rank, (found, roles, alive) in enumerate(ranks(world, coordinates, tensor, pipeline)):
        for axis, groups in wanted.items():
            (mine,) = [group for group in groups if rank in group]
            assert found[axis] == (mine.index(rank), len(mine), mine, sum(mine)), (axis, rank)
        leads = any(rank == group[0] for group in wanted["replica"])
        assert roles == (rank, rank == 0, leads, "cpu", False) and not alive


def expert_groups(cuts):
    """For each cut: members of the expert, expert_tensor and experts groups, the sizes of holders and in_step."""
    from megatron.core import parallel_state

    found = []
    for sizes in cuts:
        parallel_state.destroy_model_parallel()
        mesh = initialize(**sizes)
        members = [dist.get_process_group_ranks(axis.group) for axis in (mesh.expert, mesh.expert_tensor, mesh.experts)]
        found.append((*members, mesh.holders.size, mesh.in_step.size))
    return found


def test_experts_have_a_grid_of_their_own_over_a_stages_ranks(ranks):
    cuts = {  # sizes -> the groups, by the ranks in them; ranks that hold the whole model; ranks that step together
        (("expert", 2),): ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]], 4, 2),
        (("tensor", 2), ("expert", 2)): ([[0, 2], [1, 3]], [[0, 1], [2, 3]], [[0, 1, 2, 3]], 4, 4),
        (("tensor", 2), ("expert", 2), ("expert_tensor", 1)): (
            [[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]], 2, 1,
        ),
        (("pipeline", 2), ("expert", 2)): ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]], 4, 2),
        (("tensor", 2),): ([[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], 2, 1),
    }  # fmt: skip
    answers = ranks(4, expert_groups, [dict(sizes) for sizes in cuts])
    for n, (*groups, holders, in_step) in enumerate(cuts.values()):
        for rank, answer in enumerate(answers):
            mine = [next(group for group in several if rank in group) for several in groups]
            assert answer[n] == (*mine, holders, in_step)


def test_experts_across_parts_of_tensor_groups_join_everyone():
    world, odd = Axis(None, 0, 6), {"tensor": Axis(None, 0, 3), "experts": Axis(None, 0, 2)}
    others = dict.fromkeys(field.name for field in fields(Mesh))
    mesh = Mesh(**others | odd | {"world": world})
    assert mesh.in_step is world and mesh.holders is world


def threads_of_layouts():
    """Threads of this process before, in and after each of three layouts beside the first."""
    mesh = initialize()
    count = [len(os.listdir("/proc/self/task"))]
    for _ in range(3):
        with temporary_groups():
            another_layout(mesh, tensor=2)
            count.append(len(os.listdir("/proc/self/task")))
        gc.collect()
        count.append(len(os.listdir("/proc/self/task")))
    return count


def test_groups_of_a_layout_that_was_tried_are_given_back(ranks):
    for before, *turns in ranks(2, threads_of_layouts):
        assert all(during > before + 10 for during in turns[::2])
        assert all(after <= before + 4 for after in turns[1::2]), (before, turns)


def alone():
    """Without torchrun's variables: a world of one, in which every collective is the identity."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    mesh = initialize()
    return [getattr(mesh, name).size for name in AXES], mesh.is_writer, mesh.leads_replica


def test_a_world_of_one_needs_no_launcher(ranks):
    assert ranks(1, alone) == [([1] * 6, True, True)]


def too_small(tensor, pipeline):
    """What a rank that does not fit says, and whether it had spoken to anyone."""
    try:
        initialize(tensor, pipeline)
    except ConfigError as error:
        return str(error), dist.is_initialized()


def test_a_world_that_does_not_fit_is_refused_everywhere_before_any_collective(ranks):
    (message, spoke), *others = ranks(3, too_small, 2, 1)
    assert message.startswith(
        "3 ranks do not divide into replicas of parallel.tensor=2 x parallel.pipeline=1 = 2 ranks"
    )
    assert not spoke and others == [(message, False)] * 2


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(1, 2, 1), (4, 3, 1), (6, 2, 2), (2, 1, 4)])
def test_check_world_refuses(world, tensor, pipeline):
    with pytest.raises(ConfigError, match=f"start {tensor * pipeline} ranks or a multiple"):
        check_world(world, tensor, pipeline)


# ---- collectives


def collective_answers():
    """What each collective gives on two ranks."""
    mesh = initialize(tensor=2)
    me, group = mesh.tensor.rank, mesh.tensor.group
    later = collectives.gather_later(torch.tensor([me, 5]), group)
    summed = torch.tensor([1.0 + me])
    sent = [
        collectives.send_to_first(torch.full((2, 3), 7.0 + me, dtype=torch.float64), source, group) for source in (0, 1)
    ]
    return {
        "gather": collectives.gather(torch.tensor([me, 5]), group).tolist(),
        "later": later().tolist(),
        "reduce_scatter": collectives.reduce_scatter(torch.tensor([[1.0], [10.0]]) * (me + 1), group).tolist(),
        "sum_": (collectives.sum_(summed, group) is summed, summed.item()),
        "max_int": collectives.max_int(me + 2**53, group),
        "sum_int": collectives.sum_int(2**53 + me, group),
        "broadcast": collectives.broadcast_object({"from": me}, group, source=1),
        "objects": collectives.gather_objects(("rank", me), group),
        "sent": [None if value is None else (value.dtype, value.unique().tolist()) for value in sent],
    }


def test_collectives_over_two_ranks(ranks):
    found = ranks(2, collective_answers)
    for me, answer in enumerate(found):
        assert answer["gather"] == answer["later"] == [[0, 5], [1, 5]]
        assert answer["reduce_scatter"] == [[[3.0]], [[30.0]]][me]
        assert answer["sum_"] == (True, 3.0)
        assert answer["max_int"] == 2**53 + 1 and answer["sum_int"] == 2**54 + 1  # exact beyond float64
        assert answer["broadcast"] == {"from": 1} and answer["objects"] == [("rank", 0), ("rank", 1)]
        assert answer["sent"] == ([(torch.float64, [7.0]), (torch.float64, [8.0])] if me == 0 else [None, None])


def test_without_a_group_every_collective_is_the_identity():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert (collectives.size(None), collectives.rank(None)) == (1, 0)
    assert collectives.reduce_scatter(x, None) is x and collectives.send_to_first(x, 0, None) is x
    assert collectives.gather_later(x, None)().tolist() == [[[1.0, 2.0]]]
    assert collectives.sum_(x, None) is x and collectives.gather(x, None).tolist() == [[[1.0, 2.0]]]
    assert (collectives.max_int(3, None), collectives.sum_int(3, None)) == (3, 3)
    assert collectives.broadcast_object("a", None) == "a" and collectives.gather_objects("a", None) == ["a"]


def test_a_rank_that_fails_says_why(ranks):
    with pytest.raises(RankError, match="ConfigError: 2 ranks do not divide"):
        ranks(2, coordinates, 3, 1)
