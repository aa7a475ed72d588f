"""What a plan will take: bytes, core-hours, wall time, from about 64 samples made here."""

from __future__ import annotations

import time
from dataclasses import dataclass

from builder.errors import BuilderError
from builder.images import encode_pixels
from builder.plan import Plan, render_some
from builder.progress import duration
from builder.storage import Storage, make_room

ESTIMATE_SAMPLES = 64
# What a sample's tar headers, theta and JSON take beside the image; and a packed sample.
_SAMPLE_OVERHEAD_BYTES = 3 * 512 + 128 + 512 + 256


@dataclass(frozen=True)
class Estimate:
    """What the plan will take, from about 64 samples made on this machine."""

    bytes: int
    core_seconds: float

    def lines(self, plan: Plan, cores: int) -> str:
        """For people, with the wall time of `cores` cores."""
        hours, wall = self.core_seconds / 3600, self.core_seconds / cores
        return (
            f"estimate: {self.bytes / 1e9:.2f} GB in {plan.shard_count} shards, "
            f"{self.core_seconds / plan.recipe.samples * 1e3:.2f} ms a sample and core, "
            f"{hours:.2f} core-hours: {duration(wall)} on {cores} cores"
        )


def estimate(storage: Storage, plan: Plan) -> Estimate:
    """Make up to 64 samples, spread over the dataset, and scale up; writing is not in it."""
    recipe = plan.recipe
    if plan.contents == "parameters":
        per_sample = 4 * (recipe.theta_length + 1)
        return Estimate(recipe.samples * per_sample, recipe.samples * 10e-6)
    count = min(ESTIMATE_SAMPLES, recipe.samples)
    indices = [i * recipe.samples // count for i in range(count)]
    _, images, seconds = render_some(storage, recipe, plan.normals, indices)
    start = time.process_time()
    size = sum(len(encode_pixels(image, recipe.codec)) for image in images)
    seconds += time.process_time() - start
    each = size / count + _SAMPLE_OVERHEAD_BYTES + 4 * recipe.theta_length
    return Estimate(int(recipe.samples * each), recipe.samples * seconds / count)


def refuse_small_disk(storage: Storage, estimated: Estimate, present_bytes: int) -> None:
    """Raise BuilderError when the rest of the dataset cannot fit on the local disk."""
    missing = make_room(storage, estimated.bytes - present_bytes)
    if missing:
        raise BuilderError(f"--out {missing}; choose another disk, or fewer samples")
