"""What an evaluation means for the run: the best so far, and when to stop early."""

import math

import pytest

from vitcls.config import default_config
from vitcls.training.run_record import Progress


def evaluate(values, *, metric="eval/loss", patience=0):
    """The progress after evaluations that gave `values`, through the record of a checkpoint after each."""
    config = default_config("lenet5")
    config.checkpoint.metric = config.early_stopping.metric = metric
    config.early_stopping.patience = patience
    progress, improved = Progress(), []
    for value in values:
        progress = progress.evaluated({metric: value}, config)
        improved.append(progress.improved)
        progress = Progress.from_record(progress.to_record())
    return progress, improved


@pytest.mark.parametrize(("metric", "sign"), [("eval/loss", 1), ("eval/accuracy", -1)])
def test_what_is_not_a_number_is_never_the_best(metric, sign):
    progress, improved = evaluate([math.nan, sign * 3.0, math.nan, sign * 2.0, sign * 2.5], metric=metric)
    assert improved == [False, True, False, True, False]
    assert progress.best == sign * 2.0


def test_early_stopping_counts_what_is_not_a_number_as_a_failure():
    assert not evaluate([1.0, math.nan], patience=2)[0].finished
    assert evaluate([1.0, math.nan, math.nan], patience=2)[0].finished
    assert not evaluate([math.nan, math.nan, 5.0, 4.0], patience=3)[0].finished
    assert evaluate([math.nan] * 4, patience=3)[0].finished


def test_a_record_whose_best_is_not_a_number_starts_afresh():
    record = Progress().to_record() | {"best": math.nan}
    assert Progress.from_record(record).best is None
