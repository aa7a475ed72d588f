"""`evaluator fit`: the threshold, the model's two files, and what a reader refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter

import evaluator
from evaluator import conformal
from evaluator import model as model_module
from evaluator.artifacts import parse_model, readable_json
from evaluator.errors import EvaluatorError
from evaluator.fit import _check_range
from evaluator.images import load_image
from evaluator.model import PadimModel, load_model
from evaluator.networks import build, make_network
from evaluator.scorer import Scorer
from evaluator.whitening import make_tables, make_tree
from tests import naive
from tests.inspection_models import LAYERS, amend, describe, fit, tensors_of, write_parts

CPU = torch.device("cpu")
PAGE = Path(evaluator.__file__).with_name("MODEL.md").read_text(encoding="utf-8")
EXAMPLE, SCHEMA = (json.loads(part.split("```")[0]) for part in PAGE.split("```json\n")[1:])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Twenty photographs of good parts. Not to be changed."""
    return write_parts(tmp_path_factory.mktemp("parts"), 20)


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory) -> Path:
    """15 fitted images, 12 dimensions: form `factors`. Not to be changed."""
    out = tmp_path_factory.mktemp("model") / "model"
    result = fit(parts, out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def wide_model(parts, tmp_path_factory) -> Path:
    """15 fitted images, 20 dimensions: form `features`. Not to be changed."""
    out = tmp_path_factory.mktemp("model") / "wide"
    result = fit(parts, out, "--dims", 20)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize(
    ("count", "rate", "expected"),
    [(19, 0.05, 19), (39, 0.05, 38), (19, 0.1, 18), (20, 0.1, 19), (4, 0.25, 4), (99, 0.01, 99)],
)
def test_threshold_is_the_score_at_the_rank_by_hand(count, rate, expected):
    scores = [float(i) for i in range(count, 0, -1)]
    assert conformal.threshold(scores, rate) == expected


@pytest.mark.parametrize(("rate", "least"), [(0.05, 19), (0.01, 99), (0.3, 3), (0.5, 1)])
def test_threshold_of_too_few_scores_says_how_many(rate, least):
    assert conformal.least_held_out(rate) == least
    with pytest.raises(EvaluatorError, match=f"needs {least} held-out photographs"):
        conformal.threshold([1.0] * (least - 1), rate)
    assert conformal.threshold([1.0] * least, rate) == 1.0


def test_good_parts_are_rejected_at_most_at_the_promised_rate():
    rng = np.random.default_rng(0)
    scores = rng.gamma(3, size=(4000, 31))
    rejected = [row[30] > conformal.threshold(row[:30].tolist(), 0.1) for row in scores]
    # 28th of 30: exactly 3 / 31 = 9.7 %; three standard errors are 1.4 points.
    assert abs(np.mean(rejected) - 3 / 31) < 0.014


def test_p_value_counts_scores_at_least_as_large():
    scores = [1.0, 2.0, 2.0, 3.0]
    assert [conformal.p_value(scores, s) for s in (0.5, 2.0, 2.5, 4.0)] == [1.0, 0.8, 0.4, 0.2]


def test_clopper_pearson_is_the_printed_table():
    assert conformal.clopper_pearson(0, 20) == pytest.approx((0, 0.16843), abs=1e-5)
    assert conformal.clopper_pearson(2, 20) == pytest.approx((0.01235, 0.31698), abs=1e-5)
    assert conformal.clopper_pearson(20, 20) == pytest.approx((0.83157, 1), abs=1e-5)


def test_chance_of_so_many_rejected_by_hand():
    # Threshold: the largest of 3. Two new parts both above it: 2 x 1 of 5 x 4; at least one: 2 / 5.
    assert conformal.chance(2, 2, 3, 0.25) == pytest.approx(0.1)
    assert conformal.chance(1, 2, 3, 0.25) == pytest.approx(0.4)
    assert conformal.chance(0, 2, 3, 0.25) == 1


def test_check_that_differs_from_normals_is_told(parts, tmp_path):
    check = write_parts(tmp_path / "check", 3, seed=5, defect=True)
    result = fit(parts, tmp_path / "out", "--check", check)
    assert "3 are rejected (100.0 %; 95 % interval 29.2 to 100.0 %)" in result.stdout
    # 3 of 3 above the largest of 5: 3! 5! / 8! = 1/56 is not below 1 %, four are: 1/126.
    assert "these differ" not in result.stdout
    write_parts(check, 4, seed=6, defect=True)
    result = fit(parts, tmp_path / "out", "--check", check)
    assert "So many have a probability of 7.9e-03" in result.stdout
    assert "the promise does not hold for such ones" in result.stdout


class Features(torch.nn.Module):
    """A network for the scorer that is asked for maps of given features only."""

    layers = ("a", "b", "c")
    mean = std = (1.0, 1.0, 1.0)
    device = CPU
    extractor = torch.nn.Identity()


GRIDS = {
    "nested": ((8, 8), (4, 4), (2, 2)),
    "not nested": ((7, 5), (4, 3), (2, 2)),
    "finest last": ((2, 2), (4, 3), (7, 5)),
}


@pytest.mark.parametrize("spread", [1.0, 100.0])  # variances of 1e4 beside an epsilon of 0.01
@pytest.mark.parametrize("train", [2, 6, 12, 30])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_squares_equal_the_slow_version(grids, train, spread):
    rng = np.random.default_rng(train)
    channels, chosen = (4, 5, 6), [[0, 2, 3], [1, 2, 4], [0, 1, 3, 4, 5]]
    layers = [
        (rng.normal(3, spread, (train + 4, c, *g)) * rng.uniform(0.01, 1, (1, c, 1, 1))).astype(
            np.float32
        )
        for c, g in zip(channels, grids, strict=True)
    ]
    for layer in layers:
        layer[-1] = layer[0]  # a test image that is a training image
    finest_first = sorted(range(3), key=lambda k: -grids[k][0] * grids[k][1])
    starts = np.cumsum([0, *(channels[k] for k in finest_first)])
    dims = [int(s) + d for s, k in zip(starts, finest_first, strict=False) for d in chosen[k]]
    expected = naive.padim_distances([layers[k] for k in finest_first], dims, train, 0.01)
    tree = make_tree(grids)
    fitted = [
        layers[lv.layer][:train, chosen[lv.layer]].reshape(train, -1, lv.cells).swapaxes(1, 2)
        for lv in tree.levels
    ]
    for dual in (True, False):
        tables = make_tables(tree, fitted, 0.01, dual)
        protocol = parse_model(PadimModel, EXAMPLE, "example").protocol
        scorer = Scorer(Features(), chosen, tree, tables, protocol, dual)
        coarsest_first = [torch.from_numpy(layers[lv.layer][train:]) for lv in tree.levels]
        squares = scorer.squares(coarsest_first)[scorer.node]
        found = squares.sqrt().T.reshape(expected.shape).numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["model", "wide_model"])
def test_scores_equal_the_slow_version(name, parts, request):
    folder = request.getfixturevalue(name)
    inspector = load_model(folder, CPU)
    record = inspector.record
    assert record.form == {"model": "factors", "wide_model": "features"}[name]
    tensors = load_file(tensors_of(folder))
    paths = sorted(parts.glob("*.png"))
    words = np.random.Philox(key=[0, 1]).random_raw(20)
    held_out = set(np.argsort(words)[:5].tolist())
    network = make_network(
        "again",
        build("shufflenet_v2_x0_5"),
        ("maxpool", "stage2"),
        (0.5,) * 3,
        (0.5,) * 3,
        224,
        CPU,
    )
    state = {k.removeprefix("backbone."): v for k, v in tensors.items() if "backbone." in k}
    network.extractor.load_state_dict(state, strict=False)
    order = [i for i in range(20) if i not in held_out] + sorted(held_out)
    pixels = np.stack([load_image(paths[i], record.protocol) for i in order])
    with torch.inference_mode():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        outputs = network.extractor(images)
    layers = [outputs[key].numpy() for key in LAYERS]
    if record.form == "features":
        for layer in layers:
            layer[:15] = layer[:15].astype(np.float16)
    rows = 2  # the slow version's time: the first rows of the finest grid
    dims = [*record.layers[0].dims, *(24 + d for d in record.layers[1].dims)]
    cut = [layers[0][:, :, :rows], layers[1][:, :, : rows // 2]]
    distances = naive.padim_distances(cut, dims, 15, 0.01)
    with torch.inference_mode():
        squares = inspector.scorer.squares([outputs["stage2"][15:], outputs["maxpool"][15:]])
    grid = squares[inspector.scorer.node].sqrt().T.reshape(5, 56, 56).numpy()
    np.testing.assert_allclose(grid[:, :rows], distances, rtol=1e-4)
    maps, scores = inspector(pixels[15:])
    fine = torch.nn.functional.interpolate(torch.from_numpy(grid)[:, None], 224, mode="bilinear")
    blurred = [gaussian_filter(one, 4.0, mode="reflect") for one in fine[:, 0].numpy()]
    np.testing.assert_allclose(maps, blurred, rtol=1e-4)
    assert sorted(scores.tolist()) == pytest.approx(record.calibration.scores, rel=1e-4)
    assert record.calibration.threshold == record.calibration.scores[4]  # ceil(6 x 0.8) = 5th


def test_fit_prints_the_promise_and_the_realised_rates(parts, tmp_path):
    check = write_parts(tmp_path / "check", 3, seed=5)
    shutil.copy(parts / "000.png", check / "known.png")
    shutil.copytree(parts, tmp_path / "parts")
    shutil.copy(parts / "000.png", tmp_path / "parts" / "copy.png")
    result = fit(tmp_path / "parts", tmp_path / "out", "--check", check)
    assert result.exit_code == 0, result.output
    assert "fitted on 15 photographs, 5 held out (copies left out: 1)" in result.stdout
    assert "rejected with a probability of at most 20 %" in result.stdout
    assert "Of the 5 held out, 0 lie above it (0.0 %)." in result.stdout
    assert f"Of 3 in {check} (1 that the model knows left out)" in result.stdout


def test_model_holds_no_layer_behind_the_last_one(model):
    keys = load_file(tensors_of(model)).keys()
    assert {key.split(".")[1] for key in keys if key.startswith("backbone.")} == {
        "conv1", "stage2",
    }  # fmt: skip


def test_same_command_writes_the_same_bytes(parts, model, tmp_path):
    assert fit(parts, tmp_path / "again").exit_code == 0
    for name in ("model.json", tensors_of(model).name):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes()


def test_seed_draws_dims_and_held_out(parts, model, tmp_path):
    assert fit(parts, tmp_path / "other", "--seed", 3).exit_code == 0
    first, other = (json.loads((f / "model.json").read_text()) for f in (model, tmp_path / "other"))
    assert first["layers"] != other["layers"]
    assert first["photographs"] == other["photographs"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--false-reject-rate", "0.05"], "needs 19 held out, so 75 in all at --held-out 0.25"),
        (["--held-out", "0.95"], "20 different photographs; .* so 30 in all"),
        (["--max-memory", "0.001"], "--max-memory: 15 photographs x 12 dimensions need"),
        (["--dims", "1"], "none of the drawn dimensions is in layer"),
        (["--layers", "maxpool,stage7"], "no layer 'stage7'"),
    ],
)
def test_fit_that_cannot_be_is_one_line(parts, tmp_path, more, line):
    result = fit(parts, tmp_path / "out", *more)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert re.search(line, result.stderr), result.stderr
    assert not (tmp_path / "out" / "model.json").exists()


def test_photograph_that_cannot_be_read_is_one_line(parts, tmp_path):
    shutil.copytree(parts, tmp_path / "parts")
    (tmp_path / "parts" / "021.png").write_bytes(b"no image")
    result = fit(tmp_path / "parts", tmp_path / "out")
    assert result.exit_code == 1
    assert "021.png: not a readable image" in result.stderr
    assert "Traceback" not in result.stderr


def test_rate_outside_of_0_and_1_is_wrong_usage(parts, tmp_path):
    for rate in ("0", "1", "nan"):
        assert fit(parts, tmp_path / "out", "--false-reject-rate", rate).exit_code == 2


# The format


def test_page_shows_the_schema_of_the_model():
    schema = PadimModel.model_json_schema()
    own = {name for name in schema["$defs"] if hasattr(model_module, name)}
    own -= {"BackboneRecord", "Protocol"}  # in REPORT.md
    schema["$defs"] = {name: schema["$defs"][name] for name in own}
    assert schema == SCHEMA


def test_page_shows_a_valid_model():
    record = parse_model(PadimModel, EXAMPLE, "model.json")
    assert json.loads(readable_json(record.model_dump(mode="json"))) == EXAMPLE


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"format_version": 2}, "format_version is 2, this version reads 1 only"),
        ({"format": "semiformula-report"}, "format is 'semiformula-report'"),
        ({"treshold": 1}, "unknown key 'treshold'"),
        ({"calibration": EXAMPLE["calibration"] | {"threshold": 2.0}}, "threshold must be the"),
        ({"calibration": EXAMPLE["calibration"] | {"scores": [2, 1, 3, 4]}}, "must be ascending"),
        ({"protocol": EXAMPLE["protocol"] | {"epsilon": 0.1}}, "protocol_sha256 is not that of"),
        ({"layers": EXAMPLE["layers"][:1]}, "layers must be those of backbone"),
        ({"photographs": EXAMPLE["photographs"] | {"held_out": 5}}, "number of calibration.scores"),
    ],
)
def test_record_that_is_wrong_is_refused(change, pattern):
    with pytest.raises(EvaluatorError, match=pattern) as caught:
        parse_model(PadimModel, EXAMPLE | change, "model.json")
    assert "\n" not in caught.value.message


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors, and make name, length and hash right again."""
    path = tensors_of(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    describe(path)


def cut(folder: Path) -> None:
    path = tensors_of(folder)
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = tensors_of(folder)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def no_safetensors(folder: Path) -> None:
    path = tensors_of(folder)
    path.write_bytes(b"\xff" * 64)
    describe(path)


def other_layer(folder: Path) -> None:
    record = json.loads((folder / "model.json").read_text())
    record["layers"][0]["height"] = 1_000_000
    (folder / "model.json").write_text(json.dumps(record))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "bytes, model.json expects .* is the file cut"),
    "flipped": (flip, "sha256 is .* copy both files again"),
    "missing": (lambda f: tensors_of(f).unlink(), "missing, though model.json names"),
    "no json": (lambda f: (f / "model.json").unlink(), "no such file"),
    "half a json": (lambda f: (f / "model.json").write_text('{"format":'), "is the file cut"),
    "other bytes": (no_safetensors, "not a safetensors file"),
    "huge": (lambda f: amend(f, 2**40, "0" * 64), "key 'tensors.bytes'"),
    "huge layer": (
        other_layer,
        "layer 'maxpool' is 24 x 1000000 x 56, .* gives 24 x 56 x 56",
    ),
    "surplus": (
        lambda f: rewrite(f, lambda t: t.update(more=torch.ones(1))),
        "tensor 'more' is surplus",
    ),
    "lacking": (lambda f: rewrite(f, lambda t: t.pop("mean.0")), "tensor 'mean.0' is missing"),
    "other shape": (
        lambda f: rewrite(f, lambda t: t.update({"mean.0": t["mean.0"][:-1].clone()})),
        r"'mean.0' is F32 \[3135, \d+\], expected F32 \[3136",
    ),
    "other type": (
        lambda f: rewrite(f, lambda t: t.update({"mean.0": t["mean.0"].double()})),
        "'mean.0' is F64",
    ),
    "not finite": (
        lambda f: rewrite(f, lambda t: t["whiten.0"].view(-1)[7:8].fill_(float("nan"))),
        "'whiten.0' holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_model_that_is_damaged_is_refused_in_one_line(model, tmp_path, name):
    damage, pattern = DAMAGES[name]
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    damage(folder)
    with pytest.raises(EvaluatorError, match=pattern) as caught:
        load_model(folder, CPU)
    assert "\n" not in caught.value.message


def test_features_that_float16_cannot_hold_are_refused():
    network = make_network("x", build("resnet18"), ("layer1",), (0.5,) * 3, (0.5,) * 3, 64, CPU)
    values = np.array([65504.0, 65600.0], np.float32)
    _check_range(network, Path("a.png"), values[:1], np.float16)
    _check_range(network, Path("a.png"), values, np.float32)
    with pytest.raises(EvaluatorError, match=r"a\.png or its neighbours reach 6\.56e"):
        _check_range(network, Path("a.png"), values, np.float16)
    values[0] = np.nan
    with pytest.raises(EvaluatorError, match="not finite"):
        _check_range(network, Path("a.png"), values, np.float32)
