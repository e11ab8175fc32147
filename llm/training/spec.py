"""The settings of the optimizer and of the training loop."""

import dataclasses
import difflib

from llm.errors import InputError
from llm.training.roles import role_names


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


# Which optimizer reads which field; the others must stand at their defaults.
_READ = {
    "adamw": ("b1", "b2", "epsilon"),
    "adafactor": (),
    "lion": ("b1", "b2"),
    "muon": ("b1", "b2", "epsilon", "momentum"),
}
_SCHEDULES = ("cosine", "linear", "wsd", "inverse_sqrt", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """The update rule, its learning rate, and who gets how much of it.

    Attributes:
        learning_rate: the peak, reached at update `warmup_steps`.
        name: "adamw" (Loshchilov and Hutter 2019); "adafactor", as T5 was trained (Shazeer and Stern 2018): no
            momentum, factored second moments, the learning rate relative to the size of a parameter; "lion" (Chen et
            al. 2023); or "muon" (Jordan et al. 2024) for the matrices of the hidden layers, AdamW for everything else.
        warmup_steps: updates from 0 to the peak; 0 starts at the peak.
        schedule: what follows the warm-up: "cosine" or "linear" down to `final_fraction`; "wsd", the peak until the
            last `decay_fraction` of all updates, which are linear down to `final_fraction` (Hu et al. 2024);
            "inverse_sqrt", the peak times sqrt(warmup_steps / update) (Vaswani et al. 2017); or "constant".
        final_fraction: the rate after the last update, as a share of the peak; "inverse_sqrt" and "constant" have none.
        decay_fraction: the share of all updates that "wsd" decays over.
        b1, b2: decay rates of AdamW's two moments; of Lion, the weight of its momentum in an update and its decay.
        epsilon: AdamW's.
        momentum: Muon's.
        weight_decay: decoupled decay, times the learning rate, of the roles that decay (`llm.training.roles.ROLES`).
            T5's Adafactor has none.
        clip_norm: largest global gradient norm; None does not clip.
        rates: factors on the learning rate by role, or by a path with * in it: ("embedding=13.9", "*/mlp/*=0.5"); of
            those that match, the last counts. A factor of 0 freezes: no update, no decay, no moments.
        layer_decay: factor on the learning rate for each layer from the top: layer l of L, counted from 0, has
            layer_decay^(L - l), what lies under the first layer layer_decay^(L + 1), what lies above the last 1 (Clark
            et al. 2020; the exponents of Bao et al. 2021). An encoder and a decoder count each by itself.
    """

    learning_rate: float = 1e-3
    name: str = "adamw"
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    rates: tuple[str, ...] = ()
    layer_decay: float = 1.0

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: must be above 0")
        _require(self.name in _READ, f"optimizer.name={self.name!r}: there are {', '.join(_READ)}")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: must not be negative")
        _require(
            self.schedule in _SCHEDULES, f"optimizer.schedule={self.schedule!r}: there are {', '.join(_SCHEDULES)}"
        )
        _require(
            self.schedule != "inverse_sqrt" or self.warmup_steps > 0,
            "optimizer.schedule='inverse_sqrt' is measured in warm-ups: optimizer.warmup_steps must be at least 1",
        )
        _require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction}: must lie in 0..1")
        _require(
            0 < self.decay_fraction <= 1,
            f"optimizer.decay_fraction={self.decay_fraction}: must be above 0 and at most 1",
        )
        for name in ("b1", "b2", "momentum"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)}: must lie in 0..1")
        _require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon}: must be above 0")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: must not be negative")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optimizer.clip_norm={self.clip_norm}: must be above 0, or None for no clipping",
        )
        _require(0 < self.layer_decay <= 1, f"optimizer.layer_decay={self.layer_decay}: must be above 0 and at most 1")
        self.factors()
        self._refuse_unread()

    def factors(self) -> list[tuple[str, float]]:
        """`rates` as pairs of a role, or a path with * in it, and a factor.

        Raises:
            InputError: one is not such a pair, or there is no such role.
        """
        found = []
        for text in self.rates:
            name, _, number = text.rpartition("=")
            try:
                factor = float(number)
            except ValueError:
                factor = -1.0
            _require(
                bool(name) and 0 <= factor < float("inf"),
                f"optimizer.rates: {text!r} is no role (or path with *), = and a factor of at least 0",
            )
            roles = role_names()
            nearest = [repr(one) for one in difflib.get_close_matches(name, roles, n=1, cutoff=0.0)]
            _require(
                "*" in name or name in roles,
                f"optimizer.rates: there is no role {name!r}; there are {nearest[0]} (nearest), "
                f"{', '.join(one for one in roles if repr(one) != nearest[0])}, or give a path with * in it",
            )
            found.append((name, factor))
        return found

    def _refuse_unread(self) -> None:
        """Raises InputError when a field is set that nothing reads."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        every = {name for names in _READ.values() for name in names}
        unread = {name: f"optimizer.name={self.name!r}" for name in sorted(every - set(_READ[self.name]))}
        if self.schedule != "wsd":
            unread["decay_fraction"] = f"optimizer.schedule={self.schedule!r}"
        for name, what in unread.items():
            _require(
                getattr(self, name) == defaults[name],
                f"optimizer.{name}={getattr(self, name)}: {what} does not read it; leave it at {defaults[name]}",
            )


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """The length of a run and what happens along it. Steps are updates.

    Attributes:
        steps: updates in all.
        batch_size: rows of one update, over all devices.
        microbatches: parts that one update's batch is computed in, one after the other, to save memory.
        loss_chunk: tokens whose logits exist at a time; None computes all logits at once.
        label_smoothing: the share of the target that is spread evenly over all ids or classes; of "preference" the
            probability that a pair stands the wrong way round.
        z_loss: how much the squared log-sum-exp of the logits, of the vocabulary, classes or places, counts beside the
            cross-entropy (PaLM's 1e-4); reported as "z_loss", and no part of validations. 0 has none.
        balance_weight: how much the balance of a mixture of experts counts beside the loss.
        router_z_weight: how much the squared log-sum-exp of the logits of its router counts.
        temperature: divides the cosines of the "contrastive" objective.
        preference_beta: what the "preference" objective multiplies differences of log-probabilities by: the larger, the
            nearer the model stays to the run of its start.
        start_from: a run's folder whose newest checkpoint gives the parameters that this model shares with it by name;
            what that run lacks starts anew, and what this model lacks is left out. "" starts anew altogether.
        ema_decay: keeps an exponential moving average of the parameters with this decay, which validation, scores,
            samples and whoever opens the run use in their place; None keeps none.
        lora_rank: trains adapters of this rank (`llm.training.adapters`) beside the parameters of `start_from`, which
            stay as they are but for those that `optimizer.rates` names; None trains the parameters themselves.
        lora_alpha: what the adapters are multiplied by, times the rank.
        lora_targets: roles whose matrices have adapters.
        log_every, validate_every, checkpoint_every: steps between log rows, validations and checkpoints.
        validation_rows: rows of the validation set, evenly spaced, that a validation on the way looks at.
        keep_checkpoints: newest complete checkpoints kept.
        keep_every: keeps the checkpoints of its multiples too, for good; a multiple of `checkpoint_every`. None keeps
            none.
        keep_best: keeps the checkpoint with the best "loss" or "accuracy" of the validations on the way too, and saves
            one where a validation is better than all before; `--checkpoint=best` opens it. "" keeps none.
        max_skipped: stop after this many steps in a row whose gradient was not finite.
        wandb: the project of Weights & Biases that the record is sent to as well; "" sends nothing.
    """

    steps: int = 1000
    batch_size: int = 8
    microbatches: int = 1
    loss_chunk: int | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    balance_weight: float = 0.01
    router_z_weight: float = 0.001
    temperature: float = 0.05
    preference_beta: float = 0.1
    start_from: str = ""
    ema_decay: float | None = None
    lora_rank: int | None = None
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("attention",)
    log_every: int = 10
    validate_every: int = 250
    validation_rows: int = 64
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    keep_every: int | None = None
    keep_best: str = ""
    max_skipped: int = 10
    wandb: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int):
                _require(value >= 1, f"training.{field.name}={value}: must be at least 1")
        _require(
            0 <= self.label_smoothing < 1,
            f"training.label_smoothing={self.label_smoothing}: must be at least 0 and below 1",
        )
        for name in ("z_loss", "balance_weight", "router_z_weight"):
            _require(
                0 <= getattr(self, name) < float("inf"), f"training.{name}={getattr(self, name)}: must be at least 0"
            )
        for name in ("temperature", "preference_beta"):
            _require(getattr(self, name) > 0, f"training.{name}={getattr(self, name)}: must be above 0")
        _require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"training.ema_decay={self.ema_decay}: must lie between 0 and 1, or be None for no average",
        )
        self._check_adapters()
        _require(
            self.keep_every is None or self.keep_every % self.checkpoint_every == 0,
            f"training.keep_every={self.keep_every}: must be a multiple of "
            f"training.checkpoint_every={self.checkpoint_every}, or be None",
        )
        _require(
            self.keep_best in ("", "loss", "accuracy"),
            f"training.keep_best={self.keep_best!r}: there are 'loss', 'accuracy', or '' for none",
        )
        _require(
            self.batch_size % self.microbatches == 0,
            f"training.microbatches={self.microbatches} does not divide training.batch_size={self.batch_size}",
        )

    def _check_adapters(self) -> None:
        _require(self.lora_alpha > 0, f"training.lora_alpha={self.lora_alpha}: must be above 0")
        for name in self.lora_targets:
            _require(
                name in role_names(),
                f"training.lora_targets: there is no role {name!r}; there are {', '.join(role_names())}",
            )
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_targets"):
                default = type(self).__dataclass_fields__[name].default
                _require(
                    getattr(self, name) == default,
                    f"training.{name}={getattr(self, name)}: nothing reads it without training.lora_rank",
                )
        else:
            _require(
                self.start_from != "",
                f"training.lora_rank={self.lora_rank}: adapters need trained parameters; name their run in "
                "training.start_from",
            )
