"""The settings of the optimizer and of the training loop."""

import dataclasses

from llm.errors import InputError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """AdamW with a linear warm-up and a decay.

    Attributes:
        learning_rate: the peak, reached at update `warmup_steps`.
        warmup_steps: updates from 0 to the peak; 0 starts at the peak.
        schedule: what follows the warm-up: "cosine" or "linear" down to `final_fraction`; "inverse_sqrt", the peak
            times sqrt(warmup_steps / update) (Vaswani et al. 2017); or "constant".
        final_fraction: the rate after the last update, as a share of the peak; "cosine" and "linear" read it.
        b1, b2, epsilon: Adam's decay rates and its epsilon.
        weight_decay: decoupled decay of the roles that decay (`llm.training.optimizer.ROLES`).
        clip_norm: largest global gradient norm; None does not clip.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: must be above 0")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: must not be negative")
        schedules = ("cosine", "linear", "inverse_sqrt", "constant")
        _require(self.schedule in schedules, f"optimizer.schedule={self.schedule!r}: there are {', '.join(schedules)}")
        _require(
            self.schedule != "inverse_sqrt" or self.warmup_steps > 0,
            "optimizer.schedule='inverse_sqrt' is measured in warm-ups: optimizer.warmup_steps must be at least 1",
        )
        _require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction}: must lie in 0..1")
        for name in ("b1", "b2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)}: must lie in 0..1")
        _require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon}: must be above 0")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: must not be negative")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm={self.clip_norm}: must be above 0, or None for no clipping",
        )


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """The length of a run and what happens along it. Steps are updates.

    Attributes:
        steps: updates in all.
        batch_size: rows of one update, over all devices.
        microbatches: parts that one update's batch is computed in, one after the other, to save memory.
        loss_chunk: tokens whose logits exist at a time; None computes all logits at once.
        label_smoothing: the share of the target that is spread evenly over all ids or classes.
        balance_weight: how much the balance of a mixture of experts counts beside the loss.
        router_z_weight: how much the squared log-sum-exp of the logits of its router counts.
        temperature: divides the cosines of the "contrastive" objective.
        start_from: a run's folder whose newest checkpoint gives the parameters that this model shares with it by name;
            heads that it lacks start anew. "" starts anew altogether.
        log_every, validate_every, checkpoint_every: steps between log rows, validations and checkpoints.
        validation_rows: rows of the validation set, evenly spaced, that a validation on the way looks at.
        keep_checkpoints: newest complete checkpoints kept.
        max_skipped: stop after this many steps in a row whose gradient was not finite.
    """

    steps: int = 1000
    batch_size: int = 8
    microbatches: int = 1
    loss_chunk: int | None = None
    label_smoothing: float = 0.0
    balance_weight: float = 0.01
    router_z_weight: float = 0.001
    temperature: float = 0.05
    start_from: str = ""
    log_every: int = 10
    validate_every: int = 250
    validation_rows: int = 64
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    max_skipped: int = 10

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int):
                _require(value >= 1, f"training.{field.name}={value}: must be at least 1")
        _require(
            0 <= self.label_smoothing < 1,
            f"training.label_smoothing={self.label_smoothing}: must be at least 0 and below 1",
        )
        for name in ("balance_weight", "router_z_weight"):
            _require(getattr(self, name) >= 0, f"training.{name}={getattr(self, name)}: must not be negative")
        _require(self.temperature > 0, f"training.temperature={self.temperature}: must be above 0")
        _require(
            self.batch_size % self.microbatches == 0,
            f"training.microbatches={self.microbatches} does not divide training.batch_size={self.batch_size}",
        )
