"""What a run knows of its course besides the arrays: kept as the JSON record of every checkpoint."""

import dataclasses
import math
import sys
from collections.abc import Mapping

from flax.training.early_stopping import EarlyStopping

from vitcls.metrics import higher_is_better


@dataclasses.dataclass(frozen=True)
class Progress:
    """Seconds of training, the best evaluation so far and how long ago it was."""

    train_seconds: float = 0.0  # without compilation, evaluation and saving; over all restarts
    interval_seconds: float = 0.0  # the part since the last log
    best: float | None = None  # of config.checkpoint.metric
    improved: bool = False  # whether the last evaluation was the best
    early_stopping: EarlyStopping = dataclasses.field(default_factory=EarlyStopping)
    finished: bool = False  # stopped early

    def trained(self, seconds: float) -> "Progress":
        return dataclasses.replace(
            self,
            train_seconds=self.train_seconds + seconds,
            interval_seconds=self.interval_seconds + seconds,
        )

    def next_interval(self) -> "Progress":
        return dataclasses.replace(self, interval_seconds=0.0)

    def interval_event(self, sums: dict[str, float], batch_size: int, means: Mapping[str, str]) -> dict[str, float]:
        """The event of a logging interval from its sums (steps.zero_sums): means over examples and updates.

        `means`: those of the task, name -> which of the sums.
        """
        count, updates = float(sums["count"]), float(sums["updates"])
        event = {}
        if updates:
            event = {
                "train/loss": float(sums["loss"]) / count,
                "train/l2": float(sums["l2"]) / count,
                **{f"train/{name}": float(sums[key]) / count for name, key in means.items()},
                "train/gradient_norm": float(sums["gradient_norm"]) / updates,
            }
        tried = updates + float(sums["skipped"])
        return event | {
            "train/skipped": float(sums["skipped"]),
            "train/images_per_second": tried * batch_size / max(self.interval_seconds, 1e-9),
            "train/seconds": self.train_seconds,
        }

    def evaluated(self, scores: dict[str, float], config) -> "Progress":
        """Takes note of an evaluation: is it the best, and has early stopping run out of patience?

        A score that is not a number is never the best.
        """
        score = scores[config.checkpoint.metric]
        improved = not math.isnan(score) and (
            self.best is None
            or (score > self.best if higher_is_better(config.checkpoint.metric) else score < self.best)
        )
        early_stopping = self.early_stopping
        if config.early_stopping.patience:
            watched = scores[config.early_stopping.metric]
            watched = -watched if higher_is_better(config.early_stopping.metric) else watched
            if math.isnan(watched):
                watched = sys.float_info.max  # beaten by every number
            # flax's patience counts the evaluations that may fail before the one that stops the run.
            early_stopping = dataclasses.replace(
                early_stopping,
                patience=config.early_stopping.patience - 1,
                min_delta=config.early_stopping.min_delta,
            ).update(watched)
        return dataclasses.replace(
            self,
            best=score if improved else self.best,
            improved=improved,
            early_stopping=early_stopping,
            finished=early_stopping.should_stop,
        )

    def to_record(self) -> dict:
        """As plain JSON."""
        best = self.early_stopping.best_metric
        return {
            "train_seconds": self.train_seconds,
            "interval_seconds": self.interval_seconds,
            "best": self.best,
            "finished": self.finished,
            "early_stopping": {
                "best_metric": best if math.isfinite(best) else None,
                "patience_count": self.early_stopping.patience_count,
            },
        }

    @classmethod
    def from_record(cls, record: dict) -> "Progress":
        """What `to_record` was made of."""
        stopping = record["early_stopping"]
        best = math.inf if stopping["best_metric"] is None else stopping["best_metric"]
        return cls(
            train_seconds=record["train_seconds"],
            interval_seconds=record["interval_seconds"],
            best=None if record["best"] is None or math.isnan(record["best"]) else record["best"],
            finished=record["finished"],
            early_stopping=EarlyStopping(best_metric=best, patience_count=stopping["patience_count"]),
        )
