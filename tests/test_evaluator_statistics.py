"""The file of statistics: round trip, equal bytes, size, and refusal of everything else."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest

from evaluator import npz
from evaluator.errors import EvaluatorError
from evaluator.metrics import measure
from evaluator.statistics import Statistics, load_statistics, save_statistics, statistics
from tests.evaluator_scores import count, tied_category

MEMBERS = [
    "format", "format_version", "above", "tied", "same_score", "region", "region_image",
    "region_pixels", "positives_of", "negatives_of", "pairs", "grid_negatives", "grid_region",
    "image_score", "image_defective",
]  # fmt: skip


def fields(s: Statistics) -> dict:
    return {field.name: getattr(s, field.name) for field in dataclasses.fields(s)}


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(EvaluatorError) as error:
        load_statistics(data, "a.npz")
    assert "\n" not in error.value.message
    return error.value.message.removeprefix("a.npz: not statistics of semiformula: ")


@pytest.fixture(scope="module")
def saved() -> bytes:
    return save_statistics(count(*tied_category()))


def test_round_trip_keeps_every_array(saved):
    before, after = fields(count(*tied_category())), fields(load_statistics(saved, "a.npz"))
    for name, array in before.items():
        assert after[name].dtype == array.dtype
        np.testing.assert_array_equal(after[name], array)


def test_metrics_of_the_file_are_those_of_the_maps(saved):
    assert measure(load_statistics(saved, "a.npz")) == measure(count(*tied_category()))


def test_round_trip_without_masks():
    maps, _, defective = tied_category()
    s = statistics(maps, None, defective)
    again = load_statistics(save_statistics(s), "a.npz")
    assert measure(again) == measure(s)
    assert not again.has_masks


def test_many_regions_need_wider_numbers():
    masks = np.zeros((2, 40, 40), np.bool_)
    masks[1, ::2, ::2] = True  # 400 regions of a pixel each
    s = count(np.arange(3200, dtype=np.float32).reshape(masks.shape), masks)
    assert s.region.dtype == np.uint16
    again = load_statistics(save_statistics(s), "a.npz")
    assert again.region.dtype == np.uint16
    np.testing.assert_array_equal(again.region, s.region)


def test_equal_statistics_are_equal_bytes(saved):
    assert save_statistics(load_statistics(saved, "a.npz")) == saved
    with zipfile.ZipFile(io.BytesIO(saved)) as file:
        assert {member.date_time for member in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_numpy_reads_the_file(saved):
    with np.load(io.BytesIO(saved), allow_pickle=False) as file:
        assert file.files == MEMBERS
        assert file["format"] == b"semiformula-statistics"
        assert file["format_version"].view("<i8") == 1
        low, high = file["tied"][0], file["tied"][1]
        tied = low + 256 * high.astype(int)
    assert tied.tolist() == count(*tied_category()).tied.tolist()


def test_file_takes_at_most_three_bytes_per_positive_pixel():
    rng = np.random.default_rng(0)
    masks = np.zeros((24, 128, 128), np.bool_)
    masks[6:, 20:80, 30:70] = masks[6:, 90:110, 90:120] = True
    noise = rng.gamma(8, 1, (24, 32, 32)).repeat(4, axis=1).repeat(4, axis=2)
    maps = (noise + 4 * masks + rng.random(masks.shape) / 10).astype(np.float32)
    s = count(maps, masks)
    assert len(save_statistics(s)) < 3 * s.positives


def test_another_version_is_refused_by_number(saved):
    content = members(saved)
    content["format_version.npy"] = content["format_version.npy"][:-8] + bytes([2] + [0] * 7)
    assert refusal(zipped(content)) == "format_version is 2, this version reads 1 only"


def test_another_format_is_refused_by_name(saved):
    content = {**members(saved), "format.npy": npy(np.array(b"something"))}
    assert refusal(zipped(content)) == (
        "format is b'something', expected b'semiformula-statistics'"
    )


def test_members_missing_or_unknown_are_refused(saved):
    content = members(saved)
    more = zipped({**content, "extra.npy": npy(np.ones(2))})
    assert refusal(more) == "missing, unknown or doubled member 'extra.npy'"
    del content["pairs.npy"]
    assert refusal(zipped(content)) == "missing, unknown or doubled member 'pairs.npy'"


def test_pickled_objects_are_refused(saved):
    content = {**members(saved), "tied.npy": npy(np.array([{}, 1], object))}
    assert refusal(zipped(content)) == "a member has type '|O'"


def test_size_is_bounded_before_anything_is_unpacked(saved, monkeypatch):
    monkeypatch.setattr(npz, "MAX_BYTES", 100_000)
    bomb = zipped(
        {**members(saved), "tied.npy": npy(np.zeros((4, 10**6), np.uint8))}, zipfile.ZIP_DEFLATED
    )
    assert len(bomb) < 100_000
    assert refusal(bomb).endswith("bytes unpacked, at most 100000 are read")


def test_size_below_the_real_one_is_refused(saved):
    bomb = zipped(
        {**members(saved), "tied.npy": npy(np.zeros((4, 10**6), np.uint8))}, zipfile.ZIP_DEFLATED
    )
    size = len(npy(np.zeros((4, 10**6), np.uint8)))
    lie = bomb.replace(size.to_bytes(4, "little"), (256).to_bytes(4, "little"))
    assert lie != bomb
    assert refusal(lie).startswith("not a whole .npz file")


@pytest.mark.parametrize(
    ("name", "array", "line"),
    [
        ("tied", np.zeros(9, np.uint32), "tied has type uint32 and shape (9,)"),
        ("tied", np.zeros((4, 9), np.uint8), "tied has shape (9,), expected (45,)"),
        ("region", np.zeros((8, 45), np.uint8), "region has type uint8 and shape (8, 45)"),
        ("same_score", np.full(45, 2, np.uint8), "same_score has type uint8 and shape (45,)"),
        ("image_score", np.zeros(6), "image_score has type float64 and shape (6,)"),
        ("image_score", np.full(6, np.nan, np.float32), "an image score is not finite"),
        ("image_defective", np.ones(6, bool), "pairs has shape (4, 6), expected (6, 6)"),
        ("format_version", np.ones(1, int), "format_version is [1], this version reads 1 only"),
    ],
)
def test_wrong_types_and_shapes_are_refused(saved, name, array, line):
    content = {**members(saved), f"{name}.npy": npy(array)}
    assert refusal(zipped(content)) == line


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("region", lambda a: np.roll(a, 1), "pairs disagree with above and tied"),
        ("region", lambda a: a + 9, "a pixel lies in no region"),
        ("region_pixels", lambda a: a[::-1], "region_pixels disagree with region"),
        ("region_image", lambda a: a + 1, "a region lies in no image"),
        ("region_image", lambda a: a * 0, "a region lies in a good image"),
        ("positives_of", lambda a: a + 1, "positives_of disagree with region_pixels"),
        ("negatives_of", lambda a: a + 1, "pairs disagree with above and tied"),
        ("negatives_of", lambda a: a - 1000, "a count is absurd"),
        ("pairs", lambda a: a + np.eye(4, 6, dtype=int), "pairs disagree with above and tied"),
        ("pairs", lambda a: a[:, [1, 0, 2, 3, 4, 5]] * [[3, -3, 1, 1, 1, 1]], "a count is absurd"),
        ("above", lambda a: a[::-1], "above has counts above 2^32"),
        ("above", lambda a: a // 2, "above and tied are out of order"),
        ("tied", lambda a: a + 1, "above and tied are out of order"),
        ("same_score", lambda a: ~a, "above and tied are out of order"),
        ("grid_negatives", lambda a: a // 2, "grid_negatives end early"),
        ("grid_region", lambda a: a // 2, "grid_region ends early"),
    ],
)
def test_counts_that_disagree_are_refused(saved, name, change, line):
    s = load_statistics(saved, "a.npz")
    array = getattr(s, name)
    changed = dataclasses.replace(s, **{name: change(array).astype(array.dtype)})
    assert refusal(save_statistics(changed)) == line


def test_cut_and_flipped_files_are_refused(saved):
    for end in (0, 1, 100, len(saved) // 2, len(saved) - 1):
        refusal(saved[:end])
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(saved), 300):
        flipped = bytearray(saved)
        flipped[place] ^= 1 << int(rng.integers(8))
        try:
            again = load_statistics(bytes(flipped), "a.npz")
        except EvaluatorError:
            continue
        assert save_statistics(again) == saved  # a bit of the zip's own that nothing depends on
