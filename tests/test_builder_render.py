import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from builder.errors import BuilderError
from builder.prior import draw
from builder.recipe import load_recipe
from builder.render import check_theta, render
from tests import naive


def noise(count: int, height: int, width: int, channels: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (count, height, width, channels)).astype(np.uint8)


def assert_agrees_with_float64(
    normals: np.ndarray, normal_index: np.ndarray, theta: np.ndarray
) -> None:
    fast = render(normals, normal_index, theta)
    slow = np.stack([naive.render(normals[n], t) for n, t in zip(normal_index, theta, strict=True)])
    difference = np.abs(fast.astype(int) - slow)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-4


def paint(normal: np.ndarray, *components: list[float], scale: float) -> np.ndarray:
    """One image: uint8 [H, W, C] painted with the given components."""
    theta = np.array([[value for part in components for value in part] + [scale]], np.float32)
    return render(normal[None], np.zeros(1, np.int64), theta)[0]


@pytest.mark.parametrize("name", ["paper", "fine"])
@pytest.mark.parametrize("size", [(224, 224), (61, 90), (17, 241)])
def test_render_agrees_with_float64(name: str, size: tuple[int, int]):
    recipe = load_recipe(name)
    normals = noise(5, *size, 3)
    normal_index, theta = draw(recipe, 0, 40, len(normals))
    assert_agrees_with_float64(normals, normal_index, theta)


@pytest.mark.parametrize("components", [1, 2, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_render_agrees_with_float64_for_other_vectors(components: int, channels: int):
    changed = {"components": components, "channels": channels}
    recipe = load_recipe("fine").model_copy(update=changed)
    normals = noise(2, 48, 40, channels)
    normal_index, theta = draw(recipe, 0, 30, len(normals))
    assert_agrees_with_float64(normals, normal_index, theta)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 5.0])
@pytest.mark.parametrize("rho", [-0.999, 0.0, 0.999])
def test_render_agrees_with_float64_at_the_ends_of_the_ranges(sigma: float, rho: float):
    rng = np.random.default_rng(0)
    normals = noise(1, 64, 64, 3)
    theta = np.zeros((20, 4 * 9 + 1), np.float32)
    parts = theta[:, :-1].reshape(20, 4, 9)
    parts[..., :5] = rng.uniform(-1, 1, (20, 4, 5))
    parts[..., 5:7] = sigma
    parts[..., 7] = rho
    parts[..., 8] = [0.7, 0.2, 0.1, 0.0]
    theta[:, -1] = 1
    fast = render(normals, np.zeros(20, np.int64), theta)
    slow = np.stack([naive.render(normals[0], one) for one in theta])
    assert np.abs(fast.astype(int) - slow).max() <= 1


def test_render_of_a_large_image_keeps_the_accuracy():
    recipe = load_recipe("paper").model_copy(update={"components": 1})
    normals = noise(1, 64, 2048, 3)
    normal_index, theta = draw(recipe, 0, 8, 1)
    theta[:, -1] = 1
    assert_agrees_with_float64(normals, normal_index, theta)


# A change here is a change of every dataset: none of those built before can be resumed or extended.
@pytest.mark.parametrize(
    ("name", "theta_hash", "pixel_hash"),
    [
        ("paper", "1b209df1e1e1fd06", "0b94bfbd3d4a2a5b"),
        ("fine", "cd66e7382c165b9f", "d59e11032f3eccfb"),
    ],
)
def test_draws_and_pixels_are_what_they_were(name: str, theta_hash: str, pixel_hash: str):
    ramp = np.arange(40 * 40 * 3).reshape(1, 40, 40, 3).astype(np.uint8)
    normal_index, theta = draw(load_recipe(name), 999_990, 1_000_010, 1)
    assert hashlib.sha256(theta.tobytes()).hexdigest()[:16] == theta_hash
    pixels = render(ramp, normal_index, theta)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == pixel_hash


# sigma 0.2 on five pixels 0.5 apart: a neighbour has exp(-3.125) = 0.0439 of the peak, a
# diagonal one its square, 0.0019; so white 255 falls to 243.8 and 254.5 beside a black dot.
BLACK_DOT = [
    [255, 255, 255, 255, 255],
    [255, 255, 244, 255, 255],
    [255, 244, 0, 244, 255],
    [255, 255, 244, 255, 255],
    [255, 255, 255, 255, 255],
]


def test_render_of_a_black_dot_on_white():
    white = np.full((5, 5, 1), 255, np.uint8)
    image = paint(white, [-1, 0, 0, 0.2, 0.2, 0, 1], scale=1)
    assert image[..., 0].tolist() == BLACK_DOT


# Component means in (x, y): x counts columns to the right, y rows downwards.
TOP_RIGHT = [
    [100, 100, 200],
    [100, 100, 100],
    [100, 100, 100],
]


def test_render_puts_x_on_columns_and_y_on_rows():
    grey = np.full((3, 3, 1), 100, np.uint8)
    v = 200 / 127.5 - 1
    image = paint(grey, [v, 1, -1, 0.1, 0.1, 0, 1], scale=1)
    assert image[..., 0].tolist() == TOP_RIGHT


def test_render_mixes_by_scale():
    grey = np.full((3, 3, 3), 100, np.uint8)
    component = [1, -1, 0, 0, 0, 0.1, 0.1, 0, 1]
    image = paint(grey, component, scale=0.5)
    # half of 100, half of (255, 0, 127.5)
    assert image[1, 1].tolist() == [178, 50, 114]


def test_render_normalises_each_component_by_its_width():
    black = np.zeros((41, 41, 1), np.uint8)
    # Equal shares; the second is four times as wide each way, so its peak is a sixteenth.
    image = paint(black, [1, -0.5, 0, 0.05, 0.05, 0, 0.5], [1, 0.5, 0, 0.2, 0.2, 0, 0.5], scale=1)
    assert image[20, 10, 0] == 255
    assert image[20, 30, 0] == round(255 / 16)


def test_render_with_scale_zero_is_the_normal_image():
    normals = noise(1, 20, 20, 3)
    _, theta = draw(load_recipe("paper"), 0, 5, 1)
    theta[:, -1] = 0
    assert (render(normals, np.zeros(5, np.int64), theta) == normals).all()


def test_render_keeps_the_normal_image_where_nothing_is_visible():
    normals = noise(1, 64, 64, 3)
    image = paint(normals[0], [1, 1, 1, -0.9, -0.9, 0.02, 0.02, 0, 1], scale=1)
    assert (image[16:, 16:] == normals[0, 16:, 16:]).all()
    assert (image != normals[0]).any()


def test_render_of_a_needle_that_misses_every_pixel_agrees_with_float64():
    normal = noise(1, 16, 16, 1)[0]
    theta = np.array([-1, 0.05, 0.03, 0.002, 0.002, 0.0, 1, 1], np.float32)
    assert (paint(normal, theta[:-1].tolist(), scale=1) == naive.render(normal, theta)).all()


def test_render_of_a_batch_is_the_render_of_each_at_any_number_of_threads():
    normals = noise(3, 33, 135, 3)
    normal_index, theta = draw(load_recipe("fine"), 0, 9, 3)
    together = render(normals, normal_index, theta)
    alone = [render(normals, normal_index[i : i + 1], theta[i : i + 1])[0] for i in range(9)]
    assert (together == np.stack(alone)).all()
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert (together == render(normals, normal_index, theta)).all()
    finally:
        numba.set_num_threads(threads)


def test_render_writes_to_the_given_array():
    normals = noise(1, 16, 16, 1)
    grey = load_recipe("fine").model_copy(update={"channels": 1})
    normal_index, theta = draw(grey, 0, 2, 1)
    out = np.empty((2, 16, 16, 1), np.uint8)
    assert render(normals, normal_index, theta, out) is out
    assert (out == render(normals, normal_index, theta)).all()
    with pytest.raises(BuilderError, match=r"expected contiguous uint8 \[2, 16, 16, 1\], found"):
        render(normals, normal_index, theta, out[:1])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 1.5, "v and mu in"),
        (3, np.nan, "v and mu in"),
        (5, 0.0, "sigma > 0"),
        (6, np.inf, "sigma > 0"),
        (7, 1.0, "|rho| < 1"),
        (8, 0.9, "pi >= 0 with sum 1"),
        (-1, 1.01, "s in"),
        (-1, np.nan, "s in"),
    ],
)
def test_theta_out_of_range_is_refused(place: int, value: float, message: str):
    _, theta = draw(load_recipe("fine"), 0, 3, 1)
    theta[1, place] = value
    with pytest.raises(BuilderError) as caught:
        check_theta(theta, 3)
    assert caught.value.message.startswith("theta: row 1 breaks ")
    assert message in caught.value.message


def test_render_of_the_wrong_arrays_is_refused():
    _, theta = draw(load_recipe("fine"), 0, 2, 1)
    index = np.zeros(2, np.int64)
    normals = noise(1, 8, 8, 3)
    with pytest.raises(BuilderError, match=r"expected uint8 \[M, H, W, 1 or 3\], found float64"):
        render(normals.astype(float), index, theta)
    with pytest.raises(BuilderError, match=r"expected float32 \[N, K\*9\+1\], found float64"):
        render(normals, index, theta.astype(np.float64))
    with pytest.raises(BuilderError, match="outside the 1 normal images"):
        render(normals, index + 1, theta)
    with pytest.raises(BuilderError, match=r"expected int64 \[2\]"):
        render(normals, index[:1], theta)


# Prints a hash of everything that a compiler could get wrong.
PROGRAM = """
import hashlib
import numpy as np
from builder.prior import draw
from builder.recipe import load_recipe
from builder.render import render

digest = hashlib.sha256()
for name in ("paper", "fine"):
    for channels in (1, 3):
        recipe = load_recipe(name).model_copy(update={"channels": channels})
        normals = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, channels))
        normal_index, theta = draw(recipe, 0, SAMPLES, 2)
        digest.update(theta.tobytes())
        digest.update(render(normals.astype(np.uint8), normal_index, theta).tobytes())
print(digest.hexdigest())
"""


def hash_in_another_process(samples: int, height: int, width: int, **environment: str) -> str:
    program = PROGRAM.replace("SAMPLES", f"{samples}").replace("HEIGHT", f"{height}")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program.replace("WIDTH", f"{width}")],
        env={**os.environ, "NUMBA_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_render_without_compilation_gives_the_same_bytes():
    compiled = hash_in_another_process(1, 24, 40)
    assert hash_in_another_process(1, 24, 40, NUMBA_DISABLE_JIT="1") == compiled


@pytest.fixture(scope="module")
def hash_on_this_cpu() -> str:
    return hash_in_another_process(12, 100, 150)


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["x86-64", "haswell", "skylake-avx512"])
def test_bytes_do_not_depend_on_the_cpu(cpu: str, hash_on_this_cpu: str, tmp_path: Path):
    needed = {"x86-64": "sse2", "haswell": "avx2", "skylake-avx512": "avx512f"}[cpu]
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or needed not in cpuinfo.read_text().split():
        pytest.skip(f"this CPU has no {needed}")
    compiled_for_it = hash_in_another_process(
        12, 100, 150, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path)
    )
    assert compiled_for_it == hash_on_this_cpu
