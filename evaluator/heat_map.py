"""Draws one inspected photograph: the picture, its map in units of the threshold, the verdict."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from evaluator.images import FORMATS
from evaluator.protocols import Protocol

PANEL_PX = 448  # the longer side of the photograph and of the map
LEAST_PX = 32  # the shorter side of a very long part
TOP_OF_SCALE = 2.0  # times the threshold; the same for every picture of every model
MARGIN_PX, TITLE_PX, SCALE_PX, TICKS_PX = 12, 30, 18, 52
INK, PAPER, OUTSIDE = (20, 20, 20), (255, 255, 255), (225, 225, 225)
OUTLINE, ACCEPTED, REJECTED = (0, 230, 255), (0, 120, 50), (200, 0, 30)


@dataclass(frozen=True)
class Verdict:
    """What is written beside the pictures; `place` is (x, y) in the original's pixels."""

    name: str
    score: float
    threshold: float
    place: tuple[int, int]

    @property
    def rejected(self) -> bool:
        """Whether the score lies above the threshold."""
        return self.score > self.threshold


def original_place(
    row: int, column: int, size: tuple[int, int], protocol: Protocol
) -> tuple[int, int]:
    """(x, y) in the original (width, height) of the centre of a pixel of the map."""
    offset = (protocol.resize_px - protocol.size_px) // 2
    x, y = (
        min(int((place + offset + 0.5) * length / protocol.resize_px), length - 1)
        for place, length in zip((column, row), size, strict=True)
    )
    return x, y


@cache
def _colours() -> npt.NDArray[np.uint8]:
    from matplotlib import colormaps  # a quarter of a second, and --no-maps needs none

    table: npt.NDArray[np.uint8] = (colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(
        np.uint8
    )
    return table


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def draw(
    data: bytes, scores: npt.NDArray[np.float32], verdict: Verdict, protocol: Protocol
) -> bytes:
    """The picture as PNG, from the photograph's bytes and its map [size, size].

    Photograph and map have the original's aspect; what the crop leaves out is grey in the map. The
    line is drawn where the map passes the threshold, the ring round its largest value.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        size = image.size
        image.draft("RGB", (PANEL_PX * 2, PANEL_PX * 2))  # JPEG decodes small at once
        scale = PANEL_PX / max(size)
        width, height = (max(LEAST_PX, round(length * scale)) for length in size)
        photograph = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    values, left, top = _fit(scores, (width, height), protocol)
    box = (slice(top, top + values.shape[0]), slice(left, left + values.shape[1]))
    level = np.clip(values / max(verdict.threshold, 1e-30) / TOP_OF_SCALE, 0, 1)
    heat = np.full((height, width, 3), OUTSIDE, np.uint8)
    heat[box] = _colours()[np.rint(level * 255).astype(np.uint8)]
    outline = np.zeros((height, width), np.bool_)
    outline[box] = _edge(values > verdict.threshold)
    shown = np.array(photograph)
    shown[outline] = heat[outline] = OUTLINE
    ring = tuple(
        (place + 0.5) * panel / length
        for place, panel, length in zip(verdict.place, (width, height), size, strict=True)
    )
    return _compose(shown, heat, (ring[0], ring[1]), verdict)


def _fit(
    scores: npt.NDArray[np.float32], panel: tuple[int, int], protocol: Protocol
) -> tuple[npt.NDArray[np.float32], int, int]:
    """The map at the panel's scale, and its left and top edge there."""
    offset = (protocol.resize_px - protocol.size_px) // 2
    edges = [
        [round(edge * length / protocol.resize_px) for edge in (offset, offset + protocol.size_px)]
        for length in panel
    ]
    (left, right), (top, bottom) = edges
    side = (max(1, right - left), max(1, bottom - top))
    resized = Image.fromarray(scores).resize(side, Image.Resampling.BILINEAR)
    return np.asarray(resized), left, top


def _edge(inside: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The pixels of `inside` that touch a pixel which is not, two pixels thick."""
    kept = inside
    for _ in range(2):
        padded = np.pad(kept, 1)
        kept = kept & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~kept


def _compose(
    photograph: npt.NDArray[np.uint8],
    heat: npt.NDArray[np.uint8],
    ring: tuple[float, float],
    verdict: Verdict,
) -> bytes:
    height, width = heat.shape[:2]
    content = max(height, 160)  # the scale's labels stay apart
    full = (4 * MARGIN_PX + 2 * width + SCALE_PX + TICKS_PX, 2 * MARGIN_PX + TITLE_PX + content)
    page = Image.new("RGB", (max(full[0], 420), full[1]), PAPER)
    pen = ImageDraw.Draw(page)
    top, second = MARGIN_PX + TITLE_PX, 2 * MARGIN_PX + width
    page.paste(Image.fromarray(photograph), (MARGIN_PX, top))
    page.paste(Image.fromarray(heat), (second, top))
    for left in (MARGIN_PX, second):
        x, y = left + ring[0], top + ring[1]
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), outline=PAPER, width=3)
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), outline=INK, width=1)
    _draw_scale(page, pen, (second + width + MARGIN_PX, top, content))
    colour = REJECTED if verdict.rejected else ACCEPTED
    word = "REJECTED" if verdict.rejected else "accepted"
    share = verdict.score / max(verdict.threshold, 1e-30)
    text = f"{word}   {share:.2f} x threshold"
    font = _font(16)
    pen.text((MARGIN_PX, MARGIN_PX - 2), text, fill=colour, font=font)
    start = MARGIN_PX + pen.textlength(text, font=font) + 16
    name = _shortened(pen, verdict.name, font, page.width - MARGIN_PX - start)
    pen.text((start, MARGIN_PX - 2), name, fill=INK, font=font)
    buffer = io.BytesIO()
    page.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _draw_scale(page: Image.Image, pen: ImageDraw.ImageDraw, box: tuple[int, int, int]) -> None:
    """The colour bar: 0 to twice the threshold, the threshold marked as the outline is drawn."""
    left, top, height = box
    levels = np.linspace(255, 0, height).round().astype(np.uint8)
    bar = np.repeat(_colours()[levels][:, None], SCALE_PX, axis=1)
    page.paste(Image.fromarray(bar), (left, top))
    font = _font(12)
    for tick in (0.0, 0.5, 1.0, 1.5, TOP_OF_SCALE):
        y = top + (height - 1) * (1 - tick / TOP_OF_SCALE)
        pen.line((left + SCALE_PX, y, left + SCALE_PX + 4, y), fill=INK)
        label = f"{tick:g}+" if tick == TOP_OF_SCALE else f"{tick:g}"
        y_text = min(max(y - 7, top), top + height - 15)
        pen.text((left + SCALE_PX + 7, y_text), label, fill=INK, font=font)
    y = top + (height - 1) * (1 - 1 / TOP_OF_SCALE)
    pen.line((left, y, left + SCALE_PX, y), fill=OUTLINE, width=2)


def _shortened(
    pen: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    room: float,
) -> str:
    """The end of `text` that fits: file names differ at their ends."""
    text = text.encode(errors="replace").decode().replace("\n", " ")
    if pen.textlength(text, font=font) <= room:
        return text
    while text and pen.textlength("…" + text, font=font) > room:
        text = text[1:]
    return "…" + text
