"""The multiple-choice knapsack, solved exactly: one option for each set, least loss in all, within a capacity.

Dynamic programming over lists of undominated states (Dyer, Kayal and Walker 1984, "A branch and bound algorithm for
solving the multiple-choice knapsack problem"), with the Lagrangian bound of Sinha and Zoltners (1979): for a price p of
a byte, what is left to choose costs at least  sum_i min_k (loss_ik + p size_ik) - p * (bytes left).  A state that
cannot get below the best solution known is dropped, so that few are left at the best p even for hundreds of sets. Sizes
are integers of any size; nothing is rounded.

Shape legend: K = options of a set, S = states.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-12  # of the bound, relative: sums of the same losses in another order


def choose_within(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """Return the number of the option of each set.

    sizes, losses: of each option of each set. Of two equal solutions the smaller one is taken. Raises `ValueError` if
    the smallest options do not fit.
    """
    if sum(map(min, sizes)) > capacity:
        raise ValueError(f"the smallest options take {sum(map(min, sizes))}, more than {capacity}")
    options = [_undominated(size, loss) for size, loss in zip(sizes, losses, strict=True)]
    size_K = [np.array([sizes[i][k] for k in kept], dtype=np.int64) for i, kept in enumerate(options)]
    loss_K = [np.array([losses[i][k] for k in kept], dtype=np.float64) for i, kept in enumerate(options)]
    price, best = _best_price(size_K, loss_K, capacity)
    # Sets whose option the price leaves open come last, so that states part ways as late as possible.
    order = sorted(range(len(options)), key=lambda i: (-_decided(size_K[i], loss_K[i], price), i))
    floors = [float((loss_K[i] + price * size_K[i]).min()) for i in order]
    rests = [0.0, *accumulate(reversed(floors))][::-1]
    least = [0, *accumulate(int(size_K[i].min()) for i in reversed(order))][::-1]

    used_S, lost_S = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # the state before, and the option taken
    for place, i in enumerate(order, start=1):
        used = (used_S[None, :] + size_K[i][:, None]).ravel()
        lost = (lost_S[None, :] + loss_K[i][:, None]).ravel()
        bound = lost + rests[place] - price * (capacity - used)
        kept = np.flatnonzero(
            (used + least[place] <= capacity) & (bound <= best * (1 + _TOLERANCE) + _TOLERANCE * abs(price * capacity))
        )
        kept = kept[np.lexsort((lost[kept], used[kept]))]
        falling = np.minimum.accumulate(np.concatenate([[np.inf], lost[kept][:-1]]))
        kept = kept[lost[kept] < falling]
        trail.append((kept % len(used_S), kept // len(used_S)))
        used_S, lost_S = used[kept], lost[kept]
    state, chosen = int(lost_S.argmin()), [0] * len(options)
    for (before, option), i in zip(reversed(trail), reversed(order), strict=True):
        chosen[i] = options[i][int(option[state])]
        state = int(before[state])
    return chosen


def _undominated(sizes: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Numbers of the options that no other, smaller one beats, by size."""
    kept: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda k: (sizes[k], losses[k], k)):
        if not kept or losses[number] < losses[kept[-1]]:
            kept.append(number)
    return kept


def _best_price(
    size_K: Sequence[NDArray[np.int64]], loss_K: Sequence[NDArray[np.float64]], capacity: int
) -> tuple[float, float]:
    """Return the price of a byte at which the bound is highest, and the loss of a solution that fits."""
    prices = sorted(
        {
            float((loss[a] - loss[b]) / (size[b] - size[a]))
            for size, loss in zip(size_K, loss_K, strict=True)
            for a in range(len(size))
            for b in range(a + 1, len(size))
        }
    )

    def cheapest(price: float) -> list[int]:
        """Of options that are as cheap the smallest."""
        return [int((loss + price * size).argmin()) for size, loss in zip(size_K, loss_K, strict=True)]

    def total(picked: Sequence[int]) -> int:
        return sum(int(size[k]) for size, k in zip(size_K, picked, strict=True))

    if total([len(size) - 1 for size in size_K]) <= capacity:
        return 0.0, float(sum(loss[-1] for loss in loss_K))
    low, high = 0, len(prices)  # at prices[high - 1] and above everything fits
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if total(cheapest(prices[middle])) <= capacity else (middle + 1, high)
    # Rounding may let the highest price fit too little: then the smallest options do.
    price = prices[low] if low < len(prices) else prices[-1]
    picked = cheapest(price) if low < len(prices) else [0] * len(size_K)
    left = capacity - total(picked)
    for i, (size, loss) in enumerate(zip(size_K, loss_K, strict=True)):  # fill up what is left
        for k in range(len(size) - 1, picked[i], -1):
            if size[k] - size[picked[i]] <= left and loss[k] < loss[picked[i]]:
                left -= int(size[k] - size[picked[i]])
                picked[i] = k
                break
    return price, float(sum(loss[k] for loss, k in zip(loss_K, picked, strict=True)))


def _decided(size: NDArray[np.int64], loss: NDArray[np.float64], price: float) -> float:
    """By how much the cheapest option beats the next."""
    costs = np.sort(loss + price * size)
    return float(costs[1] - costs[0]) if len(costs) > 1 else float("inf")
