"""A user's own folder, in mixed formats and with faults in it, from `add-task` to a model that timm loads."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdlora.ledger import read_record
from tests.support.commands import call, call_here, environment
from tests.support.finished_chain import hashes, stages_run

pytestmark = pytest.mark.slow
NAMES = ["2", "10", "Überweg & Schild"]


@pytest.fixture
def project(finished: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished project."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder)
    return folder


def scene(seed: int) -> Image.Image:
    """A coloured picture of 40×24 pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 24), Image.Resampling.BICUBIC)


def put(folder: Path, seed: int) -> None:
    """Ten pictures, each in a format of its own."""
    folder.mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scene(seed).save(folder / "photo.jpg", quality=90, exif=turned, icc_profile=profile)
    scene(seed + 1).convert("CMYK").save(folder / "print.jpg", quality=95)
    scene(seed + 2).save(folder / "web.webp", lossless=True)
    scene(seed + 3).save(folder / "old.bmp")
    scene(seed + 4).quantize(16).save(folder / "palette.png", transparency=0)
    scene(seed + 5).convert("RGBA").save(folder / "clear.png")
    scene(seed + 6).convert("L").save(folder / "grey.tif")
    scene(seed + 7).convert("CMYK").save(folder / "cmyk.tiff")
    scene(seed + 8).convert("1").save(folder / "two colours.png")
    deep = np.asarray(scene(seed + 9).convert("L"), np.uint16) * 257
    Image.fromarray(deep).save(folder / "sixteen bits.png")


@pytest.mark.usefixtures("preloaded")
def test_own_images_with_every_fault_are_refused_then_mended_learned_predicted_and_exported(
    project: Path, tmp_path: Path
) -> None:
    own = project / "data/raw/own"
    for index, name in enumerate(NAMES):
        put(own / name, 100 * index)
    (own / "2/empty.png").touch()
    (own / "2/page.jpg").write_bytes(b"<html>not found</html>")
    (own / "10/cut.bmp").write_bytes((own / "10/old.bmp").read_bytes()[:200])
    Image.new("F", (9, 9)).save(own / "10/floats.tif")
    Image.new("1", (2000, 2000)).save(own / "10/huge.png")
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("max_pixels: 178_956_970", "max_pixels: 1_000_000"))
    call_here(project, "run")
    before = hashes(project)

    assert 't03: {after: t02, source: data/raw/own, classes: ["2", "10", "Überweg & Schild"]}' in call(
        project, "sdlora", "add-task", "data/raw/own"
    )
    refused = subprocess.run(
        ["sdlora", "run"], cwd=project, env=environment(), capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "error: cannot read data/raw/own/2/empty.png" in refused.stderr
    listed = (project / ".sdlora/unreadable/t03.txt").read_text()
    assert {line.split(" (")[0].rpartition("/")[2] for line in listed.splitlines()} == {
        "empty.png", "page.jpg", "cut.bmp", "floats.tif", "huge.png",
    }  # fmt: skip
    assert hashes(project) == before

    for name in ("2/empty.png", "2/page.jpg", "10/cut.bmp", "10/floats.tif", "10/huge.png"):
        (own / name).unlink()
    ran = stages_run(call_here(project, "run"))
    assert ran == ["split@t03", "fit@t03", "freeze@t03", "evaluate@t03", "gate@t03", "report"]
    record = read_record(project / "artifacts/model/t03")
    assert [entry["name"] for entry in record["classes"]] == [*"abcd", *NAMES]
    counts = json.loads((project / "artifacts/split/t03/split.json").read_text())["counts"]
    assert all(found == {"train": 8, "test": 2} for found in counts.values())

    lines = call_here(project, "predict", "3", "data/raw/own", "--format", "jsonl").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 30
    evaluated = json.loads((project / "artifacts/evaluation/t03/metrics.json").read_text())
    assert evaluated["tasks"] == ["t01", "t02", "t03"]
    said = call_here(project, "export", "timm", str(tmp_path / "served"))
    assert float(said.partition("|Δlogit| ")[2].split()[0]) < 1e-4
    program = (
        "import sys, timm; sys.modules['sdlora'] = None\n"
        "model = timm.create_model('local-dir:.', pretrained=True)\n"
        "print(model.pretrained_cfg['label_names'])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "served", capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == str([*"abcd", *NAMES])
    assert call_here(project, "audit", "verify").splitlines()[-1].startswith("the chain holds")


def test_what_predict_sees_is_what_was_evaluated_in_every_format(tmp_path: Path) -> None:
    """A picture is decoded alike wherever it comes from: as a file, or packed."""
    import pyarrow as pa

    from pipelines.data.decoding import decode, open_picture
    from sdlora.preprocessing import Preprocessing

    put(tmp_path / "pictures", 7)
    preprocessing = Preprocessing(
        input_size=(3, 32, 32),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        interpolation="bicubic",
        crop_pct=0.9,
        crop_mode="center",
    )
    paths = sorted((tmp_path / "pictures").iterdir())
    images = pa.array([path.read_bytes() for path in paths], pa.large_binary())
    packed = decode(pa.table({"id": [path.name for path in paths], "image": images}), preprocessing)

    for path, pixels in zip(paths, packed, strict=True):
        opened = open_picture(io.BytesIO(path.read_bytes()).getvalue())
        assert np.array_equal(preprocessing.pixels(opened), pixels)
