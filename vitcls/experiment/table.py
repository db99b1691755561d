"""What a table holds: named runs, times seeds."""

import collections
import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from vitcls import config as configs
from vitcls import config_file
from vitcls.core import errors
from vitcls.core.errors import UserError
from vitcls.metrics import METRICS

FACTS = {  # of metrics.json that are no metrics: head and format of a column
    "parameters": ("Parameters", "{:,.0f}"),
    "flops_per_image": ("FLOPs per image", "{:.3g}"),
    "latency_ms": ("Latency, ms", "{:.3g}"),
    "train_seconds": ("Training, s", "{:.0f}"),
}
_NAME = re.compile(r"[\w+.=-]+")
_LONGEST = 200  # bytes
_SEED = "-seed"  # between a row and its seed in the name of a run


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe of a table."""

    name: str  # of its directory too: letters, digits, and + - . = _
    config: ConfigDict  # as `default_config` makes it; the seed is the table's business
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)  # metric -> what the paper prints
    x: float | None = None  # place on the axis of the plot, where there is one
    series: Sequence[str] = ("",)  # the lines of that plot that it is a point of
    part: str = ""  # rows with the same title are compared, in a table of their own


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that are run with the same seeds under one budget."""

    title: str
    about: str  # what is asked, the paper and its table, and the budget, in a few sentences
    rows: Sequence[Row]
    seeds: Sequence[int] = (0, 1, 2)
    metrics: Sequence[str] = ("accuracy", "f1_macro", "auc_ovr_macro")  # columns
    facts: Sequence[str] = ()  # more columns, of FACTS
    x_label: str = ""  # of the axis of `Row.x`; with a scale of powers of two
    pooled: bool = False  # the rows are folds, which together are one evaluation
    equal_time: bool = False  # then every row again with as much training time as the median row, in a part of its own


@dataclasses.dataclass(frozen=True)
class Run:
    """A row with a seed, and the workdir where it lives."""

    row: Row
    seed: int
    workdir: pathlib.Path
    overrides: tuple[tuple[str, str], ...] = ()  # of every run

    @property
    def name(self) -> str:
        return self.workdir.name

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The resolved config; raises UserError where it cannot work."""
        config = self.row.config.copy_and_resolve_references()
        for key, text in self.overrides:
            config_file.override(config, key, text)
        config.seed = self.seed
        config = configs.resolve(config)
        configs.validate(config)
        return config


def load(file: os.PathLike | str) -> Table:
    """The table of 'PATH' or 'PATH:PRESET'; raises UserError for what is wrong with the file or a row."""
    table = config_file.call(file, "get_table")
    if not isinstance(table, Table):
        raise UserError(f"get_table() of {file} does not return a vitcls.experiment.Table")
    names = [row.name for row in table.rows]
    if not names or not table.seeds:
        raise UserError(f"the table of {file} has no {'seeds' if names else 'rows'}")
    for seed in table.seeds:
        if not isinstance(seed, int):
            raise UserError(f"the seeds of {file} must be whole numbers, and one is {seed!r}")
    for name, count in collections.Counter(names).items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(os.fsencode(name)) > _LONGEST:
            raise UserError(
                f"the row '{str(name)[:80]}' of {file} cannot be the name of a directory; use letters and + - . = _, "
                f"and not more than {_LONGEST}"
            )
        if count > 1:
            raise UserError(f"two rows of {file} have the name '{name}'; give each its own")
    for row in table.rows:
        for metric in (*table.metrics, *row.paper):
            if metric not in METRICS:
                raise errors.unknown(f"metric of {file}", metric, METRICS)
    for fact in table.facts:
        if fact not in FACTS:
            raise errors.unknown(f"fact of {file}", fact, FACTS)
    return table


def runs_of(
    table: Table,
    directory: pathlib.Path,
    *,
    only: str = "",
    seeds: Sequence[int] = (),
    overrides: Sequence[tuple[str, str]] = (),
) -> list[Run]:
    """All runs, every row with the first seed before any with the second; raises UserError for a row that cannot work.

    `only` is a regular expression that a run's name must contain; `seeds` are others than the table's; `overrides`
    are other values for keys of every config.
    """
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise UserError(
            f"--only='{only}' is no regular expression: {error}; a \\ before a + takes it as it is"
        ) from None
    runs = [
        Run(row, seed, directory / "runs" / f"{row.name}{_SEED}{seed}", tuple(overrides))
        for seed in seeds or table.seeds
        for row in table.rows
    ]
    chosen = [run for run in runs if wanted.search(run.name)]
    if not chosen:
        raise errors.unknown("--only", only, [run.name for run in runs])
    for run in chosen:
        try:
            _ = run.config
        except UserError as error:
            raise UserError(f"the run '{run.name}': {error}") from None
    return chosen


def begun(table: Table, directory: pathlib.Path, overrides: Sequence[tuple[str, str]]) -> list[Run]:
    """The runs of a table that are in its directory; raises UserError where all there are of another."""
    rows = {row.name: row for row in table.rows}
    names = sorted(path.name for path in (directory / "runs").glob("*") if path.is_dir())
    runs = []
    for name in names:
        row, _, seed = name.rpartition(_SEED)
        if row in rows and re.fullmatch(r"-?\d+", seed):
            runs.append(Run(rows[row], int(seed), directory / "runs" / name, tuple(overrides)))
    if names and not runs:
        raise UserError(f"{directory} holds the runs of another table, such as {names[0]}; use another --workdir")
    return runs


def row_of(run: str) -> str:
    """The row of a run, by their names."""
    return run.rpartition(_SEED)[0]
