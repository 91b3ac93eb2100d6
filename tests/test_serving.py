"""docs/how-to/serving.md does what it says: its server, run as written, answers as the model does."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.data.decoding import open_picture
from pipelines.serving.export import export
from pipelines.serving.exports.subject import Subject, reference_logits
from pipelines.serving.predict import PredictionSettings, predict
from sdlora.ledger import record_hash
from tests.support.case_files import chunk, encoded, with_chunks
from tests.support.chains import make_chain, picture
from tests.support.repository import REPOSITORY

PAGE = (REPOSITORY / "docs/how-to/serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/model of a chain on the packaged backbone, whose step t02 is exported beside."""
    root = tmp_path_factory.mktemp("served")
    models = make_chain(root, "glyph_vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's exporter
        warnings.simplefilter("ignore", FutureWarning)
        export("onnx", root / "served", model=models / "t02", backbone=None, images=None, count=4)
    (root / "server.py").write_text(PAGE.split("```python\n")[1].split("```")[0], encoding="utf-8")
    return models


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    """Where the page's server answers, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "server:app", "--host", "127.0.0.1", "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if key != "MODEL"}
    process = subprocess.Popen(
        command,
        cwd=models.parent.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/model").close()
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def ask(url: str, data: bytes | None = None) -> dict[str, object]:
    with urllib.request.urlopen(url, data=data) as answer:
        return json.load(answer)


def test_the_server_answers_as_the_model_does(models: Path, address: str) -> None:
    subject = Subject(model=models / "t02", backbone=models / "t00")
    files = [encoded(picture(seed, mode=mode)) for seed in range(4) for mode in ("L", "RGB", "RGBA")]
    shares = reference_logits(subject, [open_picture(data) for data in files]).softmax(dim=1)
    expected, best = shares.max(dim=1)

    for data, share, label in zip(files, expected, best, strict=True):
        found = ask(f"{address}/predict", data)
        assert found["class"] == f"class {int(label)} | ä"
        torch.testing.assert_close(torch.tensor(found["probability"]), share, rtol=0, atol=1e-5)


def test_the_server_says_which_step_answers(models: Path, address: str) -> None:
    assert ask(f"{address}/model") == {
        "step": "t02",
        "sha256": record_hash(models / "t02"),
        "classes": [f"class {label} | ä" for label in range(4)],
    }


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_text(size: int) -> bytes:
    """A PNG with a text chunk of so many bytes."""
    text = PngInfo()
    text.add_text("note", "x" * size, zip=True)
    return saved(picture(1), "PNG", pnginfo=text)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"no image", id="no-image"),
        pytest.param(b"", id="nothing"),
        pytest.param(saved(Image.new("LAB", (40, 30)), "TIFF"), id="lab"),
        pytest.param(saved(Image.new("F", (40, 30), 0.5), "TIFF"), id="float"),
        pytest.param(saved(Image.new("I", (40, 30), 7), "TIFF"), id="32-bit"),
        pytest.param(saved(Image.new("I;16", (40, 30), 7), "PNG"), id="16-bit"),
        pytest.param(saved(Image.new("L", (2, 500)), "PNG"), id="strip"),
        pytest.param(saved(picture(1), "PNG")[:200], id="cut-off"),
        pytest.param(with_text(3_000_000), id="large-text"),
    ],
)
def test_the_server_reads_and_refuses_what_predict_does_and_says_the_same(
    models: Path, address: str, data: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "it.png").write_bytes(data)
    chosen = PredictionSettings(
        top=1,
        batch_size=None,
        device="cpu",
        precision="fp32",
        format="jsonl",
        out=tmp_path / "out.jsonl",
        unknown=False,
    )
    status = predict(models / "t02", None, [str(tmp_path / "it.png")], chosen)
    said = json.loads((tmp_path / "out.jsonl").read_text())

    if status:
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            ask(f"{address}/predict", data)
        with refused.value:
            assert json.load(refused.value)["detail"] == said["error"]
    else:
        assert ask(f"{address}/predict", data)["class"] == said["predictions"][0]["class"]


def test_the_server_reads_a_picture_whose_text_is_broken(address: str) -> None:
    plain = encoded(picture(0, mode="RGB"))
    broken = with_chunks(plain, chunk(b"tEXt", b"a\0b", checksum=1))

    assert ask(f"{address}/predict", broken) == ask(f"{address}/predict", plain)
