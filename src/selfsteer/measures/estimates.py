"""Means with 95% intervals: what every measure of the project is reported as.

Shares get Wilson's interval, which stays honest at 0 and 1 (E. B. Wilson, 1927). Means get the percentile bootstrap over
rows (B. Efron, 1979), seeded; beyond `BOOTSTRAP_ROWS` rows the normal interval, which then agrees with it. Rows count as
independent. Means over queries and training seeds get an interval that says what other queries and other seeds would do
(`crossed_estimate`). Left out on purpose: tests of significance; an interval of a paired difference says more.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOOTSTRAP_ROWS = 5_000

RESAMPLES = 2_000

_DRAWN_AT_ONCE = 1_000_000

_Z = 1.959963984540054

BINS = 24
"""Of a histogram, at most."""

METHOD = f"95% intervals: Wilson for shares, percentile bootstrap for means (normal beyond {BOOTSTRAP_ROWS:,} rows)."
"""How the intervals are made, for people."""


class Estimate(NamedTuple):
    """A mean over n rows with its 95% interval; one row has no interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def above_zero(self) -> bool:
        """The whole interval."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """The whole interval."""
        return self.high is not None and self.high < 0


class Distribution(TypedDict):
    """A histogram: `edges` has one number more than each list of counts."""

    edges: list[float]
    counts: dict[str, list[int]]


def distribution(**sides: ArrayLike) -> Distribution:
    """Histograms of each side's values, shape (n,), over the same bins, which reach from the least to the largest.

    As many as the Rice rule gives for all values together, at most BINS.
    """
    everything = np.concatenate([np.asarray(values) for values in sides.values()])
    edges = np.histogram_bin_edges(everything, bins=min(BINS, math.ceil(2 * len(everything) ** (1 / 3))))
    counts = {name: [int(count) for count in np.histogram(values, bins=edges)[0]] for name, values in sides.items()}
    return Distribution(edges=[float(edge) for edge in edges], counts=counts)


SHARE = (0.0, 1.0)
"""Within which a value lies that is 1, 0 or one half."""


def mean_estimate(values: ArrayLike, *, within: tuple[float, float] | None = None) -> Estimate | None:
    """The mean of `values`, shape (n,), with its interval; None of no values. ValueError when one is not finite.

    within: the least and the largest that a value can be. Of values that are all the same the bootstrap knows of no others:
    then as large a share of others as Wilson's interval allows of n hits in n is taken to lie at either end.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return None
    if not np.isfinite(array).all():
        raise ValueError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite; score these rows again."
        )
    mean = float(array.mean())
    if array.size == 1:
        return Estimate(mean, None, None, 1)
    if within is not None and (array == array[0]).all():
        others = _Z**2 / (array.size + _Z**2)
        return Estimate(mean, mean - others * (mean - within[0]), mean + others * (within[1] - mean), array.size)
    if array.size > BOOTSTRAP_ROWS:
        margin = _Z * float(array.std(ddof=1)) / math.sqrt(array.size)
        return Estimate(mean, mean - margin, mean + margin, array.size)
    low, high = np.quantile(_resampled_means(array), (0.025, 0.975))
    return Estimate(mean, float(low), float(high), array.size)


def share_estimate(hits: int, n: int) -> Estimate | None:
    """The share hits / n with Wilson's interval; None of n = 0."""
    if n == 0:
        return None
    share = hits / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    margin = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    # The formula gives exactly 0 and 1 there, but for rounding.
    low = 0.0 if hits == 0 else middle - margin
    high = 1.0 if hits == n else middle + margin
    return Estimate(share, low, high, n)


def mean_of(values: ArrayLike, *, within: tuple[float, float] | None = None) -> Estimate:
    """`mean_estimate` of values of which there are some."""
    found = mean_estimate(values, within=within)
    assert found is not None, "no values"
    return found


def share_of(hits: int, n: int) -> Estimate:
    """`share_estimate` of rows of which there are some."""
    found = share_estimate(hits, n)
    assert found is not None, "no rows"
    return found


def known(found: Mapping[str, Estimate | None]) -> dict[str, Estimate]:
    """Those that there are."""
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def paired_difference(a: Mapping[str, float], b: Mapping[str, float], *, shares: bool = False) -> Estimate | None:
    """The mean of a - b over the queries that both have, the bootstrap drawing queries; None when they share none.

    shares: all values are within `SHARE`.
    """
    differences = [a[query] - b[query] for query in a if query in b]
    return mean_estimate(differences, within=(-1.0, 1.0) if shares else None)


def crossed_estimate(seeds: Sequence[Mapping[str, float]]) -> Estimate | None:
    """The mean over the queries that all seeds have, with queries and seeds as crossed random effects; n is the queries.

    seeds: of each training seed, a value a query. The variance of the mean is (MS_queries + MS_seeds - MS_rest) / (Q S), its
    degrees of freedom are Satterthwaite's (F. Satterthwaite, 1946). So three seeds that disagree give a wide interval,
    however many queries there are. Of one seed the interval is over queries alone; None where the seeds share no query.
    """
    queries = [query for query in seeds[0] if all(query in each for each in seeds)]
    if len(seeds) == 1 or len(queries) < 2:
        return mean_estimate([sum(each[query] for each in seeds) / len(seeds) for query in queries])
    values = np.array([[each[query] for query in queries] for each in seeds])  # (S, Q)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite; score them again.")
    count, size = values.shape
    mean, of_seeds, of_queries = float(values.mean()), values.mean(axis=1), values.mean(axis=0)
    rest = values - of_seeds[:, None] - of_queries[None, :] + mean
    squares = np.array(
        [
            size * ((of_seeds - mean) ** 2).sum() / (count - 1),
            count * ((of_queries - mean) ** 2).sum() / (size - 1),
            (rest**2).sum() / ((count - 1) * (size - 1)),
        ]
    )
    # An estimate of a sum of variances: never below what either effect alone gives.
    total = max(float(squares[0] + squares[1] - squares[2]), float(squares[:2].max()))
    if total == 0:
        return Estimate(mean, mean, mean, size)
    freedom = total**2 / float((squares**2 / [count - 1, size - 1, (count - 1) * (size - 1)]).sum())
    margin = _t_quantile(max(1.0, freedom)) * math.sqrt(total / values.size)
    return Estimate(mean, mean - margin, mean + margin, size)


def _t_quantile(freedom: float) -> float:
    """The 97.5% quantile of Student's t, to three digits; by summing its density."""
    x = np.linspace(0, 13, 26_001)  # 12.706 of one degree of freedom is the largest
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    below = np.concatenate([[0.0], ((density[1:] + density[:-1]) / 2).cumsum() * (x[1] - x[0])])
    return float(np.interp(0.475, below, x))


def _resampled_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of RESAMPLES draws with replacement, shape (RESAMPLES,); at most _DRAWN_AT_ONCE values are held."""
    rng = np.random.default_rng(0)
    rows = max(1, _DRAWN_AT_ONCE // values.size)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, rows):
        stop = min(start + rows, RESAMPLES)
        means[start:stop] = values[rng.integers(values.size, size=(stop - start, values.size))].mean(axis=1)
    return means
