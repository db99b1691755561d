"""What n trials of a random search find, and n trials of a grid, from a grid that has been searched whole.

    python -m benchmarks.search_orders --workdir=DIR [--orders=10000]

DIR is that of `vitcls tune --method=grid` with a metric of which more is better; the trials that have finished must be
all combinations of the values that were tried. A grid runs through its values in some order, which nobody knows to be
the good one: so the keys, and the values of each, are put in many random orders. The random search draws combinations
without repetition; its mean is exact. Bergstra & Bengio 2012 compare the two so.
"""

import math
import pathlib
import sys

import numpy as np

from benchmarks import harness
from vitcls import cli, ledger
from vitcls.core.errors import UserError
from vitcls.tune import search


def read(workdir: str) -> np.ndarray:
    """The scores of a grid: an axis for each key, in their order; raises UserError where some are missing."""
    trials = search.ended_of(ledger.read("", pathlib.Path(workdir)))
    if not trials:
        raise UserError(f"--workdir={workdir} holds no search")
    points = [tuple(map(str, trial.values.values())) for trial in trials]
    values = [list(dict.fromkeys(column)) for column in zip(*points, strict=True)]
    scores = np.full([len(of_key) for of_key in values], np.nan)
    for point, trial in zip(points, trials, strict=True):
        if trial.state == "finished" and trial.score is not None:  # one that was pruned is of less training
            scores[tuple(map(list.index, values, point))] = trial.score
    missing = np.count_nonzero(np.isnan(scores))
    if missing:
        raise UserError(
            f"--workdir={workdir} is no whole grid: {missing:,} of {scores.size:,} combinations have no score"
        )
    return scores


def expected_best(scores: np.ndarray, count: int) -> float:
    """The mean of the best of `count` different ones of N scores that are drawn at random."""
    ascending = np.sort(scores, axis=None)
    ways = math.comb(ascending.size, count)
    return sum(score * (math.comb(rank, count - 1) / ways) for rank, score in enumerate(ascending))


def best_so_far(scores: np.ndarray, orders: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(random search, grid), float [orders, N]: the best after each trial, in `orders` random orders of each."""
    rng = np.random.default_rng(seed)
    drawn, in_turn = np.empty((2, orders, scores.size))
    for i in range(orders):
        drawn[i] = rng.permutation(scores.ravel())
        grid = scores[np.ix_(*map(rng.permutation, scores.shape))]
        in_turn[i] = grid.transpose(rng.permutation(scores.ndim)).ravel()
    return np.maximum.accumulate(drawn, axis=1), np.maximum.accumulate(in_turn, axis=1)


def rows(scores: np.ndarray, orders: int) -> list[harness.Row]:
    own = np.maximum.accumulate(scores.ravel())
    drawn, in_turn = best_so_far(scores, orders)
    counts = sorted({*(2**i for i in range(scores.size.bit_length()) if 2**i < scores.size), scores.size})
    return [
        {
            "trials": count,
            "random, mean best": expected_best(scores, count),
            "grid in any order, mean best": in_turn[:, count - 1].mean(),
            "this grid, best": own[count - 1],
            "random better": np.mean(drawn[:, count - 1] > in_turn[:, count - 1]),
            "grid better": np.mean(drawn[:, count - 1] < in_turn[:, count - 1]),
        }
        for count in counts
    ]


def main(argv: list[str]) -> None:
    flags = cli.Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--out", default="", help="directory for JSON, CSV and Markdown")
    flags.add_argument("--workdir", required=True, metavar="DIR", help="of vitcls tune --method=grid")
    flags.add_argument("--orders", type=int, default=10_000, metavar="N", help="random orders of each")
    args = flags.parse_args(argv)
    harness.publish("search_orders", rows(read(args.workdir), args.orders), args.out)


if __name__ == "__main__":
    sys.exit(cli.run(main))
