"""unknown.json and unknown.npz of a workdir: which images are unlike anything seen in training."""

import dataclasses
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from vitcls.core.errors import UserError
from vitcls.metrics.unknown import SCORES, Outputs
from vitcls.training import run_dir
from vitcls.training.files import UNKNOWN_ARRAYS, UNKNOWN_FILE


@dataclasses.dataclass(frozen=True)
class Novelty:
    """Of one checkpoint: a score of `metrics.unknown`, and from where on an image is known."""

    checkpoint_step: int
    name: str  # of SCORES
    score: Any
    threshold: float
    kept: float  # the share of validation images that are known by it

    def unknown(self, outputs: Outputs) -> np.ndarray:
        """bool [N]."""
        return self.score(outputs) < self.threshold

    def distance(self, outputs: Outputs) -> np.ndarray:
        """How unlike what was seen, float64 [N]; above -threshold it is unknown."""
        return -self.score(outputs)


def write(path: pathlib.Path, novelty: Novelty) -> None:
    """Writes it into the workdir `path`; the arrays first, so that the JSON is never of others."""
    fields = {field.name: getattr(novelty.score, field.name) for field in dataclasses.fields(novelty.score)}
    temporary = path / f"{UNKNOWN_ARRAYS}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, checkpoint_step=novelty.checkpoint_step, **fields)
    (path / UNKNOWN_FILE).unlink(missing_ok=True)
    os.replace(temporary, path / UNKNOWN_ARRAYS)
    values = {"checkpoint_step": novelty.checkpoint_step, "score": novelty.name, "threshold": novelty.threshold}
    run_dir.write_atomically(path / UNKNOWN_FILE, json.dumps(values | {"kept": novelty.kept}, indent=2) + "\n")


def read(path: pathlib.Path) -> Novelty | None:
    """That of the workdir `path`; None where there is none. Raises UserError where it cannot be used."""
    try:
        values = json.loads((path / UNKNOWN_FILE).read_text(encoding="utf-8"))
        kind = SCORES[values["score"]]
        with open(path / UNKNOWN_ARRAYS, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            if int(arrays["checkpoint_step"]) != values["checkpoint_step"]:
                raise ValueError("its two files are of different checkpoints")
            fields = {field.name: arrays[field.name] for field in dataclasses.fields(kind)}
        score = kind(**{name: value if value.ndim else value.item() for name, value in fields.items()})
        return Novelty(values["checkpoint_step"], values["score"], score, values["threshold"], values["kept"])
    except FileNotFoundError as error:
        if error.filename == str(path / UNKNOWN_FILE):
            return None
        raise UserError(f"{path / UNKNOWN_ARRAYS} is not there; run vitcls unknown again") from None
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path / UNKNOWN_FILE} cannot be used ({type(error).__name__}: {error}); run vitcls unknown again"
        ) from None
