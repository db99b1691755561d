"""An exported file beside its run, on the same test images: what it answers in a process of its own."""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np

from vitcls.core.errors import RunError
from vitcls.export import artefact, verify

# How far a probability may be from what JAX computes of the same weights: the unit roundoff of float16, so that no
# runtime's order of summation shows in an answer of 16 bits. Calibration may multiply logarithms.
TOLERANCE = 2.0**-11
MOST_LOST = 0.01  # of accuracy, or one image, by rounding


class Passport(NamedTuple):
    """How an exported file compares with its run, on the same test images."""

    images: int
    largest_difference: float  # of probabilities, from the run, or the network with the weights that were not set to 0
    agreement: float  # the share of images to which both give one class
    accuracy_run: float
    accuracy: float
    bytes: int
    seconds: dict[str, float]  # by batch size


class Expected(NamedTuple):
    """Test images uint8 [N, H, W, C], their labels, and the probabilities that JAX computes of them."""

    images: np.ndarray
    labels: np.ndarray
    of_run: np.ndarray
    of_whole: np.ndarray  # of the run, or, where weights were set to 0, of the network without them
    of_network: np.ndarray  # of these weights, computed in the dtype of the file
    of_rounded: np.ndarray  # the network with rounded weights: see Job.rounding

    def accuracy(self, probabilities: np.ndarray) -> float:
        return float(np.mean(probabilities.argmax(axis=1) == self.labels))

    def tolerance(self, precision: str, by_tools: bool) -> float:
        """How far a probability of the file may be from what JAX computes.

        A runtime's own tools round more than the weights: to int8 what the layers give, of which accuracy alone tells;
        to float16 weights with norms in them, which may change as much as the coarser weights of `of_rounded` do.
        """
        if not by_tools:
            return TOLERANCE
        return 1.0 if precision == "int8" else TOLERANCE + float(np.abs(self.of_rounded - self.of_network).max())


def answers(place: pathlib.Path, images: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """What a file gives for images in a fresh process, and its seconds by batch size; raises RunError without."""
    with tempfile.TemporaryDirectory(prefix="vitcls-export-") as folder:
        given, found = (pathlib.Path(folder, f"{name}.npy") for name in ("images", "answers"))
        np.save(given, images)
        command = [sys.executable, "-m", verify.__name__, str(place), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "no word").splitlines()[-1]
            raise RunError(f"the exported file cannot be used in a process of its own, and is not written: {said}")
        return np.load(found), json.loads(done.stdout.splitlines()[-1])


def compare(place: pathlib.Path, expected: Expected, precision: str, by_tools: bool) -> tuple[Passport, str]:
    """What the file answers beside what the run does, and what is wrong with that: nothing is ''.

    `by_tools`: the runtime's own tools have made the weights smaller.
    """
    given, seconds = answers(place, expected.images)
    ours = expected.of_network if by_tools else expected.of_rounded
    difference = np.abs(given - ours).max(axis=1)
    passport = Passport(
        images=len(given),
        largest_difference=float(np.abs(given - expected.of_whole).max()),
        agreement=float(np.mean(given.argmax(axis=1) == expected.of_whole.argmax(axis=1))),
        accuracy_run=expected.accuracy(expected.of_run),
        accuracy=expected.accuracy(given),
        bytes=artefact.size(place),
        seconds=seconds,
    )
    tolerance = expected.tolerance(precision, by_tools)
    lost = expected.accuracy(expected.of_network) - passport.accuracy
    if not difference.max() <= tolerance:  # also where it is no number
        return passport, (
            f"the probabilities of {np.sum(~(difference <= tolerance)):,} of {len(given):,} test images differ by more "
            f"than {tolerance:.2g}, at most by {difference.max():.2g}"
        )
    if lost > max(MOST_LOST, 1 / len(given)) + 1e-9:
        return passport, f"it loses {100 * lost:.1f} points of accuracy by {precision}"
    return passport, ""
