"""Learning-rate schedules: each a frozen dataclass, whose fields are keys of `config.schedule`.

A schedule begins where the warm-up ends. `build(rate, timing)` returns step after the warm-up -> learning rate.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vitcls.core import durations
from vitcls.core.errors import UserError
from vitcls.core.registry import Registry, fill, require, require_durations
from vitcls.optim.optimizers import OptimizerSettings


@dataclasses.dataclass(frozen=True)
class ScheduleSettings:
    """Keys of `config.schedule` whatever the schedule."""

    warmup: str = "0 steps"  # linear, from 0 to the learning rate

    def __post_init__(self):
        require_durations(self, "warmup")


SCHEDULES = Registry(
    "config.schedule",
    {
        "constant": "vitcls.optim.schedules:Constant",
        "step": "vitcls.optim.schedules:Step",
        "exponential": "vitcls.optim.schedules:Exponential",
        "linear": "vitcls.optim.schedules:Linear",
        "cosine": "vitcls.optim.schedules:Cosine",
        "onecycle": "vitcls.optim.schedules:OneCycle",
        "plateau": "vitcls.optim.schedules:Plateau",
    },
    shared=ScheduleSettings,
)
_ONECYCLE_START = 1 / 25  # of the learning rate; the default of PyTorch's OneCycleLR


class Timing(NamedTuple):
    """The length of a run and its parts, in steps."""

    total: int
    warmup: int
    to_steps: Callable[[str], int]  # a duration in steps; raises UserError for what is none

    @property
    def remaining(self) -> int:
        """After the warm-up; a run that is all warm-up never reaches what follows."""
        return max(self.total - self.warmup, 1)


def make_schedule(
    config, optimizer_config, *, batch_size: int, num_examples: int, total_steps: int
) -> Callable[[jax.Array | int], jax.Array]:
    """Returns step -> learning rate, float32 scalar; step counts from 0, so the last update uses total_steps - 1.

    With lr the configured rate (times batch_size / base_batch_size where that is set), w the steps of `warmup` and
    T = total_steps, the rate at step t is t / w * lr for t < w (0 at step 0, where w > 0), lr at t = w, and what
    `config.name` makes of it for t >= w. Beyond T it stays what it was at T.

    Raises:
      UserError: for an unknown name or an impossible value, naming its key.
    """

    def to_steps(duration: str) -> int:
        return durations.to_steps(duration, batch_size=batch_size, num_examples=num_examples, total_steps=total_steps)

    settings = fill(OptimizerSettings, optimizer_config, "config.optimizer")
    base = settings.base_batch_size
    rate = settings.learning_rate * batch_size / base if base else settings.learning_rate
    try:
        warmup = to_steps(config.warmup)
    except UserError as error:
        raise UserError(f"config.schedule.warmup: {error}") from None
    if warmup > total_steps:
        raise UserError(
            f"config.schedule.warmup='{config.warmup}' is {warmup} steps, more than the {total_steps} "
            "of config.total; shorten it"
        )
    entry = SCHEDULES.create(config.name, config)
    with SCHEDULES.about(config.name):
        schedule = entry.build(rate, Timing(total_steps, warmup, to_steps))
    if warmup:
        schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedule], [warmup])
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The rate itself."""

    def build(self, rate: float, timing: Timing) -> optax.Schedule:
        return optax.constant_schedule(rate)


@dataclasses.dataclass(frozen=True)
class Step:
    """lr * factor^n, n the number of `boundaries` <= t; boundaries count from step 0."""

    boundaries: tuple[str, ...] = ("50%", "75%")  # durations at which the rate is multiplied by `factor`
    factor: float = 0.1

    def __post_init__(self):
        require(self, "factor", 0 < self.factor <= 1e3, "above 0 and at most 1000")
        require_durations(self, "boundaries")

    def build(self, rate: float, timing: Timing) -> optax.Schedule:
        boundaries = [_in_steps(timing, "boundaries", boundary) for boundary in self.boundaries]
        increasing = boundaries == sorted(boundaries) and len(set(self.boundaries)) == len(self.boundaries)
        require(self, "boundaries", increasing, "durations that increase")
        after = not boundaries or boundaries[0] >= timing.warmup
        require(self, "boundaries", after, f"after the {timing.warmup} steps of config.schedule.warmup")
        # Boundaries of a very short run may fall on the same step; each of them counts.
        scales = {boundary - timing.warmup: self.factor ** boundaries.count(boundary) for boundary in boundaries}
        return optax.piecewise_constant_schedule(rate, scales)


@dataclasses.dataclass(frozen=True)
class Exponential:
    """lr * factor^((t - w) / every), without stairs."""

    factor: float = 0.1
    every: str = "1 epochs"

    def __post_init__(self):
        require(self, "factor", 0 < self.factor <= 1e3, "above 0 and at most 1000")
        require_durations(self, "every")

    def build(self, rate: float, timing: Timing) -> optax.Schedule:
        every = _in_steps(timing, "every", self.every)
        require(self, "every", every > 0, "at least '1 steps'")
        return optax.exponential_decay(rate, every, self.factor)


@dataclasses.dataclass(frozen=True)
class Linear:
    """From lr at w to final * lr at T."""

    final: float = 0.0  # the last value, as a fraction of the learning rate

    def __post_init__(self):
        require(self, "final", 0 <= self.final <= 1, "in [0, 1]")

    def build(self, rate: float, timing: Timing) -> optax.Schedule:
        return optax.linear_schedule(rate, self.final * rate, timing.remaining)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """From lr at w to final * lr at T, along half a cosine (Loshchilov & Hutter 2017)."""

    final: float = 0.0

    def __post_init__(self):
        require(self, "final", 0 <= self.final <= 1, "in [0, 1]")

    def build(self, rate: float, timing: Timing) -> optax.Schedule:
        return optax.cosine_decay_schedule(rate, timing.remaining, alpha=self.final)


@dataclasses.dataclass(frozen=True)
class OneCycle:
    """From lr / 25 at 0 to lr at peak * T to final * lr at T, along two half cosines (Smith & Topin 2018).

    It is a warm-up already and takes no other.
    """

    final: float = 0.0
    peak: float = 0.3  # fraction of the run at which the rate peaks

    def __post_init__(self):
        require(self, "final", 0 <= self.final <= 1, "in [0, 1]")
        require(self, "peak", 0 < self.peak < 1, "between 0 and 1")

    def build(self, rate: float, timing: Timing) -> optax.Schedule:
        if timing.warmup:
            raise ValueError(
                f"warmup='{timing.warmup} steps' is impossible; it must be '0 steps' for 'onecycle', which has its own"
            )
        peak = max(round(self.peak * timing.total), 1)
        # A cosine "decay" to 1 / start times its first value is the rise.
        rise = optax.cosine_decay_schedule(rate * _ONECYCLE_START, peak, alpha=1 / _ONECYCLE_START)
        fall = optax.cosine_decay_schedule(rate, max(timing.total - peak, 1), alpha=self.final)
        return optax.join_schedules([rise, fall], [peak])


@dataclasses.dataclass(frozen=True)
class Plateau:
    """lr, times a scale in the state, which `patience` evaluations without improvement multiply by `factor`."""

    factor: float = 0.1
    metric: str = "eval/loss"  # the metric watched
    patience: int = 5  # evaluations

    def __post_init__(self):
        require(self, "factor", 0 < self.factor < 1, "between 0 and 1 for 'plateau'")
        require(self, "patience", self.patience >= 1, "at least 1")

    def build(self, rate: float, timing: Timing) -> optax.Schedule:
        return optax.constant_schedule(rate)

    def reduction(self) -> optax.GradientTransformationExtraArgs:
        # A relative tolerance would have the wrong sign for the negated value of a metric to maximise. optax wants one
        # of the two above 0; this one is too small to matter.
        return optax.contrib.reduce_on_plateau(self.factor, self.patience, rtol=0.0, atol=1e-12)


def _in_steps(timing: Timing, field: str, duration: str) -> int:
    try:
        return timing.to_steps(duration)
    except UserError as error:
        raise ValueError(f"{field}: {error}") from None


def plateau_init(config) -> optax.contrib.ReduceLROnPlateauState | None:
    """The state of the 'plateau' schedule, whose `scale` is the factor on the rate; None for any other schedule."""
    if config.name != "plateau":
        return None
    return SCHEDULES.create(config.name, config).reduction().init(jnp.zeros((), jnp.float32))


def plateau_update(
    config, state: optax.contrib.ReduceLROnPlateauState, value: float, maximize: bool
) -> optax.contrib.ReduceLROnPlateauState:
    """Returns the state after one more evaluation gave the metric `value`.

    `scale` is multiplied by `factor` at the `patience`-th evaluation in a row that did not beat the best one so far,
    and the count starts again. NaN beats nothing.
    """
    value = jnp.asarray(-value if maximize else value, jnp.float32)
    reduction = SCHEDULES.create(config.name, config).reduction()
    _, state = reduction.update((), jax.tree.map(jnp.asarray, state), value=value)
    return state
