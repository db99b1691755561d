"""Has the distribution of a stream of categories changed? With a bound on false alarms that holds without conditions.

The null hypothesis: the stream is drawn from the distribution p of a reference sample, of which only the counts are
known. p is in {p: KL(p_hat || p) <= epsilon} with probability 1 - delta (Agrawal 2020, "Finite-sample concentration of
the multinomial in relative entropy", theorem I.2). A bet is a function f >= 0 of the next category, chosen by what
came before; f / c is an e-value for the null hypothesis, where c is the largest mean of f over that set. The statistic
of Shiryaev and Roberts, M <- (M + 1) f / c, is then at most t in the mean after t observations, so that it reaches
`threshold` within N of them with probability at most N / threshold (Shin, Ramdas & Rinaldo 2023, "E-detectors").
"""

import math

import numpy as np

_WINDOWS = np.array([100.0, 1000.0])  # observations that a bet remembers; M is the mean over both
_CAUTION = 1.0  # how many times its window a bet knows of the reference already
_BLOCK = 20  # observations between two bets
_OFFSETS = np.geomspace(1e-3, 1e3, 40)  # at which `largest_mean` looks


class Detector:
    """Watches categories 0 .. K - 1, in constant memory.

    Args:
      counts: of a reference sample, int [K].
      delta: how probably the reference sample misleads.
      threshold: of M; see above.
    """

    def __init__(self, counts: np.ndarray, *, delta: float, threshold: float):
        counts = np.asarray(counts, np.float64)
        self.reference = counts / counts.sum()  # [K]
        self._prior = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
        self._epsilon = radius(len(counts), int(counts.sum()), delta)
        self._threshold = threshold
        self._recent = np.zeros((len(_WINDOWS), len(counts)))  # counts, the old ones fading
        self._block: list[int] = []
        self.restart()

    def restart(self) -> None:
        """Forgets the evidence; what came lately is remembered."""
        self._statistic = np.zeros(len(_WINDOWS))
        self._bet()

    def update(self, category: int) -> bool:
        """Takes the next observation; True for an alarm, with which the evidence is forgotten."""
        self._statistic = (self._statistic + 1) * self._factors[:, category]
        self._block.append(category)
        if len(self._block) == _BLOCK:
            self._bet()
        if self._statistic.mean() < self._threshold:
            return False
        self.restart()
        return True

    @property
    def recent(self) -> np.ndarray:
        """The distribution of about the last 1,000 observations, float [K]."""
        counts = self._recent[-1] + np.bincount(self._block, minlength=len(self.reference))
        return counts / max(counts.sum(), 1)

    def _bet(self) -> None:
        """That the next categories are like the recent ones."""
        fade = (1 - 1 / _WINDOWS[:, None]) ** len(self._block)
        self._recent = self._recent * fade + np.bincount(self._block, minlength=len(self.reference))
        self._block = []
        known = _CAUTION * _WINDOWS[:, None]
        expected = (known * self._prior + self._recent) / (known + self._recent.sum(axis=1, keepdims=True))
        bets = expected / self._prior
        means = np.array([largest_mean(bet, self.reference, self._epsilon) for bet in bets])
        self._factors = bets / means[:, None]


def radius(categories: int, sample: int, delta: float) -> float:
    """epsilon with P(KL(p_hat || p) > epsilon) <= delta for the counts of a sample, whatever p."""
    freedom = max(categories - 1, 1)
    low, high = float(freedom), 2 * freedom - 4 * math.log(delta) + 4  # of epsilon * sample
    while high - low > 1e-6:
        middle = (low + high) / 2
        excess = freedom * math.log(math.e * middle / freedom) - middle > math.log(delta)
        low, high = (middle, high) if excess else (low, middle)
    return high / sample


def largest_mean(values: np.ndarray, reference: np.ndarray, epsilon: float) -> float:
    """An upper bound of the mean of values [K] under any p with KL(reference || p) <= epsilon.

    For any nu > max(values): log(nu - E_p f) >= E_reference log(nu - f) - epsilon, by Jensen's inequality. The least
    bound over some nu is near the maximum itself (Honda & Takemura 2010).
    """
    largest = values.max()
    nu = largest + _OFFSETS[:, None]
    logs = np.log(nu - values) @ reference
    return float(min(largest, (nu[:, 0] - np.exp(logs - epsilon)).min()))
