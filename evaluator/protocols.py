"""Named protocols: everything between a photograph and its score map that is not the backbone.

Two numbers can be compared when the hash of their protocols is the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from evaluator.artifacts import Model

Interpolation = Literal["lanczos", "bilinear", "bicubic"]
MaskRule = Literal["nonzero-nearest", "nonzero-nearest-corner"]
BlurBorder = Literal["reflect", "mirror"]


class Protocol(Model):
    """The settings that all backbones of a report share; lengths in pixels."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    resize_px: int = Field(ge=16, le=4096)
    crop_px: int = Field(ge=0, le=4096, description="centre crop; 0: none")
    interpolation: Interpolation
    mask_rule: MaskRule = Field(
        description="defective where any channel is above 0, then resized with nearest (the pixel "
        "below the centre; -corner: below the upper left corner), then cropped"
    )
    upsampling: Literal["bilinear"] = Field(description="of the distances, half-pixel centres")
    blur_sigma_px: float = Field(ge=0, le=100)
    blur_border: BlurBorder = Field(description="reflect: d c b a | a b c d; mirror: d c b | a b c")
    blur_radius_px: int = Field(ge=0, le=4096, description="where the kernel ends; 0: at 4 sigmas")
    epsilon: float = Field(gt=0, le=1e6)

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        if self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} is more than resize_px {self.resize_px}")
        return self

    @property
    def size_px(self) -> int:
        """Rows and columns of the pixels that are scored."""
        return self.crop_px or self.resize_px


# As the best-known reimplementation (xiahaifeng1995/PaDiM) does it: Pillow's resize of images and
# masks, torch's upsampling, SciPy's blur. The paper that we reproduce names none of these settings.
PAPER = Protocol(
    name="paper",
    resize_px=256,
    crop_px=224,
    interpolation="lanczos",
    mask_rule="nonzero-nearest",
    upsampling="bilinear",
    blur_sigma_px=4.0,
    blur_border="reflect",
    blur_radius_px=0,
    epsilon=0.01,
)
PROTOCOLS: dict[str, Protocol] = {
    "paper": PAPER,
    # anomalib 2.7.0's PadimModel behind its default pre-processor: torchvision v2's Resize (of
    # floats; Pillow's is at most 0.92 grey levels off), which samples masks from the corner;
    # torch's `reflect` border; and 1e-5 more on the diagonal before its inverse.
    "anomalib": PAPER.model_copy(
        update={
            "name": "anomalib",
            "crop_px": 0,
            "interpolation": "bilinear",
            "mask_rule": "nonzero-nearest-corner",
            "blur_border": "mirror",
            "epsilon": 0.01001,
        }
    ),
    "full": PAPER.model_copy(update={"name": "full", "crop_px": 0}),
}
OWN = "own"  # the name of a protocol that differs from the named one it started from


def changed(protocol: Protocol, **changes: Any) -> Protocol:
    """`protocol` with the changes that are not None; named `own` where one of them changed it.

    Not checked: the command line says what is wrong in the words of its options.
    """
    wanted = {key: value for key, value in changes.items() if value is not None}
    result = protocol.model_copy(update=wanted)
    return protocol if result == protocol else result.model_copy(update={"name": OWN})


def protocol_sha256(protocol: Protocol) -> str:
    """Hex SHA-256 over the canonical JSON of all but the name."""
    data = protocol.model_dump(mode="json", exclude={"name"})
    return hashlib.sha256(
        json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()
