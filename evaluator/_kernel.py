"""The evaluator's compiled functions: ranks of positive pixels, and levels of heat maps.

One file, and numba only, because Numba's on-disk cache does not notice an edit in another file.
"""

from numba import njit


@njit(cache=True)
def rank_positives(score, row, negatives, starts, below, tied, pairs):  # type: ignore[no-untyped-def]
    """Merge positives into the negatives of one image after another, and add up the counts.

    score: float32 [P], ascending; row: int32 [P], the positive's row of `pairs`; negatives: float32
    [N], ascending between starts[j] and starts[j + 1], those of image j; starts: int64 [T + 1].
    Adds to below, tied (uint32 [P]: negatives strictly below, equal) and to pairs (int64 [D, T]:
    twice the negatives below plus those equal).
    """
    for image in range(starts.size - 1):
        end = starts[image + 1]
        first = starts[image]
        left = first  # negatives before it are below the positive
        right = first  # negatives before it are not above the positive
        for p in range(score.size):
            value = score[p]
            while left < end and negatives[left] < value:
                left += 1
            if right < left:
                right = left
            while right < end and negatives[right] <= value:
                right += 1
            below[p] += left - first
            tied[p] += right - left
            pairs[row[p], image] += (left - first) + (right - first)


@njit(cache=True)
def fill_levels(scores, bounds, levels):  # type: ignore[no-untyped-def]
    """levels[i] (uint8) = how many of the 255 ascending bounds lie below scores[i] (float32)."""
    for i in range(scores.size):
        below = 0
        step = 128
        while step > 0:
            below += step * (bounds[below + step - 1] < scores[i])
            step //= 2
        levels[i] = below
