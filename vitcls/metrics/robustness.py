"""What corruptions cost: errors over corruptions and severities, of one classifier or of two on the same images.

Hendrycks & Dietterich (2019), section 4.2.
"""

from collections.abc import Callable, Mapping

import numpy as np

from vitcls.metrics.resampling import RESAMPLES, bootstrap_interval, draw_weights

Errors = np.ndarray  # [..., R] for R ways to weigh the images


def estimate(
    wrong: Mapping[str, np.ndarray], of: Callable[[dict[str, np.ndarray]], Errors], resamples: int = RESAMPLES
) -> dict[str, float | None]:
    """value, low and high of a number that is computed from error rates, by the bootstrap over images.

    Args:
      wrong: for each name bool [..., N]: which of the same N images are taken for something else.
      of: gives the number [R] from the error rates, for each name float64 [..., R], in R resamples. A number that is
        not finite, as where a reference makes no error, is None.
    """
    count = next(iter(wrong.values())).shape[-1]
    flat = {name: rows.astype(np.float32) for name, rows in wrong.items()}
    value = of({name: rows.mean(axis=-1, keepdims=True, dtype=np.float64) for name, rows in flat.items()})[0]
    drawn = [
        of({name: (rows @ weights / count).astype(np.float64) for name, rows in flat.items()})
        for weights in draw_weights(count, resamples, seed=0)
    ]
    replicates = np.concatenate(drawn)
    if not np.isfinite(value) or not np.isfinite(replicates).all():
        return {"value": float(value) if np.isfinite(value) else None, "low": None, "high": None}
    low, high = bootstrap_interval(replicates)
    return {"value": float(value), "low": low, "high": high}


def mean_error(errors: Errors) -> Errors:
    """The mean over all rates [..., R] but the resamples: [R]."""
    return errors.reshape(-1, errors.shape[-1]).mean(axis=0)


def mean_corruption_error(errors: Errors, reference: Errors) -> Errors:
    """mCE: of [C, S, R], the mean over corruptions of the summed errors as a share of the reference's: [R]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (errors.sum(axis=1) / reference.sum(axis=1)).mean(axis=0)


def relative_corruption_error(errors: Errors, clean: Errors, reference: Errors, reference_clean: Errors) -> Errors:
    """Relative mCE: as mCE, of what the errors [C, S, R] are above those on clean images [R]."""
    return mean_corruption_error(errors - clean, reference - reference_clean)
