"""Optimizers: each a frozen dataclass, whose fields are keys of `config.optimizer`.

`transform()` is the optimizer at learning rate 1. The train step multiplies its updates by schedule(step) times the
plateau scale, so that the rate enters in one place and follows the step count, whatever updates were skipped.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from vitcls.core.errors import UserError
from vitcls.core.registry import Registry, fill, require, require_durations, require_range
from vitcls.optim import pruning
from vitcls.optim.masks import decay_mask, muon_dimension_numbers, rate_multipliers

PyTree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Keys of `config.optimizer` whatever the optimizer."""

    learning_rate: float = 1e-3
    clip_norm: float = 0.0  # global norm; 0 for no clipping
    accumulate: int = 1  # the batch is processed in so many parts, one after the other
    ema_decay: float = 0.0  # EMA of parameters and batch statistics, used for evaluation; 0 for none
    multipliers: tuple = ()  # (('regex of parameter path', learning-rate multiplier), ...); 0 freezes
    base_batch_size: int = 0  # scale the learning rate by batch_size / base_batch_size; 0 for off
    prune: float = 0.0  # the share of each kernel's weights that is 0 in the end; 0 for none (Zhu & Gupta 2017)
    prune_begin: str = "0%"  # when the first of them go
    # When the last are gone; what follows is fine-tuning, and only that may be the best or stop early.
    prune_end: str = "70%"
    prune_every: str = "1%"

    def __post_init__(self):
        require(self, "learning_rate", 0 <= self.learning_rate <= 1e30, "a finite number, at least 0")
        require_range(
            self,
            clip_norm=(0, math.inf),
            accumulate=(1, math.inf),
            ema_decay=(0, 0.999999),
            base_batch_size=(0, math.inf),
            prune=(0, 0.999),
        )
        require_durations(self, "prune_begin", "prune_end", "prune_every")


def _check(entry: Any) -> None:
    for field in ("b1", "b2", "momentum"):
        if hasattr(entry, field):
            require(entry, field, 0 <= getattr(entry, field) < 1, "at least 0 and below 1")
    if hasattr(entry, "eps"):
        require(entry, "eps", 0 < entry.eps < math.inf, "above 0")
    require(entry, "weight_decay", 0 <= entry.weight_decay < math.inf, "a finite number, at least 0")


OPTIMIZERS = Registry(
    "config.optimizer",
    {
        "adam": "vitcls.optim.optimizers:Adam",
        "adamw": "vitcls.optim.optimizers:AdamW",
        "sgd": "vitcls.optim.optimizers:SGD",
        "lamb": "vitcls.optim.optimizers:LAMB",
        "lion": "vitcls.optim.optimizers:Lion",
        "muon": "vitcls.optim.optimizers:Muon",
    },
    shared=OptimizerSettings,
    check=_check,
)


def make_optimizer(
    config, params: PyTree, rates: PyTree | None = None, *, to_steps: Callable[[str], int] | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer at learning rate 1: updates times the learning rate are added to the parameters.

    In this order: gradients are clipped by their global norm, `config.name` makes updates of them, decoupled weight
    decay adds -weight_decay * parameter where `decay_mask` is true, and `config.multipliers` scale the sum. With
    `config.prune` the smallest weights of kernels go (see `pruning.prune`).

    `multipliers` are pairs (regex, number). A parameter takes the number of the first regex found (`re.search`) in
    its '/'-joined path, else 1. Parameters at 0 are frozen: no update, no decay, no moments, no part in the norm.

    Args:
      config: the block `optimizer` of a config.
      params: the parameters that are trained, or their shapes.
      rates: one more factor for each of them, as `parts.layer_rates` gives.
      to_steps: a duration in steps, for `config.prune`.

    Raises:
      UserError: for an unknown name or an impossible value, naming its key, and for a regex that finds nothing.
    """
    optimizer = OPTIMIZERS.check(config).transform()
    with OPTIMIZERS.about(config.name):
        multipliers = rate_multipliers(config.multipliers, params)
    if rates is not None:
        multipliers = jax.tree.map(lambda multiplier, rate: multiplier * rate, multipliers, rates)
    if config.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    used = set(jax.tree.leaves(multipliers))
    if 0.0 in used:
        labels = jax.tree.map(lambda multiplier: "trained" if multiplier else "frozen", multipliers)
        optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
    if used - {0.0, 1.0}:
        scale = optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: m * u, updates, multipliers))
        optimizer = optax.chain(optimizer, scale)
    settings = fill(OptimizerSettings, config, "config.optimizer")
    if not settings.prune:
        return optimizer
    return _pruned(optimizer, settings, to_steps, jax.tree.map(lambda multiplier: multiplier != 0, multipliers))


def _pruned(
    optimizer: optax.GradientTransformation,
    settings: OptimizerSettings,
    to_steps: Callable[[str], int],
    trained: PyTree,
) -> optax.GradientTransformation:
    begin, end = to_steps(settings.prune_begin), to_steps(settings.prune_end)
    if not begin <= end < to_steps("100%"):
        raise UserError(
            f"config.optimizer.prune_end='{settings.prune_end}' is impossible; it must be after prune_begin="
            f"'{settings.prune_begin}' and before the end, so that what is left is fine-tuned"
        )
    return pruning.prune(optimizer, settings.prune, begin, end, max(to_steps(settings.prune_every), 1), trained)


@dataclasses.dataclass(frozen=True)
class Adam:
    """Kingma & Ba 2015; its decay is the L2 term of the loss, config.loss.l2."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.weight_decay:
            raise ValueError(
                f"weight_decay={self.weight_decay} is not for 'adam'; set config.loss.l2 for an L2 term in the loss, "
                "or config.optimizer.name='adamw' for decoupled decay"
            )

    def transform(self) -> optax.GradientTransformation:
        return optax.adam(1.0, b1=self.b1, b2=self.b2, eps=self.eps)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Loshchilov & Hutter 2019."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; masked off biases, norms and embeddings

    def transform(self) -> optax.GradientTransformation:
        return optax.adamw(1.0, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=decay_mask)


@dataclasses.dataclass(frozen=True)
class SGD:
    """Momentum of Sutskever et al. 2013, with the decoupled decay of Loshchilov & Hutter 2019."""

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def transform(self) -> optax.GradientTransformation:
        return _decayed(optax.sgd(1.0, momentum=self.momentum or None, nesterov=self.nesterov), self.weight_decay)


@dataclasses.dataclass(frozen=True)
class LAMB:
    """You et al. 2020; the decay is part of what the trust ratio scales."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def transform(self) -> optax.GradientTransformation:
        return optax.lamb(1.0, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=decay_mask)


@dataclasses.dataclass(frozen=True)
class Lion:
    """Chen et al. 2023, who take b2 = 0.99."""

    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0

    def transform(self) -> optax.GradientTransformation:
        return optax.lion(1.0, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=decay_mask)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Jordan 2024, for the parameters of `muon_dimension_numbers`; Adam with b1 and b2 for the others.

    Orthogonal updates are scaled to the root mean square of Adam's, 0.2 (Liu et al. 2025), so that one learning rate
    serves both.
    """

    momentum: float = 0.9
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def transform(self) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            1.0,
            beta=self.momentum,
            nesterov=self.nesterov,
            eps=self.eps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            muon_weight_dimension_numbers=muon_dimension_numbers,
            consistent_rms=0.2,
        )
        return _decayed(muon, self.weight_decay)  # its Adam part has no mask for the decay


def _decayed(optimizer: optax.GradientTransformation, weight_decay: float) -> optax.GradientTransformation:
    return optax.chain(optimizer, optax.add_decayed_weights(-weight_decay, mask=decay_mask))
