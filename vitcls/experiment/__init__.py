"""Whole tables of training runs: what is compared, how it is run, and what came of it.

A file of configs/experiments/ has a function `get_table(preset)` that returns a `Table`.
"""

from vitcls.experiment.table import Row, Table

__all__ = ["Row", "Table"]
