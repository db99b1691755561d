"""What corruptions cost: errors over corruptions and severities, of one classifier or of two on the same images.

Hendrycks & Dietterich (2019), section 4.2.
"""

import numpy as np

Errors = np.ndarray  # [..., R] for R ways to weigh the images


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
