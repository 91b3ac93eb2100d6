"""Every export gives the logits of the model that was evaluated, in a process that knows nothing of this package."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.ledger.find_step import find_model
from pipelines.project.errors import InputError, UnequalError
from pipelines.project.files import write_json
from pipelines.serving import export as module
from pipelines.serving.export import FORMATS, check_pictures, export
from pipelines.serving.exports.subject import Subject, reference_logits, reference_scores
from tests.support.chains import make_chain, picture
from tests.support.families import FAMILIES
from tests.support.repository import REPOSITORY

NAMES = ["glyph_vit", *FAMILIES]
Exported = Callable[[str, str], tuple[Path, list[str]]]
CARRIED = {"classes.json", "preprocessing.json", "ledger.json"}
FILES = {
    "timm": {"model.safetensors", "config.json"},
    "hub": {"model.safetensors", "config.json", "README.md"},
    "peft": {"adapter_model.safetensors", "adapter_config.json", "README.md"},
    "onnx": {"model.onnx"},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """artifacts/model of a chain of two steps on the backbone of that name, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_chain(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def exported(chain: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export of a format of such a chain's last step, made once and only looked at, and what was said of it."""
    made: dict[tuple[str, str], tuple[Path, list[str]]] = {}

    def make(form: str, name: str) -> tuple[Path, list[str]]:
        if (form, name) not in made:
            out = tmp_path_factory.mktemp(f"{form}-{name}") / "out"
            made[form, name] = out, run_export(form, out, chain(name) / "t02")
        return made[form, name]

    return make


def run_export(name: str, out: Path, model: Path, **changes: object) -> list[str]:
    with warnings.catch_warnings():
        # PEFT's import and torch's own exporter use what other packages deprecate.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return export(name, out, **{"model": model, "backbone": None, "images": None, "count": 64, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(("head", "score"), [("rgda", "relative"), ("lda", "mahalanobis"), ("ncm", "energy")])
def test_onnx_has_a_second_output_which_is_the_score_for_unknown_images(
    tmp_path: Path, head: str, score: str
) -> None:
    import onnx
    import onnxruntime

    model = make_chain(tmp_path, "glyph_vit", head=head, unknown=score) / "t02"
    said = run_export("onnx", tmp_path / "onnx", model)
    subject = Subject(model=model, backbone=model.parent / "t00")
    pictures = check_pictures(subject, None, 5)
    images = torch.stack([subject.preprocessing(each) for each in pictures])
    session = onnxruntime.InferenceSession(
        str(tmp_path / "onnx/model.onnx"), providers=["CPUExecutionProvider"]
    )
    logits, scores = session.run(["logits", "score"], {"images": images.numpy()})
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "onnx/model.onnx").metadata_props}

    torch.testing.assert_close(
        torch.from_numpy(logits), reference_logits(subject, pictures), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(
        torch.from_numpy(scores), reference_scores(subject, pictures), rtol=1e-4, atol=1e-2
    )
    assert json.loads(facts["unknown"]) == {"score": score, "threshold": 0.0}
    assert any(line.startswith("unknown images: second output") for line in said)
    assert said[-1].endswith('.run(["logits", "score"], {"images": images})')
    for form in ("timm", "hub", "peft"):
        told = run_export(form, tmp_path / form, model)
        assert (
            f"unknown images: {form} holds no score for them; onnx and sdlora predict --unknown have it"
            in told
        )


RUN_ALL = """
import sys
sys.modules["sdlora"] = sys.modules["pipelines"] = None
import contextlib, io, json, os, traceback

answers = []
for folder, program in json.load(sys.stdin):
    os.chdir(folder)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(program, {"__name__": "__main__"})
        answers.append([said.getvalue(), ""])
    except BaseException:
        answers.append(["", traceback.format_exc()])
print(json.dumps(answers))
"""


def without_sdlora(path: Path, programs: list[tuple[Path, str]]) -> list[tuple[str, str]]:
    """Run each program in its folder, all in one process, which cannot import this package but the tests' families.

    Return what each printed, and its traceback where it failed.
    """
    (path / "tests/support").mkdir(parents=True, exist_ok=True)
    (path / "tests/__init__.py").touch()
    (path / "tests/support/__init__.py").touch()
    shutil.copy(REPOSITORY / "tests/support/families.py", path / "tests/support")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([(str(folder), program) for folder, program in programs]),
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [(said, error) for said, error in json.loads(done.stdout)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if form == "onnx" else ()) for form in FORMATS]
)
def test_every_format_has_the_logits_of_every_family(form: str, name: str, exported: Exported) -> None:
    out, lines = exported(form, name)

    assert set(contents(out)) == FILES[form] | CARRIED
    assert lines[0].startswith("step t02: 4 classes of 2 tasks, record ")
    assert lines[1].startswith("check: max |Δlogit| ")
    assert float(lines[1].split()[3]) < 1e-5
    assert "on 10 images" in lines[1]


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_made_twice_has_the_same_bytes_and_names_no_place(
    form: str, chain: Callable[[str], Path], exported: Exported, tmp_path: Path
) -> None:
    first, _ = exported(form, "tiny_vit")
    run_export(form, tmp_path / "again", chain("tiny_vit") / "t02")

    assert contents(first) == contents(tmp_path / "again")
    for data in contents(first).values():
        assert b"site-packages" not in data
        assert str(tmp_path.parent).encode() not in data
        assert str(REPOSITORY).encode() not in data


def test_an_export_carries_classes_preprocessing_and_the_ledgers_head(
    chain: Callable[[str], Path], exported: Exported
) -> None:
    from sdlora.ledger import record_hash

    models = chain("tiny_vit")
    out, _ = exported("timm", "tiny_vit")
    found = {name: json.loads((out / name).read_bytes()) for name in CARRIED}

    assert [entry["name"] for entry in found["classes.json"]["classes"]] == [
        f"class {i} | ä" for i in range(4)
    ]
    assert found["preprocessing.json"]["input_size"] == [3, 16, 16]
    assert found["preprocessing.json"]["crop_pct"] == 0.9
    assert found["ledger.json"]["sha256"] == record_hash(models / "t02")
    assert found["ledger.json"]["head"] is None  # no verdict lies beside these models
    assert found["ledger.json"]["earlier"] == [
        {"step": step, "sha256": record_hash(models / step)} for step in ("t01", "t00")
    ]


@pytest.fixture(scope="module")
def quadratic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step whose head is not linear."""
    return make_chain(tmp_path_factory.mktemp("quadratic"), "tiny_vit", head="rgda") / "t02"


def test_onnx_holds_a_head_that_is_not_linear(quadratic: Path, tmp_path: Path) -> None:
    import onnxruntime

    lines = run_export("onnx", tmp_path / "out", quadratic)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    subject = Subject(model=quadratic, backbone=quadratic.parent / "t00")
    pictures = [picture(seed) for seed in range(5)]
    batch = torch.stack([subject.preprocessing(one) for one in pictures]).numpy()
    expected = reference_logits(subject, pictures)

    assert not any(line.startswith("head: ") for line in lines)
    assert "classifier" not in json.loads((tmp_path / "out/ledger.json").read_bytes())
    for count in (1, 5):
        (found,) = session.run(["logits"], {"images": batch[:count]})
        np.testing.assert_allclose(found, expected[:count].numpy(), rtol=1e-5, atol=1e-4)
    assert (expected - reference_logits(subject, pictures, linear=True)).abs().max() > 0.1


@pytest.mark.parametrize("form", ["timm", "hub", "peft"])
def test_what_can_hold_linear_rows_only_says_which_it_holds_instead(
    form: str, quadratic: Path, tmp_path: Path
) -> None:
    lines = run_export(form, tmp_path / "out", quadratic)
    (said,) = [line for line in lines if line.startswith("head: ")]
    ledger = json.loads((tmp_path / "out/ledger.json").read_bytes())

    assert said.startswith(
        f"head: {form} can hold a linear one only, so lda in place of rgda: another class for "
    )
    assert said.endswith(" of 10 images; onnx holds rgda")
    assert ledger["classifier"] == {"head": "lda", "in_place_of": "rgda"}
    if form != "timm":
        card = (tmp_path / "out/README.md").read_text()
        assert "`lda`, made of" in card
        assert "`rgda`" in card
        assert "model-index" not in card


LOADED_BY_TIMM = ["glyph_vit", "tiny_deit_distilled", "tiny_siglip"]
LOADED_BY_PEFT = ["glyph_vit", "tiny_vit"]
LOAD_WITH_TIMM = """
import json, timm, torch
from PIL import Image
model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
images = torch.stack([transform(Image.open(f"../{{i}}.png").convert("{mode}")) for i in range(3)])
print(json.dumps([model(images).tolist(), model.pretrained_cfg["label_names"]]))
"""


def mode_of(name: str) -> str:
    return "L" if name == "glyph_vit" else "RGB"


@pytest.fixture(scope="module")
def loaded(
    chain: Callable[[str], Path], exported: Exported, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[str, str]]:
    """What the programs that load exports say in a process without this package: (format, name) → said, fault."""
    root = tmp_path_factory.mktemp("loaded")
    programs: dict[tuple[str, str], tuple[Path, str]] = {}
    for name in LOADED_BY_TIMM:
        folder = shutil.copytree(exported("timm", name)[0], root / f"timm-{name}/out")
        for seed in range(3):
            picture(seed, mode=mode_of(name)).save(folder.parent / f"{seed}.png")
        programs["timm", name] = folder, LOAD_WITH_TIMM.format(mode=mode_of(name))
    for name in LOADED_BY_PEFT:
        folder = shutil.copytree(exported("peft", name)[0], root / f"peft-{name}/out")
        models = chain(name)
        shutil.copy(models / "t00/backbone.safetensors", folder)
        subject = Subject(model=models / "t02", backbone=models / "t00")
        images = torch.stack([subject.preprocessing(picture(seed)) for seed in range(3)])
        save_file({"images": images}, folder.parent / "images.safetensors")
        shown = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        say = '\nprint(model(load_file("../images.safetensors")["images"]).tolist())\n'
        programs["peft", name] = folder, shown + say + shown.replace(".merge_and_unload()", "") + say
    # timm itself has the packaged backbone; it learns of the tests' families after that one was loaded.
    order = sorted(programs, key=lambda key: key[1] != "glyph_vit")
    given = [
        (folder, program if name == "glyph_vit" else f"import tests.support.families\n{program}")
        for (_, name), (folder, program) in ((key, programs[key]) for key in order)
    ]
    return dict(zip(order, without_sdlora(root / "path", given), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED_BY_TIMM)
def test_timm_alone_loads_the_folder(
    name: str, chain: Callable[[str], Path], loaded: dict[tuple[str, str], tuple[str, str]]
) -> None:
    said, fault = loaded["timm", name]
    assert not fault
    logits, labels = json.loads(said)
    subject = Subject(model=chain(name) / "t02", backbone=chain(name) / "t00")
    pictures = [picture(seed, mode=mode_of(name)) for seed in range(3)]

    torch.testing.assert_close(torch.tensor(logits), reference_logits(subject, pictures), rtol=0, atol=1e-5)
    assert labels == [f"class {label} | ä" for label in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED_BY_PEFT)
def test_the_readme_of_an_adapter_loads_it_with_peft_alone(
    name: str, chain: Callable[[str], Path], loaded: dict[tuple[str, str], tuple[str, str]]
) -> None:
    said, fault = loaded["peft", name]
    assert not fault
    answers = said.splitlines()
    subject = Subject(model=chain(name) / "t02", backbone=chain(name) / "t00")
    expected = reference_logits(subject, [picture(seed) for seed in range(3)])

    assert len(answers) == 2
    for answer in answers:
        torch.testing.assert_close(torch.tensor(json.loads(answer)), expected, rtol=0, atol=1e-5)


def test_the_adapters_rank_is_the_sum_of_all_ranks(exported: Exported) -> None:
    out, _ = exported("peft", "tiny_vit")
    tensors = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_bytes())
    up = tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"]

    # Targets q, v, q, v have the ranks 2, 3, 1, 2 of the first task and 3, 1, 2, 3 of the second.
    assert up.shape == (72, 2 + 3 + 3 + 1)
    assert (up[24:48] == 0).all()
    assert (up[:24, 5:] == 0).all()
    assert (up[48:, :5] == 0).all()
    assert config["r"] == config["lora_alpha"] == 9
    assert config["rank_pattern"] == config["alpha_pattern"] == {"blocks.1.attn.qkv": 8}


def test_the_graph_takes_any_number_of_images_and_says_what_they_are(
    chain: Callable[[str], Path], exported: Exported
) -> None:
    import onnxruntime

    models = chain("tiny_vit")
    out, _ = exported("onnx", "tiny_vit")
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    subject = Subject(model=models / "t02", backbone=models / "t00")
    pictures = [picture(seed) for seed in range(40)]
    batch = torch.stack([subject.preprocessing(one) for one in pictures]).numpy()
    expected = reference_logits(subject, pictures).numpy()

    assert (images.name, images.shape, logits.name) == ("images", ["batch", 3, 16, 16], "logits")
    for count in (1, 3, 40):
        (found,) = session.run(["logits"], {"images": batch[:count]})
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-5)
    assert facts["classes"] == [f"class {label} | ä" for label in range(4)]
    assert facts["preprocessing"] == json.loads((out / "preprocessing.json").read_bytes())
    assert facts["ledger"]["sha256"] == json.loads((out / "ledger.json").read_bytes())["sha256"]


def test_the_card_has_the_accuracies_the_chain_and_front_matter_that_a_hub_reads(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    from sdlora.ledger import record_hash

    models = make_chain(tmp_path, "glyph_vit")
    for step, accuracy in (("t01", [1.0]), ("t02", [0.75, 0.5])):
        metrics = {"step": step, "tasks": ["t01", "t02"][: len(accuracy)], "accuracy": accuracy}
        metrics |= {"samples": [4] * len(accuracy), "correct": [int(4 * a) for a in accuracy]}
        write_json(tmp_path / f"artifacts/evaluation/{step}/metrics.json", metrics)
    run_export("hub", tmp_path / "out", models / "t02")
    _, front, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    facts = YAML(typ="safe").load(front)

    assert facts["library_name"] == "timm"
    assert facts["license"] == "apache-2.0"
    assert facts["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.625}]
    assert "| t01 | class 0 \\| ä, class 1 \\| ä | 100.0 % | 75.0 % |" in text
    assert "| t02 | class 2 \\| ä, class 3 \\| ä |  | 50.0 % |" in text
    for step in ("t00", "t01", "t02"):
        assert record_hash(models / step) in text


def test_an_earlier_step_is_what_it_was(chain: Callable[[str], Path], tmp_path: Path) -> None:
    models = chain("tiny_vit")
    run_export("timm", tmp_path / "out", models / "t01")
    model = load_file(tmp_path / "out/model.safetensors")

    assert model["head.weight"].shape == (2, 24)
    assert json.loads((tmp_path / "out/ledger.json").read_bytes())["step"] == "t01"


def test_a_step_without_directions_is_exported_but_not_as_an_adapter(tmp_path: Path) -> None:
    models = make_chain(tmp_path, "tiny_vit", directions=False)
    run_export("timm", tmp_path / "timm", models / "t02")

    with pytest.raises(InputError, match=r"no direction that an adapter could hold .*; export it as timm"):
        run_export("peft", tmp_path / "peft", models / "t02")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_is_not_the_model_is_refused_and_leaves_nothing(
    form: str, chain: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The reference moves by three times the limit, as if what was written were off by so much."""
    models = chain("tiny_vit")
    monkeypatch.setattr(
        module, "reference_logits", lambda *given, **options: reference_logits(*given, **options) + 3e-4
    )
    with pytest.raises(UnequalError, match=r"max \|Δlogit\| 3\.0e-04 on 10 images .*was not written"):
        run_export(form, tmp_path / "out", models / "t02")

    assert list(tmp_path.iterdir()) == []
    if form == "timm":
        given = {"model": models / "t02", "backbone": None, "images": None, "count": 4}
        assert module.run(form, tmp_path / "out", **given) == 1
        assert capsys.readouterr().err.startswith("error: export timm: max |Δlogit| 3.0e-04 on 4 images")


def test_logits_that_are_no_numbers_are_refused() -> None:
    assert not module.Difference(largest=float("nan"), scale=1.0, images=1).passes
    assert not module.Difference(largest=1.1e-4, scale=24.0, images=1).passes
    assert module.Difference(largest=1.1e-4, scale=28.0, images=1).passes
    assert not module.Difference(largest=8.1e-4, scale=200.0, images=1).passes


@pytest.mark.parametrize("form", ["peft", "onnx"])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    form: str, chain: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(InputError, match=rf"export {form}: needs .*{form}.* pip install 'sdlora\[export\]'"):
        export(form, tmp_path / "out", model=chain("tiny_vit") / "t02", backbone=None, images=None, count=4)


def test_nothing_but_an_earlier_export_is_replaced(chain: Callable[[str], Path], tmp_path: Path) -> None:
    model = chain("tiny_vit") / "t02"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    (tmp_path / "empty").mkdir()
    run_export("timm", tmp_path / "empty", model)
    run_export("hub", tmp_path / "empty", model)

    assert (tmp_path / "empty/README.md").is_file()
    for name in ("mine", "mine/thesis.txt"):
        with pytest.raises(InputError, match="exists and is no export"):
            run_export("timm", tmp_path / name, model)
    assert (tmp_path / "mine/thesis.txt").is_file()
    (tmp_path / "empty/.git").mkdir()
    with pytest.raises(InputError, match="exists and is no export"):
        run_export("hub", tmp_path / "empty", model)
    assert (tmp_path / "empty/.git").is_dir()


def test_a_broken_chain_is_not_exported(tmp_path: Path) -> None:
    models = make_chain(tmp_path, "tiny_vit")
    with (models / "t01/step.json").open("a") as file:
        file.write(" ")

    with pytest.raises(ValueError, match=r"t01/step\.json: not the record that step t02 was made from"):
        run_export("timm", tmp_path / "out", models / "t02")
    assert not (tmp_path / "out").exists()


def test_a_model_folder_away_from_its_chain_is_refused_with_what_to_get(tmp_path: Path) -> None:
    models = make_chain(tmp_path, "tiny_vit")
    shutil.move(models / "t02", tmp_path / "alone")

    with pytest.raises(
        FileNotFoundError, match=r"t01/step\.json: it is missing, and step t02 stands on it; get"
    ):
        run_export("timm", tmp_path / "out", tmp_path / "alone", backbone=models / "t00")
    assert not (tmp_path / "out").exists()


def test_model_folders_without_evaluations_are_exported_on_images_of_ones_own(tmp_path: Path) -> None:
    models = make_chain(tmp_path, "tiny_vit")
    shutil.move(models, tmp_path / "alone")
    models = tmp_path / "alone"
    picture(1).save(tmp_path / "one.png")
    (tmp_path / "pictures/sub").mkdir(parents=True)
    for seed in range(3):
        picture(seed).save(tmp_path / f"pictures/sub/{seed}.png")
    (tmp_path / "pictures/notes.txt").touch()
    changes = {"backbone": models / "t00", "images": tmp_path / "pictures"}
    lines = run_export("timm", tmp_path / "out", models / "t02", **changes)
    earlier = json.loads((tmp_path / "out/ledger.json").read_bytes())["earlier"]

    assert "on 3 images" in lines[1]
    assert [link["step"] for link in earlier] == ["t01", "t00"]


def test_images_for_the_check_are_spread_over_all_and_missing_ones_are_asked_for(
    chain: Callable[[str], Path], tmp_path: Path
) -> None:
    models = chain("tiny_vit")
    subject = Subject(model=models / "t02", backbone=models / "t00")
    everything = [one.tobytes() for one in check_pictures(subject, None, 64)]

    assert len(set(everything)) == 10
    assert [one.tobytes() for one in check_pictures(subject, None, 2)] == [everything[0], everything[-1]]
    alone = make_chain(tmp_path, "tiny_vit")
    shutil.rmtree(tmp_path / "artifacts/split")
    with pytest.raises(InputError, match="no test images to check the export on; name a folder"):
        run_export("timm", tmp_path / "out", alone / "t02")


def test_a_model_is_found_by_step_number_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no step there yet"):
        find_model(None)
    make_chain(tmp_path, "tiny_vit")

    assert find_model(None) == find_model("2") == find_model("t02") == Path("artifacts/model/t02")
    assert find_model("t1") == find_model("01") == Path("artifacts/model/t01")
    assert find_model(str(tmp_path / "artifacts/model/t01")) == tmp_path / "artifacts/model/t01"
    for which, fault in (
        ("3", r"no step t03 with classes \(there are t01, t02\)"),
        ("x", "x: no model folder"),
    ):
        with pytest.raises(InputError, match=fault):
            find_model(which)
