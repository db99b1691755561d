"""Deterministic, stratified splits, through scikit-learn."""

import numpy as np

from vitcls.errors import UserError


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted indices (rest, held out): `fraction` of every class, as nearly as whole examples allow.

    Raises UserError where a class is too small to be on both sides.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels)
    if counts[counts > 0].min() < 2:
        raise UserError(
            f"class {int(np.flatnonzero(counts == 1)[0])} has a single example and cannot be split; add examples, "
            "give separate splits, or set config.dataset.validation=0"
        )
    held_out = max(round(fraction * len(labels)), np.count_nonzero(counts))
    if len(labels) - held_out < np.count_nonzero(counts):
        raise UserError(
            f"{len(labels)} examples of {np.count_nonzero(counts)} classes are too few to hold out {fraction:g} of them"
        )
    rest, held = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=seed)
    return np.sort(rest), np.sort(held)


def fold_split(labels: np.ndarray, num_folds: int, fold: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sorted indices (rest, fold `fold` of `num_folds`); the folds are stratified, disjoint and cover all.

    Raises UserError where a class has fewer examples than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels)
    smallest = int(counts[counts > 0].min())
    if smallest < num_folds:
        raise UserError(
            f"config.dataset.num_folds={num_folds} is more than the {smallest} training examples of class "
            f"{int(np.flatnonzero(counts == smallest)[0])}; use at most {smallest} folds"
        )
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    rest, held = list(splitter.split(np.zeros(len(labels)), labels))[fold]
    return np.sort(rest), np.sort(held)
