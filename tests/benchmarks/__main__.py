"""`make bench`: every benchmark, or those named: `python -m tests.benchmarks kernel padim`.

What follows the first option goes to the one that is named: `anomalib --data FOLDER`.
"""

import importlib
import itertools
import sys
from pathlib import Path

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*"))

if __name__ == "__main__":
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(names) :]
    if options and len(names) != 1:
        sys.exit(f"options go to one benchmark; there are {', '.join(NAMES)}")
    for name in names or NAMES:
        if name not in NAMES:
            sys.exit(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
        module = importlib.import_module(f"tests.benchmarks.bench_{name}")
        module.main(options) if options else module.main()
