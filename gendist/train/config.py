"""The `fit:` block of a spec whose family is fitted by gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["float32", "tfloat32", "bfloat16", "float16"]


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineConfig(_Block):
    """
    kind        "ddp": every process holds all of every network; "deepspeed": ZeRO shards them
    zero_stage  of deepspeed: 0 nothing is sharded, 1 moments of the optimizers, 2 gradients too, 3 parameters too
    config      a DeepSpeed JSON file of the user's own: offload, bucket sizes, communication; what the spec says may not
                stand in it with another value
    """

    kind: Literal["ddp", "deepspeed"] = "ddp"
    zero_stage: Literal[0, 1, 2, 3] = 2
    config: str | None = None

    @property
    def stage(self) -> int:
        """The ZeRO stage of either kind."""
        return self.zero_stage if self.kind == "deepspeed" else 0


class OptimizerConfig(_Block):
    """AdamW (Loshchilov & Hutter 2019), which without weight decay is Adam (Kingma & Ba 2015), or plain SGD.

    schedule      of the learning rate: constant, or down to 0 at the last step, along a line or half a cosine
    warmup_steps  from 0 up to the learning rate, before the schedule
    """

    kind: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0.0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    gradient_clipping: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)


class DeepConfig(_Block):
    """
    num_steps          optimizer steps
    init               an artifact or run directory whose weights are the first ones, of the same networks; left out: weights
                       that the seed tells. Optimizers begin anew
    global_batch_size  samples a step, over all processes
    labelled_batch_size  how many of them have a label, where few rows have one (data.label): these come up the more often, and
                       every micro-batch has its share. Left out: as they come
    micro_batch_size   samples at once on one process; the largest that is even where left out
    optimizer          of every network that `optimizers` does not name
    optimizers         by network
    engine             how networks are spread over processes
    precision          float32, bfloat16 or, on a GPU, tfloat32 or float16: of the networks' arithmetic; parameters are kept
                       in float32
    ema                exponential moving average of the parameters, which the artifact holds: the width of its profile relative
                       to the steps taken (Karras et al. 2024, power-function EMA), such as 0.05; 0 is none
    eval_every         steps between validations and pictures; 0 only at the end
    checkpoint_every   steps between checkpoints
    keep_last          checkpoints that stay
    early_stopping     stop after so many validations without a better one; 0 never
    on_nan             a loss or gradient that is not finite: stop with the last checkpoint, or skip the batch
    max_failures       worker losses in a row that training recovers from by itself
    deterministic      on a GPU only kernels that add in one order, without which a resumed run is another one in its last bits;
                       in float32 some others are faster
    compile            torch.compile of the networks
    channels_last      memory layout of images inside the networks
    record_every       steps between records of metrics.jsonl, which hold means over these
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        {
            "micro_batch_size",
            "engine",
            "checkpoint_every",
            "keep_last",
            "max_failures",
            "deterministic",
            "compile",
            "channels_last",
        }
    )
    """What may be another when a run is resumed: it tells how fast and where a step is computed, and not which step it is."""

    num_steps: int = Field(default=1000, ge=1)
    init: str | None = Field(default=None, min_length=1)
    global_batch_size: int = Field(default=128, ge=1)
    labelled_batch_size: int | None = Field(default=None, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    optimizers: Mapping[str, OptimizerConfig] = Field(default_factory=dict)
    engine: EngineConfig = EngineConfig()
    precision: Precision = "float32"
    ema: float = Field(default=0.0, ge=0.0, lt=0.28)
    eval_every: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_last: int = Field(default=2, ge=1)
    early_stopping: int = Field(default=0, ge=0)
    on_nan: Literal["stop", "skip_batch"] = "stop"
    max_failures: int = Field(default=3, ge=0)
    deterministic: bool = True
    compile: bool = False
    channels_last: bool = False
    record_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.labelled_batch_size and self.labelled_batch_size > self.global_batch_size:
            raise ValueError(
                f"labelled_batch_size {self.labelled_batch_size} is more than global_batch_size {self.global_batch_size}"
            )
        if self.micro_batch_size and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}"
            )
        return self
