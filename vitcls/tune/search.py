"""Which values a trial has: a function of the seed and of the trials that ended before it, and of nothing else.

Optuna proposes them, in a study that is made anew for each trial from the ledger. So a search that was killed goes on
as if nothing had happened, with one worker to the bit.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vitcls.core import extras
from vitcls.ledger import Entry
from vitcls.tune.space import Choice, Number, Space

METHODS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "hyperband")
_GRID_POINTS = 5  # of a range
_DRAWS = 20  # for values that were not tried yet
_MANY = 10_000  # combinations, which no search tries


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial that has ended: its number, values, and the scores of its validations by step."""

    number: int
    values: Mapping[str, Any]
    scores: Mapping[str, float]  # step -> score
    state: str  # 'finished', 'pruned', 'failed'
    cost: float | None = None  # of a finished trial, where the space names one
    seconds: float = 0.0
    error: str = ""

    @property
    def score(self) -> float | None:
        """That of the last validation; None where there is none that is a number."""
        last = list(self.scores.values())[-1:]
        return last[0] if last and last[0] is not None and math.isfinite(last[0]) else None


def optuna():
    """The library; raises UserError without it."""
    with extras.needed("vitcls tune", "tune"):
        import optuna as library
    library.logging.set_verbosity(library.logging.ERROR)
    return library


def ended_of(entries: Mapping[str, Entry]) -> list[Trial]:
    """The trials that have ended, by number."""
    return [
        Trial(int(name), **entry.data, seconds=entry.seconds, error=_error(entry))
        for name, entry in sorted(entries.items())
        if entry.code is not None
    ]


def _error(entry: Entry) -> str:
    return entry.last_line if entry.data["state"] == "failed" else ""


def scored(trials: Sequence[Trial], space: Space) -> list[Trial]:
    """Those with all that a search goes by: a score, and a cost where the space names one."""
    return [trial for trial in trials if trial.score is not None and (not space.cost or trial.cost is not None)]


def front(trials: Sequence[Trial], *, maximize: bool) -> list[Trial]:
    """The Pareto front of scored trials, the cheapest first.

    No other trial is better than one of these in one objective and at least as good in the other.
    """
    points = sorted((trial.cost, -trial.score if maximize else trial.score, trial.number, trial) for trial in trials)
    kept: list[tuple] = []
    for point in points:
        if not kept or point[1] < kept[-1][1] or point[:2] == kept[-1][:2]:
            kept.append(point)
    return [trial for *_, trial in kept]


def propose(
    space: Space, method: str, seed: int, number: int, ended: Sequence[Trial], *, maximize: bool
) -> dict | None:
    """The values of trial `number`, given those that have ended; None where a grid has no more.

    What has ended is not proposed again where there is anything else that draws, or else a grid, can find.
    """
    if method == "grid":
        points = grid(space)
        return points[number] if number < len(points) else None
    tried = {json.dumps(trial.values) for trial in ended}
    values: dict[str, Any] = {}
    for again in range(_DRAWS):
        values = _draw(space, method, (seed * 1_000_003 + number + again * 7_919_993) % 2**31, ended, maximize)
        if json.dumps(values) not in tried:
            return values
    return next((point for point in _every(space) or grid(space) if json.dumps(point) not in tried), values)


def _draw(space: Space, method: str, seed: int, ended: Sequence[Trial], maximize: bool) -> dict[str, Any]:
    library = optuna()
    samplers = {"tpe": library.samplers.TPESampler, "random": library.samplers.RandomSampler}
    directions = ["maximize" if maximize else "minimize", *(["minimize"] if space.cost else [])]
    study = library.create_study(sampler=samplers[method](seed=seed), directions=directions)
    for trial in scored(ended, space):
        study.add_trial(_frozen(library, space, trial))
    trial = study.ask()
    values: dict[str, Any] = {}
    for key, what in space.keys.items():
        if _applies(what, values):
            values[key] = _suggest(trial, key, what)
    return values


def _suggest(trial, key: str, what: Choice | Number) -> Any:
    if isinstance(what, Choice):
        return what.values[trial.suggest_categorical(key, range(len(what.values)))]
    suggest = trial.suggest_int if what.whole else trial.suggest_float
    return suggest(key, what.low, what.high, log=what.log)


def _frozen(library, space: Space, trial: Trial):
    """A trial as Optuna knows it."""
    params = {}
    for key, value in trial.values.items():
        what = space.keys[key]
        params[key] = what.index(value) if isinstance(what, Choice) else value
    return library.trial.create_trial(
        params=params,
        distributions={key: _distribution(library, space.keys[key]) for key in params},
        values=[trial.score, *([trial.cost] if space.cost else [])],
    )


def _distribution(library, what: Choice | Number):
    if isinstance(what, Choice):
        return library.distributions.CategoricalDistribution(range(len(what.values)))
    kind = library.distributions.IntDistribution if what.whole else library.distributions.FloatDistribution
    return kind(what.low, what.high, log=what.log)


def combinations(space: Space) -> float:
    """How many values a trial may have; infinite where a key has a range that is not whole, or there are too many."""
    points = _every(space)
    return math.inf if points is None else len(points)


def _every(space: Space) -> list[dict[str, Any]] | None:
    """All that a trial may have; None where that has no end, or is more than any search tries."""
    points: list[dict[str, Any]] = [{}]
    for key, what in space.keys.items():
        applies = [_applies(what, point) for point in points]
        if not any(applies):
            continue
        values = what.values if isinstance(what, Choice) else range(what.low, what.high + 1) if what.whole else None
        if values is None or sum(applies) * len(values) > _MANY:
            return None
        points = [
            point | chosen
            for point, here in zip(points, applies, strict=True)
            for chosen in ([{key: value} for value in values] if here else [{}])
        ]
    return points


def grid(space: Space) -> list[dict[str, Any]]:
    """All combinations, of ranges five values each."""
    points: list[dict[str, Any]] = [{}]
    for key, what in space.keys.items():
        points = [
            point | ({key: value} if value is not None else {})
            for point in points
            for value in (_values(what) if _applies(what, point) else [None])
        ]
    return points


def _applies(what: Choice | Number, point: Mapping[str, Any]) -> bool:
    return all(point.get(other) == value for other, value in what.only_if.items())


def _values(what: Choice | Number) -> list[Any]:
    if isinstance(what, Choice):
        return list(what.values)
    shares = [i / (_GRID_POINTS - 1) for i in range(_GRID_POINTS)]
    if what.log:
        spread = [what.low * (what.high / what.low) ** share for share in shares]
    else:
        spread = [what.low + (what.high - what.low) * share for share in shares]
    return sorted({round(value) for value in spread}) if what.whole else [float(f"{value:.6g}") for value in spread]


def should_prune(pruner: str, scores: Mapping[str, float], ended: Sequence[Trial], *, maximize: bool) -> bool:
    """Whether a trial with these validations so far is not worth going on with.

    'median' (Golovin et al. 2017, section 3.5.2): its best so far is below the median of what the others had as their
    best by the same step; not before four have ended. 'hyperband': of Li et al. 2018 the one bracket that prunes the
    most, as successive halving, by which the better third goes on after 1, 3, 9, ... validations.
    """
    step = list(scores)[-1]
    others = [trial for trial in ended if trial.state != "failed" and step in trial.scores]
    if pruner == "none" or len(others) < _BEFORE_PRUNING:
        return False

    def best(by_step: Mapping[str, float | None]) -> float:
        known = [value for at, value in by_step.items() if int(at) <= int(step) and value is not None]
        return max((value if maximize else -value for value in known), default=-math.inf)

    bests, own = sorted(best(trial.scores) for trial in others), best(scores)
    if pruner == "median":
        return own < bests[len(bests) // 2]
    rungs = {3**power for power in range(20)}
    return len(scores) in rungs and own < bests[2 * len(bests) // 3]


_BEFORE_PRUNING = 4
