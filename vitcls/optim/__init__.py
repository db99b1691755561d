"""Optimizers, learning-rate schedules, and the average of parameters."""

from vitcls.optim.ema import ema_update
from vitcls.optim.masks import decay_mask, muon_dimension_numbers
from vitcls.optim.optimizers import OPTIMIZERS, make_optimizer
from vitcls.optim.pruning import keep_pruned
from vitcls.optim.schedules import SCHEDULES, make_schedule, plateau_init, plateau_update

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "decay_mask",
    "ema_update",
    "keep_pruned",
    "make_optimizer",
    "make_schedule",
    "muon_dimension_numbers",
    "plateau_init",
    "plateau_update",
]
