"""Success rates, and differences between them, with the uncertainty they have; no simulator, no policy.

Two questions that look alike need different tests. *Is checkpoint B better than checkpoint A?* Both are fixed: pair
their episodes by start (McNemar's exact test). *Is method B better than method A?* Training is part of the method:
several seeds of each, and the seeds are the sample, not only the episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from scipy import optimize, special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95
MIN_SEEDS = 3  # of each method: below, the spread between trainings is not known at all


@dataclass(frozen=True)
class Rate:
    """A success rate with its 95 % interval."""

    episodes: int
    successes: int
    success_rate: float
    interval: tuple[float, float]


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a success rate (Wilson 1927)."""
    low, high = np.asarray(proportion_confint(successes, episodes, alpha=1 - LEVEL, method="wilson"))
    return float(low), float(high)


def rate(wins: Sequence[bool]) -> Rate:
    """Return the rate of a list of outcomes with its Wilson interval."""
    return Rate(len(wins), sum(wins), sum(wins) / len(wins), wilson(sum(wins), len(wins)))


def macro(tasks: Sequence[Rate]) -> Rate:
    """Return the mean of the tasks' rates; its interval joins Wilson's limits (MOVER: Zou and Donner 2008).

    Not a bootstrap: of 50 successes in 50 that would claim an interval of [1, 1].
    """
    rates, limits = np.array([r.success_rate for r in tasks]), np.array([r.interval for r in tasks])
    mean = float(rates.mean())
    below, above = np.sqrt(((limits - rates[:, None]) ** 2).sum(axis=0)) / len(tasks)
    total, wins = sum(r.episodes for r in tasks), sum(r.successes for r in tasks)
    return Rate(total, wins, mean, (mean - float(below), mean + float(above)))


def bootstrap_macro(tasks: Sequence[Sequence[bool]], seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """Return the percentile interval of the mean of the tasks' rates, episodes resampled within each task."""
    rng = np.random.default_rng(seed)
    means = [rng.binomial(len(wins), sum(wins) / len(wins), resamples) / len(wins) for wins in tasks]
    low, high = np.quantile(np.mean(means, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# ---- two checkpoints, on the same starts


@dataclass(frozen=True)
class Paired:
    """Two checkpoints on the same starts; b minus a."""

    pairs: int
    a_only: int  # starts that only a solved
    b_only: int
    difference: float
    interval: tuple[float, float]  # 95 %
    p: float  # McNemar, exact, two-sided
    power_20: float  # chance that so many pairs would have shown +20 points

    @property
    def verdict(self) -> str:
        """Say in words what may be claimed."""
        if self.p > 1 - LEVEL:
            return "not distinguishable"
        return "B is better" if self.b_only > self.a_only else "A is better"


def compare_pairs(a: Sequence[bool], b: Sequence[bool]) -> Paired:
    """Compare outcomes of the same starts, in the same order.

    Raises:
        ValueError: no pairs, or lists of unequal length.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired outcomes need equally many, and at least one, of each; got {len(a)} and {len(b)}")
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    n, a_only, b_only = len(first), int(np.sum(first & ~second)), int(np.sum(second & ~first))
    base = float(np.clip(first.mean(), 0.0, 0.8))
    return Paired(
        n, a_only, b_only, (b_only - a_only) / n, tango(n, b_only, a_only), mcnemar(a_only, b_only),
        mcnemar_power(n, base, base + 0.2),
    )  # fmt: skip


def mcnemar(a_only: int, b_only: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: discordant pairs are fair coins (McNemar 1947)."""
    n = a_only + b_only
    return float(stats.binomtest(a_only, n, 0.5).pvalue) if n else 1.0


def tango(n: int, b_only: int, a_only: int) -> tuple[float, float]:
    """Return the 95 % score interval of a paired difference of proportions (Tango 1998)."""
    z2 = float(stats.norm.ppf((1 + LEVEL) / 2)) ** 2
    estimate = (b_only - a_only) / n

    def excess(delta: float) -> float:
        """Return z^2 of the score test of `delta`, less the critical one."""
        p = 2 * n
        q = (2 * n - b_only + a_only) * delta - b_only - a_only
        r = -a_only * delta * (1 - delta)
        lost = (np.sqrt(max(q * q - 4 * p * r, 0.0)) - q) / (2 * p)  # of the discordant pairs, under delta
        variance = n * (2 * lost + delta * (1 - delta))
        score = b_only - a_only - n * delta
        return score * score / variance - z2 if variance > 0 else (-z2 if score == 0 else np.inf)

    def limit(end: float) -> float:
        if excess(end) <= 0:
            return float(np.sign(end))
        return optimize.root_scalar(excess, bracket=(estimate, end)).root if abs(end - estimate) > 1e-12 else end

    edge = 1 - 1e-9
    return limit(-edge), limit(edge)


def mcnemar_power(pairs: int, a: float, b: float) -> float:
    """Return the chance that McNemar's exact test finds rates `a` and `b` to differ, outcomes of a pair independent.

    Pairs that agree more often than chance, as those of related checkpoints do, see more: this is a floor.
    """
    b_only, a_only = b * (1 - a), a * (1 - b)
    discordant = b_only + a_only
    if discordant == 0:
        return 0.0
    power = 0.0
    for m in range(1, pairs + 1):
        k = np.arange(m + 1)
        p = np.minimum(1.0, 2 * stats.binom.cdf(np.minimum(k, m - k), m, 0.5))
        found = float(stats.binom.pmf(k, m, b_only / discordant)[p <= 1 - LEVEL].sum())
        power += float(stats.binom.pmf(m, pairs, discordant)) * found
    return power


@dataclass
class Sequential:
    """Look after every pair and stop as soon as it is decided, at most at `maximum` pairs.

    An e-process: the stake of a bettor who mixes over all biases of the coin that a discordant pair is (Krichevsky and
    Trofimov 1981). While both are equally good it exceeds 1 / alpha at any time with probability alpha at most (Ville
    1939), however often one looks.
    """

    maximum: int  # declared beforehand
    alpha: float = 1 - LEVEL
    pairs: int = 0
    a_only: int = 0
    b_only: int = 0

    def add(self, a: bool, b: bool) -> None:
        """Take the outcomes of one start."""
        assert not self.stopped, "decided already"
        self.pairs += 1
        self.a_only += a and not b
        self.b_only += b and not a

    @property
    def e(self) -> float:
        """Return the evidence against "equally good"."""
        wins, losses = self.b_only, self.a_only
        log = special.betaln(wins + 0.5, losses + 0.5) - special.betaln(0.5, 0.5) + (wins + losses) * np.log(2)
        return float(np.exp(log))

    @property
    def decided(self) -> bool:
        """Whether the difference is shown."""
        return self.e >= 1 / self.alpha

    @property
    def stopped(self) -> bool:
        """Whether there is nothing to add: decided, or at the maximum."""
        return self.decided or self.pairs >= self.maximum

    @property
    def verdict(self) -> str:
        """Say in words what may be claimed."""
        if not self.decided:
            return "not distinguishable" if self.stopped else "undecided"
        return "B is better" if self.b_only > self.a_only else "A is better"


# ---- two methods: training seeds are part of the sample


@dataclass(frozen=True)
class Methods:
    """Two methods, several training seeds each, on the same starts; b minus a."""

    seeds: tuple[int, int]
    starts: int
    difference: float
    interval: tuple[float, float]  # 95 %
    p: float
    smallest_effect: float  # declared beforehand
    p_equivalent: float  # two one-sided tests that |difference| is below the smallest effect

    @property
    def verdict(self) -> str:
        """Say in words what may be claimed."""
        if self.p <= 1 - LEVEL:
            return "B is better" if self.difference > 0 else "A is better"
        return "equivalent" if self.p_equivalent <= 1 - LEVEL else "not distinguishable"


def compare_methods(
    a: Bool[np.ndarray, "seeds_a n"],
    b: Bool[np.ndarray, "seeds_b n"],
    smallest_effect: float,
    *,
    same_checkpoints: bool = False,
) -> Methods:
    """Compare two methods by the outcomes of each training seed on the same n starts.

    The variance of the difference is clustered both ways, by training seed and by start (Cameron, Gelbach and Miller
    2011), and Student's t takes the degrees of freedom of the seeds (Welch 1947): three seeds are three, however many
    episodes each plays.

    Args:
        a: outcomes of the first method, a row per training seed.
        b: of the second.
        smallest_effect: difference of rates that matters, declared beforehand.
        same_checkpoints: row i of both is one checkpoint, used in two ways, so that what its training gave it cancels.

    Raises:
        ValueError: fewer than 3 seeds of a method, unequal starts or checkpoints, or a smallest effect outside 0..1.
    """
    if min(len(a), len(b)) < MIN_SEEDS:
        raise ValueError(f"a method needs at least {MIN_SEEDS} training seeds, got {len(a)} and {len(b)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"both methods must play the same starts, got {a.shape[1]} and {b.shape[1]}")
    if not 0 < smallest_effect < 1:
        raise ValueError(f"smallest_effect is a difference of rates between 0 and 1, got {smallest_effect}")
    if same_checkpoints and len(a) != len(b):
        raise ValueError(f"the same checkpoints are as many on both sides, got {len(a)} and {len(b)}")
    difference = float(b.mean() - a.mean())
    first, second = a.astype(np.float64), b.astype(np.float64)
    variance, freedom = _two_way([second - first] if same_checkpoints else [-first, second])
    error = float(np.sqrt(variance))
    if error == 0:
        p = 1.0 if difference == 0 else 0.0
        outside = 0.0 if abs(difference) < smallest_effect else 1.0
        return Methods((len(a), len(b)), a.shape[1], difference, (difference, difference), p, smallest_effect, outside)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(difference) / error, freedom))
    outside = float(stats.t.sf((smallest_effect - abs(difference)) / error, freedom))
    interval = (max(-1.0, difference - half), min(1.0, difference + half))
    return Methods((len(a), len(b)), a.shape[1], difference, interval, p, smallest_effect, outside)


def _two_way(groups: Sequence[Float64[np.ndarray, "s n"]]) -> tuple[float, float]:
    """Return the variance of the sum of the groups' means, and its degrees of freedom; the groups' rows are apart."""
    by_seed = [float(x.mean(axis=1).var(ddof=1)) / len(x) for x in groups]
    n = groups[0].shape[1]
    by_start = float(sum(x.mean(axis=0) for x in groups).var(ddof=1)) / n  # pyright: ignore[reportAttributeAccessIssue]
    # what is neither a seed's nor a start's own is in both of the above
    residual = [x - x.mean(axis=1, keepdims=True) - x.mean(axis=0, keepdims=True) + x.mean() for x in groups]
    both = sum(float((x**2).sum()) / ((len(x) - 1) * (n - 1)) / (len(x) * n) for x in residual)
    seeds = sum(by_seed)
    variance = max(seeds + by_start - both, seeds, by_start)
    if seeds == 0:
        return variance, float(min(len(x) for x in groups) - 1)
    freedom = seeds**2 / sum(v**2 / (len(x) - 1) for v, x in zip(by_seed, groups, strict=True))
    return variance, freedom


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for asking several questions at once (Holm 1979)."""
    if not p:
        return {}
    adjusted = np.asarray(multipletests(list(p.values()), method="holm")[1])
    return {name: float(value) for name, value in zip(p, adjusted, strict=True)}


def hierarchical_bootstrap(
    outcomes: Sequence[Sequence[Sequence[bool]]], seed: int, resamples: int = 10_000
) -> tuple[float, float]:
    """Return the 95 % interval of a mean rate over nested groups, each level resampled with replacement.

    Args:
        outcomes: [training seed][demonstration subset][episode].
        seed: of the resampling.
        resamples: how many.
    """
    rng = np.random.default_rng(seed)
    rates = [np.array([np.mean(subset) for subset in group]) for group in outcomes]
    sizes = [np.array([len(subset) for subset in group]) for group in outcomes]
    means = np.empty(resamples)
    for i in range(resamples):
        total = 0.0
        for g in rng.integers(len(rates), size=len(rates)):
            subset = rng.integers(len(rates[g]), size=len(rates[g]))
            total += float(np.mean(rng.binomial(sizes[g][subset], rates[g][subset]) / sizes[g][subset]))
        means[i] = total / len(rates)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
