"""What came of a search: the best config, a table, and plots of history, importance and slices."""

import json
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from vitcls.metrics import higher_is_better
from vitcls.report.comparison import markdown_table
from vitcls.training import run_dir
from vitcls.tune.search import Trial
from vitcls.tune.space import Choice, Space, apply

BEST_CONFIG = "best_config.py"


def write(
    directory: pathlib.Path, trials: Sequence[Trial], space: Space, metric: str, config: ConfigDict
) -> Trial | None:
    """Writes best_config.py, trials.md and the plots; returns the best trial, None where none has a score."""
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        return None
    maximize = higher_is_better(metric)
    finished = [trial for trial in scored if trial.state == "finished"] or scored
    best = (max if maximize else min)(finished, key=lambda trial: trial.score)
    run_dir.write_atomically(directory / BEST_CONFIG, best_config(best, metric, config))
    run_dir.write_atomically(directory / "trials.md", to_markdown(trials, space, metric))
    _draw(directory, scored, space, metric)
    return best


def best_config(best: Trial, metric: str, config: ConfigDict) -> str:
    """A config file that `vitcls train` takes as it is; its report is of the test split again."""
    resolved = apply(config, best.values)
    resolved.report.update(split=config.report.split, timing=config.report.timing)
    text = json.dumps(resolved.to_dict(), indent=4)
    return (
        f'"""The best of a search: trial {best.number:04d}, {metric} {best.score:.4f} on the validation split."""\n\n'
        "from vitcls import config\n\n"
        f'CONFIG = r"""\n{text}\n"""\n\n\n'
        "def get_config():\n    return config.from_json(CONFIG)\n"
    )


def to_markdown(trials: Sequence[Trial], space: Space, metric: str) -> str:
    """A line for each trial."""
    head = ["Trial", "State", metric, *space.keys, "seconds"]
    rows = []
    for trial in trials:
        score = "" if trial.score is None else f"{trial.score:.4f}"
        values = [f"{trial.values.get(key, '')}" for key in space.keys]
        rows.append([f"{trial.number:04d}", trial.state, score, *values, f"{trial.seconds:.0f}"])
    return markdown_table(head, rows) + "\n"


def importance(trials: Sequence[Trial], space: Space) -> dict[str, float]:
    """The share of the variance of the score that each key alone explains, of a forest of trees (Hutter et al. 2014).

    By the forest's decrease of variance; {} for fewer than eight trials, of which nothing can be said.
    """
    if len(trials) < _FEWEST:
        return {}
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    columns = [[_number(space.keys[key], trial.values.get(key)) for key in space.keys] for trial in trials]
    forest = RandomForestRegressor(64, random_state=0).fit(np.array(columns), [trial.score for trial in trials])
    return dict(zip(space.keys, map(float, forest.feature_importances_), strict=True))


_FEWEST = 8


def _number(what, value) -> float:
    if value is None:
        return -1.0
    return float(list(what.values).index(value)) if isinstance(what, Choice) else float(value)


def _draw(directory: pathlib.Path, trials: Sequence[Trial], space: Space, metric: str) -> None:
    from vitcls.report import plots, search_plots

    points = [(trial.number, dict(trial.values), trial.score, trial.state == "pruned") for trial in trials]
    logs = {key for key, what in space.keys.items() if getattr(what, "log", False)}
    drawings = {
        "history": lambda: search_plots.history(points, metric, maximize=higher_is_better(metric)),
        "importance": lambda: search_plots.importance(importance(trials, space)),
        "slices": lambda: search_plots.slices(points, metric, logs),
    }
    for name, draw in drawings.items():
        figure = plots.styled(draw)
        if figure is not None:
            figure.savefig(directory / f"{name}.png", dpi=150)
