"""The plan: which form, how many rows and tiles, and whether its memory is what is used."""

import subprocess
import sys

import pytest

from evaluator.errors import EvaluatorError
from evaluator.padim import draw_dims
from evaluator.plan import Plan, chosen_channels, make_plan
from tests.benchmarks.memory import forget_peak

WIDE = [(256, 56, 56), (512, 28, 28), (1024, 14, 14)]
NARROW = [(64, 56, 56), (128, 28, 28), (256, 14, 14)]
GIB = 2**30


def plan(shapes, dims: int, train: int, memory: int = GIB, cores: int = 1, **more) -> Plan:
    drawn = [draw_dims(sum(shape[0] for shape in shapes), dims, seed) for seed in range(2)]
    return make_plan(shapes, drawn, train, 40, memory, cores, **more)


def test_form_follows_images_and_dimensions():
    assert plan(WIDE, 550, 200).form == "dual"
    assert plan(NARROW, 100, 200).form == "primal"
    assert plan(NARROW, 100, 30).form == "dual"


def test_tiles_hold_the_rows_of_a_coarse_cell():
    assert plan(WIDE, 550, 200).tile_rows == 4
    assert plan([(8, 75, 75), (8, 38, 38), (8, 19, 19)], 12, 50).tile_rows in (3, 4)


def test_operations_of_one_layer_are_counted():
    # One position, one dimension, 30 + 1 images, primal: A'A 2 x 30, the root 1/3, one solve.
    assert make_plan([(1, 1, 1)], [[0]], 30, 1, GIB, 1).flops == 61


def test_memory_limit_is_kept():
    free = plan(WIDE, 550, 200, cores=2)
    tight = plan(WIDE, 550, 200, cores=2, memory=free.peak_bytes // 2)
    assert free.workers == 2
    assert tight.peak_bytes <= free.peak_bytes // 2
    assert tight.flops >= free.flops


def test_memory_counts_all_images_that_are_read():
    assert plan(WIDE, 550, 20, images=400).peak_bytes > plan(WIDE, 550, 20).peak_bytes


def test_too_little_memory_is_one_line():
    with pytest.raises(EvaluatorError, match=r"240 images x 550 dimensions need 0\.\d+ GiB, allow"):
        plan(WIDE, 550, 200, memory=2**20)


def test_channels_are_chosen_coarsest_first():
    assert chosen_channels([(4, 8, 8), (4, 4, 4), (2, 2, 2)], [0, 3, 5, 9]) == [
        (2, [1]),
        (1, [1]),
        (0, [0, 3]),
    ]
    assert chosen_channels([(4, 8, 8), (4, 4, 4)], [6]) == [(1, [2])]


MEASURE = """
import sys
import numpy as np, torch
from tests.array_layers import ArrayLayer
from evaluator.padim import draw_dims, score
from evaluator.plan import Plan, make_plan
from tests.benchmarks.memory import forget_peak, peak_bytes
class FromDisk(ArrayLayer):
    def read(self, first_row, last_row):
        return self.values[:, first_row:last_row].copy()
dims, workers = int(sys.argv[1]), int(sys.argv[2])
layers = [
    FromDisk(np.random.default_rng(0).random((180, side, side, channels), dtype=np.float32))
    for side, channels in ((24, 128), (12, 256), (6, 512))
]
drawn = [draw_dims(896, dims, 0)]
shapes = [(layer.channels, layer.height, layer.width) for layer in layers]
plan = make_plan(shapes, drawn, 150, 30, 2**30, workers)
images, cpu = range(180), torch.device("cpu")
few = [ArrayLayer(layer.values[:, :2, :2, :4]) for layer in layers]  # libraries take their own
score(few, [[0, 5, 9]], images[:150], images[150:], 0.01, Plan(plan.form, 1, workers, 0, 0), cpu)
forget_peak()
before = peak_bytes()
score(layers, drawn, images[:150], images[150:], 0.01, plan, cpu)
print(plan.form, (peak_bytes() - before) / plan.peak_bytes)
"""


@pytest.mark.skipif(not forget_peak(), reason="this system does not let a process reset its peak")
@pytest.mark.parametrize(("dims", "workers", "form"), [(400, 2, "dual"), (90, 1, "primal")])
def test_planned_memory_is_what_is_used(dims, workers, form):
    command = [sys.executable, "-c", MEASURE, str(dims), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, ratio = done.stdout.split()
    assert found == form
    assert 0.4 < float(ratio) < 1.2
