"""Learning-rate schedules, optimizers, plateau reduction and the average of parameters, from their config blocks.

The optimizer is built for a learning rate of 1. The train step multiplies its updates by schedule(step) times the
plateau scale, so that the rate enters in one place and follows the step count, whatever updates were skipped.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from vitcls.core import durations, errors
from vitcls.core.errors import UserError

OPTIMIZERS = ("adam", "adamw", "sgd", "lamb", "lion", "muon")
SCHEDULES = ("constant", "step", "exponential", "linear", "cosine", "onecycle", "plateau")

PyTree = Any

_ONECYCLE_START = 1 / 25  # of the learning rate; the default of PyTorch's OneCycleLR


def make_schedule(
    schedule_config, optimizer_config, *, batch_size: int, num_examples: int, total_steps: int
) -> Callable[[jax.Array | int], jax.Array]:
    """Returns step -> learning rate, float32 scalar; step counts from 0, so the last update uses total_steps - 1.

    With lr the configured rate (times batch_size / base_batch_size where that is set), w the steps of `warmup` and
    T = total_steps, the rate at step t is t / w * lr for t < w (0 at step 0, where w > 0), lr at t = w, and for t >= w

        constant, plateau   lr (the plateau scale is a factor of its own)
        step                lr * factor^n, n the number of `boundaries` <= t; boundaries count from step 0
        exponential         lr * factor^((t - w) / every), without stairs
        linear              from lr at w to final * lr at T
        cosine              from lr at w to final * lr at T, along half a cosine (Loshchilov & Hutter 2017)
        onecycle            from lr / 25 at 0 to lr at peak * T to final * lr at T, along two half cosines
                            (Smith & Topin 2018); it is a warm-up already and takes no other

    Beyond T the rate of 'linear', 'cosine' and 'onecycle' stays final * lr.

    Raises:
      UserError: for an unknown name or an impossible value, naming its key.
    """

    def to_steps(key: str, duration: str) -> int:
        try:
            return durations.to_steps(
                duration, batch_size=batch_size, num_examples=num_examples, total_steps=total_steps
            )
        except UserError as error:
            raise UserError(f"config.schedule.{key}: {error}") from None

    rate = _learning_rate(optimizer_config, batch_size)
    warmup = to_steps("warmup", schedule_config.warmup)
    if warmup > total_steps:
        raise UserError(
            f"config.schedule.warmup='{schedule_config.warmup}' is {warmup} steps, more than the {total_steps} "
            "of config.total; shorten it"
        )
    factor, final = schedule_config.factor, schedule_config.final
    remaining = max(total_steps - warmup, 1)  # a run that is all warm-up never reaches what follows
    match schedule_config.name:
        case "constant":
            schedule = optax.constant_schedule(rate)
        case "plateau":
            _reduce_on_plateau(schedule_config)  # raises for impossible values
            schedule = optax.constant_schedule(rate)
        case "step":
            _require(0 < factor <= 1e3, "schedule.factor", factor, "above 0 and at most 1000")
            boundaries = [to_steps("boundaries", boundary) for boundary in schedule_config.boundaries]
            _check_boundaries(schedule_config.boundaries, boundaries, warmup)
            # Boundaries of a very short run may fall on the same step; each of them counts.
            scales = {boundary - warmup: factor ** boundaries.count(boundary) for boundary in boundaries}
            schedule = optax.piecewise_constant_schedule(rate, scales)
        case "exponential":
            _require(0 < factor <= 1e3, "schedule.factor", factor, "above 0 and at most 1000")
            every = to_steps("every", schedule_config.every)
            _require(every > 0, "schedule.every", schedule_config.every, "at least '1 steps'")
            schedule = optax.exponential_decay(rate, every, factor)
        case "linear":
            _require(0 <= final <= 1, "schedule.final", final, "in [0, 1]")
            schedule = optax.linear_schedule(rate, final * rate, remaining)
        case "cosine":
            _require(0 <= final <= 1, "schedule.final", final, "in [0, 1]")
            schedule = optax.cosine_decay_schedule(rate, remaining, alpha=final)
        case "onecycle":
            _require(0 <= final <= 1, "schedule.final", final, "in [0, 1]")
            _require(0 < schedule_config.peak < 1, "schedule.peak", schedule_config.peak, "between 0 and 1")
            _require(warmup == 0, "schedule.warmup", schedule_config.warmup, "'0 steps' for 'onecycle'")
            schedule = _onecycle(rate, final, max(round(schedule_config.peak * total_steps), 1), total_steps)
        case name:
            raise errors.unknown("config.schedule.name", name, SCHEDULES)
    if warmup:
        schedule = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), schedule], [warmup])
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def _learning_rate(optimizer_config, batch_size: int) -> float:
    rate, base = optimizer_config.learning_rate, optimizer_config.base_batch_size
    _require(0 <= rate <= 1e30, "optimizer.learning_rate", rate, "a finite number, at least 0")
    _require(base >= 0, "optimizer.base_batch_size", base, "at least 0")
    return rate * batch_size / base if base else rate


def _check_boundaries(texts: tuple[str, ...], boundaries: list[int], warmup: int) -> None:
    _require(
        boundaries == sorted(boundaries) and len(set(texts)) == len(texts),
        "schedule.boundaries",
        tuple(texts),
        "durations that increase",
    )
    _require(
        not boundaries or boundaries[0] >= warmup,
        "schedule.boundaries",
        tuple(texts),
        f"after the {warmup} steps of config.schedule.warmup",
    )


def _onecycle(rate: float, final: float, peak: int, total: int) -> optax.Schedule:
    # A cosine "decay" to 1 / start times its first value is the rise.
    rise = optax.cosine_decay_schedule(rate * _ONECYCLE_START, peak, alpha=1 / _ONECYCLE_START)
    fall = optax.cosine_decay_schedule(rate, max(total - peak, 1), alpha=final)
    return optax.join_schedules([rise, fall], [peak])


def make_optimizer(optimizer_config, params: PyTree) -> optax.GradientTransformation:
    """Returns the optimizer at learning rate 1: updates times the learning rate are added to the parameters.

    In this order: gradients are clipped by their global norm, `optimizer.name` makes updates of them, decoupled
    weight decay adds -weight_decay * parameter where `decay_mask` is true, and `multipliers` scale the sum.

        adam    Kingma & Ba 2015; its decay is the L2 term of the loss (config.loss.l2)
        adamw   Loshchilov & Hutter 2019
        sgd     momentum of Sutskever et al. 2013, with the decoupled decay of Loshchilov & Hutter 2019
        lamb    You et al. 2020; the decay is part of what the trust ratio scales
        lion    Chen et al. 2023, who take b2 = 0.99
        muon    Jordan 2024, momentum `momentum`, for the parameters of `muon_dimension_numbers`; Adam with b1 and b2
                for the others. Orthogonal updates are scaled to the root mean square of Adam's, 0.2
                (Liu et al. 2025), so that one learning rate serves both

    `multipliers` are pairs (regex, number). A parameter takes the number of the first regex found (`re.search`) in
    its '/'-joined path, else 1. Parameters at 0 are frozen: no update, no decay, no moments, no part in the norm.

    Args:
      params: the parameters, or their shapes.

    Raises:
      UserError: for an unknown name or an impossible value, naming its key, and for a regex that finds nothing.
    """
    multipliers = _multipliers(optimizer_config.multipliers, params)
    optimizer = _at_unit_rate(optimizer_config)
    clip_norm = optimizer_config.clip_norm
    _require(0 <= clip_norm < math.inf, "optimizer.clip_norm", clip_norm, "a finite number, at least 0")
    if clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    used = set(jax.tree.leaves(multipliers))
    if 0.0 in used:
        labels = jax.tree.map(lambda multiplier: "trained" if multiplier else "frozen", multipliers)
        optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
    if used - {0.0, 1.0}:
        scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: m * u, updates, multipliers))
        optimizer = optax.chain(optimizer, scale)
    return optimizer


def _at_unit_rate(optimizer_config) -> optax.GradientTransformation:
    name, weight_decay = optimizer_config.name, optimizer_config.weight_decay
    b1, b2, eps = optimizer_config.b1, optimizer_config.b2, optimizer_config.eps
    momentum, nesterov = optimizer_config.momentum, optimizer_config.nesterov
    for key, value in (("b1", b1), ("b2", b2), ("momentum", momentum)):
        _require(0 <= value < 1, f"optimizer.{key}", value, "at least 0 and below 1")
    _require(0 < eps < math.inf, "optimizer.eps", eps, "above 0")
    _require(0 <= weight_decay < math.inf, "optimizer.weight_decay", weight_decay, "a finite number, at least 0")
    match name:
        case "adam":
            if weight_decay:
                raise UserError(
                    f"config.optimizer.weight_decay={weight_decay} is not for 'adam'; set config.loss.l2 for an L2 "
                    "term in the loss, or config.optimizer.name='adamw' for decoupled decay"
                )
            return optax.adam(1.0, b1=b1, b2=b2, eps=eps)
        case "adamw":
            return optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
        case "sgd":
            optimizer = optax.sgd(1.0, momentum=momentum or None, nesterov=nesterov)
        case "lamb":
            return optax.lamb(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
        case "lion":
            return optax.lion(1.0, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask)
        case "muon":
            # Its Adam part has no mask for the decay, which therefore comes after it for both parts.
            optimizer = optax.contrib.muon(
                1.0,
                beta=momentum,
                nesterov=nesterov,
                eps=eps,
                adam_b1=b1,
                adam_b2=b2,
                muon_weight_dimension_numbers=muon_dimension_numbers,
                consistent_rms=0.2,
            )
        case _:
            raise errors.unknown("config.optimizer.name", name, OPTIMIZERS)
    return optax.chain(optimizer, optax.add_decayed_weights(-weight_decay, mask=decay_mask))


def decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that weight decay and the L2 term apply to: the kernels of dense and convolution layers.

    Biases, the scales of norms and layers, embeddings and tokens (every parameter not named 'kernel') are left out.
    """
    return _map_with_path(lambda path, _: path.rpartition("/")[2] == "kernel", params)


_OUTER_LAYER = re.compile(r"embed|(^|/)(stem|head|classifier)")
_FEW_CHANNELS = 4


def muon_dimension_numbers(params: PyTree) -> PyTree:
    """How Muon sees each parameter as a matrix [inputs, outputs]; None for those that Adam takes.

    Muon gets the 2-D kernels, and the 4-D kernels [height, width, inputs, outputs] with all but the last axis as
    inputs. Adam gets embeddings, stem, head, biases, norms, and convolutions that see at most 4 channels at a time
    (of an image, or depthwise and narrow grouped ones): they are no wide linear maps.
    """

    def dimension_numbers(path: str, param: jax.Array) -> MuonDimensionNumbers | None:
        if path.rpartition("/")[2] != "kernel" or _OUTER_LAYER.search(path):
            return None
        if param.ndim == 2:
            return MuonDimensionNumbers(0, 1)
        if param.ndim == 4 and param.shape[2] > _FEW_CHANNELS:
            return MuonDimensionNumbers((0, 1, 2), 3)
        return None

    return _map_with_path(dimension_numbers, params)


def _multipliers(pairs: tuple[tuple[str, float], ...], params: PyTree) -> PyTree:
    """The learning-rate multiplier of every parameter, a tree of floats."""
    compiled = [_compile(pair) for pair in pairs]
    paths = jax.tree.leaves(_map_with_path(lambda path, _: path, params))
    for pattern, _ in compiled:
        if not any(map(pattern.search, paths)):
            raise UserError(
                f"config.optimizer.multipliers: '{pattern.pattern}' is found in no parameter's path; "
                f"paths look like '{paths[0]}'"
            )
    return _map_with_path(
        lambda path, _: next((number for pattern, number in compiled if pattern.search(path)), 1.0), params
    )


def _compile(pair: tuple[str, float]) -> tuple[re.Pattern, float]:
    try:
        text, number = pair
        pattern, number = re.compile(text), float(number)
    except re.error as error:
        raise UserError(f"config.optimizer.multipliers: '{text}' is not a regular expression: {error}") from None
    except (TypeError, ValueError):
        raise UserError(f"config.optimizer.multipliers: {pair!r} is not a pair ('regex', number)") from None
    _require(0 <= number <= 1e6, "optimizer.multipliers", pair, "a regex and a number in [0, 1e6]")
    return pattern, number


def _map_with_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Maps function('/'-joined path, leaf) over a tree."""
    return jax.tree.map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree
    )


def plateau_init(schedule_config) -> optax.contrib.ReduceLROnPlateauState | None:
    """The state of the 'plateau' schedule, whose `scale` is the factor on the rate; None for any other schedule."""
    if schedule_config.name != "plateau":
        return None
    return _reduce_on_plateau(schedule_config).init(jnp.zeros((), jnp.float32))


def plateau_update(
    schedule_config, state: optax.contrib.ReduceLROnPlateauState, value: float, maximize: bool
) -> optax.contrib.ReduceLROnPlateauState:
    """Returns the state after one more evaluation gave the metric `value`.

    `scale` is multiplied by `factor` at the `patience`-th evaluation in a row that did not beat the best one so far,
    and the count starts again. NaN beats nothing.
    """
    value = jnp.asarray(-value if maximize else value, jnp.float32)
    _, state = _reduce_on_plateau(schedule_config).update((), jax.tree.map(jnp.asarray, state), value=value)
    return state


def _reduce_on_plateau(schedule_config) -> optax.GradientTransformationExtraArgs:
    factor, patience = schedule_config.factor, schedule_config.patience
    _require(0 < factor < 1, "schedule.factor", factor, "between 0 and 1 for 'plateau'")
    _require(patience >= 1, "schedule.patience", patience, "at least 1")
    # A relative tolerance would have the wrong sign for the negated value of a metric to maximise. optax wants one of
    # the two above 0; this one is too small to matter.
    return optax.contrib.reduce_on_plateau(factor, patience, rtol=0.0, atol=1e-12)


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array | int) -> PyTree:
    """Returns d * ema + (1 - d) * params with d = min(decay, (1 + step) / (10 + step)).

    `step` counts from 0: the update that made `params`. The warm-up of d forgets the initial parameters, which a
    constant decay would keep for 1 / (1 - decay) steps (as `ExponentialMovingAverage` of TensorFlow does).
    """
    # 1 - d, written so that a decay near 1 loses no digits in float32.
    weight = jnp.maximum(1 - decay, 9 / (10 + step))
    return optax.incremental_update(params, ema, weight)


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"config.{key}={value!r} is impossible; it must be {expected}")
