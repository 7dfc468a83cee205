"""How a model is cut: the recipe's `parallel` section, and the keys of a frozen model's layout of its own."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from grpo_mega.config.base import Counts, Positive, Section

LAYOUT_KEYS = ("tensor", "pipeline", "context", "expert", "expert_tensor", "sequence")  # of a layout of its own


class ParallelConfig(Section):
    tensor: Positive = 1
    pipeline: Positive = 1
    virtual_pipeline: Positive = 1  # stages of each pipeline rank, interleaved: rank p has stages p, p + pipeline, ...
    context: Positive = 1  # ranks that share the rows of one microbatch
    expert: Positive = 1  # ranks that divide a layer's experts: runs of tensor, context and data ranks
    expert_tensor: Positive | None = None  # ranks that divide each expert's matrices; default: as tensor
    sequence: bool = False  # megatron's sequence parallelism: activations between layers are sharded over tensor ranks
    pipeline_layout: Counts | None = None  # layers of each stage, in model order; default: balanced by cost
    # gradients are reduced while the backward still runs; with optimizer.distributed, weights gathered in the forward
    overlap: bool = False

    @model_validator(mode="after")
    def _layout(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence=true needs parallel.tensor > 1; set parallel.sequence=false")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} interleaves the stages of a pipeline, and "
                "parallel.pipeline=1 has none; set parallel.virtual_pipeline=1 or parallel.pipeline > 1"
            )
        if self.pipeline_layout is not None and len(self.pipeline_layout) != self.stages:
            times = f" x parallel.virtual_pipeline={self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
            raise ValueError(
                f"parallel.pipeline_layout has {len(self.pipeline_layout)} stages but parallel.pipeline="
                f"{self.pipeline}{times}; give one layer count a stage"
            )
        return self

    @property
    def stages(self) -> int:
        """How many runs of layers the model is cut into."""
        return self.pipeline * self.virtual_pipeline

    @property
    def replica(self) -> int:
        """How many ranks together hold a model and the rows of a microbatch."""
        return self.tensor * self.pipeline * self.context

    @property
    def row_multiple(self) -> int:
        """What must divide the rows of a microbatch: two runs a context rank, each cut over tensor ranks that share."""
        return (self.tensor if self.sequence else 1) * (2 * self.context if self.context > 1 else 1)

    @property
    def sizes(self) -> dict[str, Any]:
        """The mesh's axes but data, which follows from the number of ranks."""
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual_pipeline,
            "context": self.context,
            "expert": self.expert,
            "expert_tensor": self.expert_tensor,
        }


class OwnLayoutConfig(Section):
    """A frozen model beside the policy, on the same ranks.

    A layout of its own; default: training's. Where one of these is given, the others are 1 (false), and the world's
    other ranks become data ranks, which share the step's microbatches evenly.
    """

    section: ClassVar[str] = ""  # what stands before these keys in a message that nothing else stands before

    tensor: Positive | None = None
    pipeline: Positive | None = None
    context: Positive | None = None
    expert: Positive | None = None
    expert_tensor: Positive | None = None
    sequence: bool | None = None
    offload: bool = False  # between its uses the weights are in host memory, and their memory on the device is free

    @model_validator(mode="after")
    def _layout(self) -> OwnLayoutConfig:
        if self.sequence and (self.tensor or 1) == 1:
            here = self.section
            raise ValueError(
                f"{here}sequence=true needs {here}tensor > 1 (in a layout of its own an axis that is not given has "
                f"length 1); set {here}tensor, or leave {here}sequence out"
            )
        return self

    @property
    def layout(self) -> ParallelConfig | None:
        """The layout of its own, if it has one."""
        given = {key: getattr(self, key) for key in LAYOUT_KEYS if getattr(self, key) is not None}
        return ParallelConfig.model_validate(given) if given else None
