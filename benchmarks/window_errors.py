"""Errors of what llama-perplexity measures, by window and paired; benchmarks/proof.py uses them.

Tokens of one window depend on each other, so an error over all tokens is too small. Here the window
is the unit. Two files are scored on the same windows, and a ratio of their means has the error of
what remains when each window's own difficulty is taken out.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics


def by_window(printed: str) -> tuple[list[float], list[float]]:
    """The KL divergence, and the logarithm of the perplexities' ratio, of each window.

    llama-perplexity prints the means of all windows so far, with five decimals. So the value of
    window n has an error of about n · 4e-6. Together the values have the mean of the last line.
    What rounding adds makes errors larger on average, not smaller.

    >>> line = "{:4d}  {:9.4f} ± 1.5  {:10.5f} ± 0.01  {:10.5f} ± 0.02  8.0 ± 0.9 %  66.7 ± 2.9 %"
    >>> printed = "\\n".join([line.format(1, 19.2, 0.2, 0.3), line.format(2, 18.1, 0.3, 0.2)])
    >>> [[round(value, 3) for value in values] for values in by_window(printed)]
    [[0.3, 0.1], [0.2, 0.4]]
    """
    number = r"([-\d.einfa]+)\s+±\s+\S+\s+"
    rows = re.findall(rf"^\s*(\d+)\s+{number}{number}{number}", printed, re.MULTILINE)

    def of_column(column: int) -> list[float]:
        sums = [int(row[0]) * float(row[column]) for row in rows]
        return [now - before for before, now in zip([0.0, *sums], sums, strict=False)]

    return of_column(3), of_column(2)


def by_task(printed: str) -> str:
    """Whether each task of HellaSwag was solved, as 1 or 0, from the shares of all so far.

    >>> by_task("1\\t100.00000000%\\t[20, 100]\\n2\\t50.00000000%\\t[9, 90]\\n")
    '10'
    """
    shares = re.findall(r"^(\d+)\t([\d.]+)%", printed, re.MULTILINE)
    solved = [0, *(round(int(count) * float(share) / 100) for count, share in shares)]
    return "".join(str(now - before) for before, now in itertools.pairwise(solved))


def ratio_and_error(
    ours: list[float], theirs: list[float], floor: list[float] | None = None
) -> tuple[float, float]:
    """The ratio of two means over the same windows, and its standard error, by the delta method.

    Args:
        ours: a value per window.
        theirs: the same windows, of the other file.
        floor: what a file of Q8_0 has there, mostly by the judge; it is subtracted from both.

    >>> ratio_and_error([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    (0.5, 0.0)
    >>> ratio_and_error([1.5, 2.5], [2.5, 4.5], [0.5, 0.5])
    (0.5, 0.0)
    """
    floor = floor or [0.0] * len(ours)
    pairs = [(a - f, b - f) for a, b, f in zip(ours, theirs, floor, strict=True)]
    above, below = (statistics.mean(values) for values in zip(*pairs, strict=True))
    rests = [a - above / below * b for a, b in pairs]
    return above / below, statistics.stdev(rests) / math.sqrt(len(rests)) / below


def mcnemar(ours: str, theirs: str) -> tuple[int, int, float]:
    """The tasks that only one of two files solves, and how likely so uneven a split is by chance.

    Returns:
        Tasks that only the first solves, those that only the second solves, and the two-sided p of
        McNemar's exact test.

    >>> mcnemar("1110", "0001")
    (3, 1, 0.625)
    """
    pairs = list(zip(ours, theirs, strict=True))
    first, second = pairs.count(("1", "0")), pairs.count(("0", "1"))
    differing = first + second
    tail = sum(math.comb(differing, count) for count in range(min(first, second) + 1))
    return first, second, min(1.0, 2 * tail / 2**differing)
