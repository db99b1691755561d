"""What came of a search: the best config, a table, plots, and with two objectives the Pareto front."""

import json
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from vitcls.metrics import higher_is_better
from vitcls.report.comparison import markdown_table
from vitcls.training import run_dir
from vitcls.tune import search
from vitcls.tune.search import Trial
from vitcls.tune.space import Choice, Space, apply

BEST_CONFIG = "best_config.py"
FRONT = "front"  # a directory of configs
TABLE = "trials.md"


def write(
    directory: pathlib.Path, trials: Sequence[Trial], space: Space, metric: str, config: ConfigDict
) -> Trial | None:
    """Writes trials.md, configs and plots; returns the best trial, None where none has a score."""
    maximize = higher_is_better(metric)
    scored = search.scored(trials, space)
    finished = [trial for trial in scored if trial.state == "finished"] or scored
    front = search.front(finished, maximize=maximize) if space.cost else []
    run_dir.write_atomically(directory / TABLE, to_markdown(trials, space, metric, front))
    if not scored:
        return None
    best = (max if maximize else min)(finished, key=lambda trial: trial.score)
    run_dir.write_atomically(directory / BEST_CONFIG, _config_file("The best", best, metric, config))
    _write_front(directory / FRONT, front, metric, config)
    _draw(directory, scored, front, space, metric)
    return best


def cost(workdir: pathlib.Path, name: str) -> float | None:
    """A cost of the run in a workdir, as its report has it; of a latency the median. None where there is no report."""
    try:
        value = json.loads((workdir / "report" / "metrics.json").read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError):
        return None
    return value["median"] if isinstance(value, dict) else value


def _config_file(what: str, trial: Trial, metric: str, config: ConfigDict) -> str:
    """A config file that `vitcls train` takes as it is; its report is of the test split again."""
    resolved = apply(config, trial.values)
    resolved.report.update(split=config.report.split, timing=config.report.timing)
    text = json.dumps(resolved.to_dict(), indent=4)
    return (
        f'"""{what} of a search: trial {trial.number:04d}, {metric} {trial.score:.4f} on the validation split."""\n\n'
        "from vitcls import config\n\n"
        f'CONFIG = r"""\n{text}\n"""\n\n\n'
        "def get_config():\n    return config.from_json(CONFIG)\n"
    )


def _write_front(folder: pathlib.Path, front: Sequence[Trial], metric: str, config: ConfigDict) -> None:
    """A config file for each member; those of an earlier front go."""
    texts = {f"{trial.number:04d}.py": _config_file("On the front", trial, metric, config) for trial in front}
    for path in folder.glob("*.py"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        folder.mkdir(exist_ok=True)
        run_dir.write_atomically(folder / name, text)


def to_markdown(trials: Sequence[Trial], space: Space, metric: str, front: Sequence[Trial]) -> str:
    """A line for each trial; before them, where there is a front, a line for each of its members."""
    every = _table(trials, space, metric)
    if not front:
        return every
    return f"# Pareto front\n\n{_table(front, space, metric)}\n# All trials\n\n{every}"


def _table(trials: Sequence[Trial], space: Space, metric: str) -> str:
    costs = [space.cost] if space.cost else []
    head = ["Trial", "State", metric, *costs, *space.keys, "seconds"]
    rows = []
    for trial in trials:
        score = "" if trial.score is None else f"{trial.score:.4f}"
        price = ["" if trial.cost is None else f"{trial.cost:.6g}" for _ in costs]
        values = [f"{trial.values.get(key, '')}" for key in space.keys]
        rows.append([f"{trial.number:04d}", trial.state, score, *price, *values, f"{trial.seconds:.0f}"])
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
    return float(what.index(value)) if isinstance(what, Choice) else float(value)


def _draw(directory: pathlib.Path, trials: Sequence[Trial], front: Sequence[Trial], space: Space, metric: str) -> None:
    from vitcls.report import plots, search_plots

    points = [(trial.number, dict(trial.values), trial.score, trial.state == "pruned") for trial in trials]
    logs = {key for key, what in space.keys.items() if getattr(what, "log", False)}
    drawings = {
        "history": lambda: search_plots.history(points, metric, maximize=higher_is_better(metric)),
        "importance": lambda: search_plots.importance(importance(trials, space)),
        "slices": lambda: search_plots.slices(points, metric, logs),
    }
    if front:
        costs, members = [trial.cost for trial in trials], [trial.number for trial in front]
        drawings["pareto"] = lambda: search_plots.pareto(points, costs, members, metric, space.cost)
    for name, draw in drawings.items():
        figure = plots.styled(draw)
        if figure is not None:
            figure.savefig(directory / f"{name}.png", dpi=150)
