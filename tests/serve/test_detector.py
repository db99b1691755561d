"""The detector of drift: false alarms below the stated bound over many streams, and power where something changes."""

import numpy as np
import pytest
from scipy import stats

from vitcls.serve.detector import Detector, largest_mean, radius

STREAMS = 200


def uniform(count):
    return np.full(count, 1 / count)


def alarm(detector, stream):
    """After how many observations it rings first; None for never."""
    return next((i + 1 for i, category in enumerate(stream.tolist()) if detector.update(category)), None)


def share_of_alarms(p, *, sample, delta, threshold, length):
    rng, count = np.random.default_rng(0), 0
    for _ in range(STREAMS):
        detector = Detector(rng.multinomial(sample, p), delta=delta, threshold=threshold)
        count += alarm(detector, rng.choice(len(p), length, p=p)) is not None
    return count / STREAMS


def most(probability):
    """What a share of STREAMS with this probability exceeds once in 10,000 times."""
    return stats.binom.ppf(1 - 1e-4, STREAMS, probability) / STREAMS


@pytest.mark.parametrize("p", [np.array([0.95, 0.05]), uniform(2), uniform(10), stats.geom(0.3).pmf(np.arange(1, 9))])
def test_false_alarms_of_a_reference_that_is_known(p):
    """The bound is that of chance alone, and near enough that alarms are seen at all."""
    p = p / p.sum()
    found = share_of_alarms(p, sample=10**9, delta=1e-6, threshold=400, length=200)
    assert 0 < found <= most(200 / 400)


@pytest.mark.by_turns
@pytest.mark.parametrize(("categories", "sample"), [(2, 50), (2, 500), (10, 100), (10, 2_000)])
def test_false_alarms_of_a_reference_that_is_a_sample(categories, sample):
    """Small samples differ from what they are drawn from: a detector that took them for the truth would ring."""
    found = share_of_alarms(uniform(categories), sample=sample, delta=0.01, threshold=1_000 / 0.01, length=1_000)
    assert found <= most(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("p", [np.array([0.95, 0.05]), uniform(10), uniform(100)])
def test_false_alarms_within_ten_thousand(p):
    """As a server has it."""
    assert share_of_alarms(p, sample=500, delta=0.002, threshold=5e6, length=10_000) <= most(0.004)


@pytest.mark.parametrize(
    ("before", "after", "soon"),
    [
        ([0.95, 0.05], [0.8, 0.2], 400),  # unknowns
        ([0.97, 0.03], [0.6, 0.4], 100),
        (uniform(10), [0.55] + [0.05] * 9, 200),  # one class is shown more often than all others
        (uniform(10), [0.2] * 5 + [0.0] * 5, 300),  # five classes are no longer shown
        (uniform(100), [0.02] * 50 + [0.0] * 50, 900),
    ],
)
def test_what_changes_is_found_soon(before, after, soon):
    rng, delays = np.random.default_rng(0), []
    for _ in range(20):
        detector = Detector(rng.multinomial(2_000, before), delta=0.002, threshold=5e6)
        assert alarm(detector, rng.choice(len(before), 2_000, p=before)) is None
        delays.append(alarm(detector, rng.choice(len(after), 4 * soon, p=after)) or 10**9)
    assert np.median(delays) <= soon


@pytest.mark.parametrize("reference", [[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.6, 0.4, 0.0], [1.0, 0.0, 0.0]])
@pytest.mark.parametrize("epsilon", [0.001, 0.05, 0.5])
def test_the_largest_mean_is_that_of_all_distributions_tried(reference, epsilon):
    """On a fine grid."""
    reference, rng = np.array(reference), np.random.default_rng(0)
    first, second = np.meshgrid(np.linspace(0, 1, 1_001), np.linspace(0, 1, 1_001))
    every = np.stack([first, second, 1 - first - second], axis=-1)[first + second <= 1]
    seen = reference > 0
    divergence = np.sum(reference[seen] * np.log(reference[seen] / np.maximum(every[:, seen], 1e-300)), axis=1)
    inside = every[divergence <= epsilon]
    for _ in range(10):
        values = rng.uniform(0.2, 5, 3)
        best = (inside @ values).max()
        assert best - 1e-9 <= largest_mean(values, reference, epsilon) <= 1.02 * best


@pytest.mark.parametrize(("p", "sample"), [([0.5, 0.5], 30), ([0.95, 0.05], 200), (uniform(5), 100)])
def test_the_reference_misleads_no_more_often_than_said(p, sample):
    counts = np.random.default_rng(0).multinomial(sample, p, 20_000) / sample
    divergence = np.sum(counts * np.log(np.maximum(counts, 1e-300) / np.array(p)), axis=1)
    for delta in (0.2, 0.05):
        assert np.mean(divergence > radius(len(p), sample, delta)) <= delta
    assert np.mean(divergence > radius(len(p), sample, 0.2)) > 0  # not for nothing


def test_what_came_lately_is_told():
    detector = Detector(np.array([50, 50]), delta=0.01, threshold=1e300)
    for _ in range(3_000):
        detector.update(1)
    assert detector.recent[1] > 0.95 and detector.recent.sum() == pytest.approx(1)
    assert detector.reference.tolist() == [0.5, 0.5]
