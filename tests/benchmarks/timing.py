"""The one way benchmarks time and print."""

import time
from collections.abc import Callable


def seconds(
    work: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The least time of several runs, after one that warms up: the others were disturbed."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        work()
        best = min(best, clock() - start)
    return best


def table(title: str, unit: str, rows: list[tuple[str, float, str]]) -> None:
    """Print rows of (name, value, remark); the first is what the ratios refer to."""
    print(f"\n{title}")
    base = rows[0][1]
    for name, value, remark in rows:
        print(f"  {name:<44} {value:>10.3f} {unit:<9} x{value / base:>7.2f}  {remark}")
