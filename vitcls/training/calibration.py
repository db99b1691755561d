"""calibration.json of a workdir: how its probabilities are made honest, and what may be promised of its answers."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.metrics import promises, scaling
from vitcls.training import run_dir
from vitcls.training.files import CALIBRATION_FILE


@dataclasses.dataclass(frozen=True)
class SetPromise:
    """Sets that hold the truth of `coverage` of the images."""

    coverage: float
    threshold: float
    penalty: float
    free: int

    def sets(self, probabilities: np.ndarray) -> np.ndarray:
        """bool [N, K]."""
        return promises.label_sets(probabilities, self.threshold, promises.Regularization(self.penalty, self.free))


@dataclasses.dataclass(frozen=True)
class AnswerPromise:
    """Answers of which `accuracy` are right, given only where the confidence is at least `threshold`."""

    accuracy: float
    threshold: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Of one checkpoint, fitted and promised on its validation split."""

    checkpoint_step: int
    scaling: scaling.Scaling
    sets: tuple[SetPromise, ...] = ()
    answers: tuple[AnswerPromise, ...] = ()
    held_out: int = 0  # validation examples that the promises are of
    certainty: float = promises.CERTAINTY  # of the promises of answers

    def set_promise(self, coverage: float) -> SetPromise:
        """Raises UserError where there is none of this coverage."""
        return self._find("coverage", coverage)

    def answer_promise(self, accuracy: float) -> AnswerPromise:
        """Raises UserError where there is none of this accuracy."""
        return self._find("accuracy", accuracy)

    def _find(self, kind: str, wanted: float) -> Any:
        """The promise of a share; the line of what is not there has a command that keeps those that are."""
        promised = {"coverage": self.sets, "accuracy": self.answers}
        for promise in promised[kind]:
            if abs(getattr(promise, kind) - wanted) < 1e-9:
                return promise
        shares = {name: [getattr(promise, name) for promise in promises] for name, promises in promised.items()}
        there = ", ".join(f"{share:g}" for share in shares[kind]) or "nothing"
        line = f"{CALIBRATION_FILE} does not promise --{kind}={wanted:g}; it promises {there}"
        if not promises.can_be_asked(wanted):
            raise UserError(f"{line}. A promise is from 0.5 to below 1")
        shares[kind] = sorted([*shares[kind], wanted])
        flags = " ".join(f"--{name}={','.join(f'{s:g}' for s in found)}" for name, found in shares.items() if found)
        raise UserError(f"{line}. To have it too, run vitcls calibrate {flags}; it says how many images that takes")


def write(path: pathlib.Path, calibration: Calibration) -> None:
    """Writes it into the workdir `path`."""
    values = dataclasses.asdict(calibration) | {"scaling": scaling.to_json(calibration.scaling)}
    run_dir.write_atomically(path / CALIBRATION_FILE, json.dumps(values, indent=2) + "\n")


def read(path: pathlib.Path) -> Calibration | None:
    """That of the workdir `path`; None where there is none. Raises UserError where it cannot be used."""
    try:
        values = json.loads((path / CALIBRATION_FILE).read_text(encoding="utf-8"))
        return Calibration(
            **values
            | {
                "scaling": scaling.from_json(values["scaling"]),
                "sets": tuple(SetPromise(**promise) for promise in values["sets"]),
                "answers": tuple(AnswerPromise(**promise) for promise in values["answers"]),
            }
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path / CALIBRATION_FILE} cannot be used ({type(error).__name__}: {error}); run vitcls calibrate again"
        ) from None


def read_for(path: pathlib.Path, step: int) -> Calibration:
    """That of a checkpoint; raises UserError where there is none."""
    found = read(path)
    if found is None:
        raise UserError(f"{path} has no {CALIBRATION_FILE}; run vitcls calibrate --workdir={path} first")
    if found.checkpoint_step != step:
        raise UserError(
            f"{path / CALIBRATION_FILE} is of the checkpoint {found.checkpoint_step}, not {step}; run vitcls calibrate "
            "again"
        )
    return found
