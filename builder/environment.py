"""What encoded bytes depend on besides the recipe: versions of libraries, and three golden samples.

Pixels are the same on every machine; a codec's bytes are not the same in every version. A plan
records both, and each worker proves itself on the goldens before it writes anything.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import Field

from builder.artifacts import Model, sha256_of
from builder.errors import BuilderError
from builder.images import encode_pixels
from builder.index import Environment
from builder.recipe import Codec, Recipe, Sha256

GOLDENS = 3

# The libraries whose version decides each codec's bytes, by the names of Environment's fields.
_ENCODERS: dict[Codec, tuple[str, ...]] = {
    "webp": ("pillow", "libwebp"),
    "png": ("pillow", "zlib"),
    "jpeg": ("pillow", "libjpeg"),
}


class Golden(Model):
    """Sample `index` as the planning machine made it: SHA-256 of theta, pixels, and encoding."""

    index: int = Field(ge=0)
    theta_sha256: Sha256
    pixels_sha256: Sha256
    encoded_sha256: Sha256


def this_environment() -> Environment:
    """The versions and the processor of this machine."""
    import numba
    import PIL
    from PIL import features

    def version(name: str) -> str:
        return str(features.version(name) or "none")

    return Environment(
        kernel=_kernel_version(),
        python=platform.python_version(),
        numpy=np.__version__,
        numba=numba.__version__,
        llvmlite=metadata.version("llvmlite"),
        pillow=PIL.__version__,
        libwebp=version("webp"),
        zlib=f"zlib-ng {version('zlib_ng')}" if features.check("zlib_ng") else version("zlib"),
        libjpeg=f"turbo {version('libjpeg_turbo')}"
        if features.check("libjpeg_turbo")
        else version("jpg"),
        cpu=_processor(),
    )


def _kernel_version() -> str:
    """A hash of the files that decide parameters and pixels."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("_[a-z]*.py")), folder / "prior.py"]
    return sha256_of(b"".join(path.read_bytes() for path in files))[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def golden_indices(recipe: Recipe) -> list[int]:
    """The first, the middle and the last sample; fewer where these coincide."""
    last = recipe.samples - 1
    return sorted({0, last // 2, last})


def make_goldens(
    recipe: Recipe,
    indices: Sequence[int],
    theta: npt.NDArray[np.float32],
    images: npt.NDArray[np.uint8],
) -> list[Golden]:
    """Hash the given samples: theta float32 [N, L], images uint8 [N, H, W, C]."""
    return [
        Golden(
            index=index,
            theta_sha256=sha256_of(theta[i].astype("<f4").tobytes()),
            pixels_sha256=sha256_of(images[i].tobytes()),
            encoded_sha256=sha256_of(encode_pixels(images[i], recipe.codec)),
        )
        for i, index in enumerate(indices)
    ]


def check_goldens(
    recipe: Recipe, planned: Sequence[Golden], found: Sequence[Golden], environment: Environment
) -> None:
    """Raise BuilderError, naming the library at fault, unless this machine makes the same bytes."""
    here = this_environment()
    if here.kernel != environment.kernel:  # goldens could agree by luck: a pixel in a few images
        raise BuilderError(
            f"this builder's kernel is {here.kernel}, the plan's {environment.kernel}; work with "
            "the builder that planned, or plan again in another place; nothing was written"
        )
    suspects = {
        "theta_sha256": ("parameters", ("numpy", "numba", "llvmlite")),
        "pixels_sha256": ("pixels", ("numba", "llvmlite", "numpy")),
        "encoded_sha256": (f"{recipe.codec} bytes", _ENCODERS[recipe.codec]),
    }
    for old, new in zip(planned, found, strict=True):
        for field, (what, libraries) in suspects.items():
            if getattr(old, field) == getattr(new, field):
                continue
            differing = [
                f"{name} {getattr(here, name)} (planned with {getattr(environment, name)})"
                for name in libraries
                if getattr(here, name) != getattr(environment, name)
            ]
            cause = " and ".join(differing) or (
                f"no version differs ({', '.join(libraries)}): "
                f"processor {here.cpu} (planned on {environment.cpu}), or damaged normals"
            )
            raise BuilderError(
                f"golden sample {old.index}: this machine makes other {what} than the plan: "
                f"{cause}; install the plan's version, nothing was written"
            )
