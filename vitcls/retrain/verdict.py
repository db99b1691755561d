"""Is the challenger to be served? Not worse on the test split, and better on the corrections that were held out."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np

from vitcls import data, predict
from vitcls.core.errors import UserError
from vitcls.data import corrections
from vitcls.metrics.significance import mcnemar_exact_one_sided
from vitcls.training import run_dir
from vitcls.training.opened import open_with_data

ALPHA = 0.05  # a challenger that is no worse is called worse at most so often
FILE = "retraining.json"
_AT_A_TIME = 1_000  # images that are decoded


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What both runs get right, in images."""

    champion: str
    challenger: str
    test_images: int
    test_champion: int
    test_challenger: int
    test_lost: int  # only the champion is right
    test_won: int  # only the challenger is right
    p_worse: float  # one-sided exact McNemar, of so many lost or more
    held_out_images: int
    held_out_champion: int
    held_out_challenger: int

    @property
    def promoted(self) -> bool:
        return self.p_worse >= ALPHA and self.held_out_challenger > self.held_out_champion

    def words(self) -> str:
        """One paragraph."""
        test = (
            f"On the {self.test_images:,} test images the new run is right on {self.test_challenger:,} "
            f"({self.test_challenger / self.test_images:.2%}), the served one on {self.test_champion:,} "
            f"({self.test_champion / self.test_images:.2%}): {self.test_won:,} won, {self.test_lost:,} lost, so it is "
            f"{'not found worse' if self.p_worse >= ALPHA else 'worse'} (one-sided exact McNemar, p = "
            f"{self.p_worse:.3g}, alpha = {ALPHA:g})."
        )
        held_out = (
            f"Of {self.held_out_images:,} images with feedback that were held out it gets {self.held_out_challenger:,} "
            f"right, the served one {self.held_out_champion:,}."
        )
        return f"{test} {held_out} {'It is promoted.' if self.promoted else 'It is not promoted.'}"

    def write(self, workdir: pathlib.Path) -> None:
        values = dataclasses.asdict(self) | {"alpha": ALPHA, "promoted": self.promoted, "words": self.words()}
        run_dir.write_atomically(workdir / "report" / FILE, json.dumps(values, indent=2) + "\n")


def judge(champion: pathlib.Path, challenger: pathlib.Path, *, data_dir: str = "") -> Verdict:
    """Compares two runs on the test split and on the held-out corrections of the challenger."""
    root = challenger / run_dir.CORRECTIONS
    test, held_out = zip(*(_right(run, root, data_dir) for run in (champion, challenger)), strict=True)
    if len(test[0]) != len(test[1]):
        raise UserError(f"{champion} and {challenger} have other test splits, so that they cannot be compared")
    lost, won = np.count_nonzero(test[0] & ~test[1]), np.count_nonzero(test[1] & ~test[0])
    return Verdict(
        str(champion),
        str(challenger),
        len(test[0]),
        *(int(right.sum()) for right in test),
        int(lost),
        int(won),
        mcnemar_exact_one_sided(int(lost), int(won)),
        len(held_out[0]),
        *(int(right.sum()) for right in held_out),
    )


def _right(run: pathlib.Path, root: pathlib.Path, data_dir: str) -> tuple[np.ndarray, np.ndarray]:
    """Which test images and held-out corrections a run gets right as it is served, bool [N] each."""
    opened = open_with_data(run, splits=("test",), data_dir=data_dir)
    test, info = opened.dataset.test, opened.trained.info
    held_out = corrections.read(root, corrections.HELD_OUT, info.class_names, test.decoding)
    classify = predict.make_classifier(opened.trained)  # calibrated, which can change an answer
    return tuple(_answers(classify, split, info.image_shape) == split.labels for split in (test, held_out))


def _answers(classify: Callable, split: data.Split, image_shape: tuple[int, int, int]) -> np.ndarray:
    """The most probable classes, int [N], of some images at a time."""
    parts = np.array_split(np.arange(len(split.labels)), -(-len(split.labels) // _AT_A_TIME))
    return np.concatenate([classify(data.pixels(split.take(part), image_shape)).argmax(axis=1) for part in parts])
