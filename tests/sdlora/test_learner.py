"""A chain that is learned in Python: the bytes of the stages, and what a user of a notebook expects."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import sdlora
from pipelines.project.files import read_json
from pipelines.project.param_checks import READ_BY
from pipelines.project.params import Params
from pipelines.project.settings import Adapter, Training
from sdlora.backbones import create_backbone
from sdlora.choices import CHOICE_READERS, Choices, recorded_choices
from sdlora.fit_folder import EpochRecord
from sdlora.learner import Learner
from tests.support.folders import contents
from tests.support.parameters import PARAMS, settings
from tests.support.stage_project import paint_project, run_step, split_project
from tests.support.tiny_model import tiny_vit

QUICK = {"epochs": 2, "batch_size": 4, "rank": 2, "progress": False, "device": "cpu"}
"""Choices that take a second."""


def pictures(root: Path, *names: str, part: str = "train") -> dict[str, list[Image.Image]]:
    """Pictures of a painted project by class, in the order in which the stages read them."""
    found: dict[str, list[Image.Image]] = {}
    for name in names:
        for path in sorted((root / "pictures" / part / name).iterdir()):
            with Image.open(path) as image:
                found.setdefault(name, []).append(image.copy())
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose two steps the stages have made, with the choices that a learner has of itself."""
    root = tmp_path_factory.mktemp("project")
    paint_project(root)
    own = Choices().parameters
    chosen = {
        **{key: own["training"][key] for key in own["training"] if key not in QUICK},
        **{key: own["adapter"][key] for key in ("head", "targets")},
    }
    lines = {key: json.dumps(value) for key, value in chosen.items()}
    (root / "params.yaml").write_text(settings(**lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        split_project()
        for task, before in (("t01", "t00"), ("t02", "t01")):
            run_step(task, before)
    return root


@pytest.fixture(scope="module")
def learner(project: Path) -> Learner:
    """A learner of the same two tasks. Tests leave it as it is."""
    made = Learner("glyph_vit", **QUICK)
    return made.learn(pictures(project, "a", "b")).learn(pictures(project, "c", "d"))


def steps(folder: Path, *names: str) -> dict[str, bytes]:
    """The files of model folders but for their records, which name what only a project has."""
    return {
        f"{name}/{file}": content
        for name in names
        for file, content in contents(folder / name).items()
        if file != "step.json"
    }


def test_a_learner_leaves_the_bytes_of_the_stages(project: Path, learner: Learner, tmp_path: Path) -> None:
    learner.save(tmp_path / "saved")

    assert contents(tmp_path / "saved/t00") == contents(project / "model/t00")
    found = steps(tmp_path / "saved", "t01", "t02")
    assert found == steps(project / "model", "t01", "t02")
    assert {name.partition("/")[2].partition("/")[0] for name in found} == {
        *("directions", "head", "statistics", "drift", "magnitudes.safetensors", "classifier.safetensors"),
        "unknown.safetensors",
    }
    ours, theirs = (read_json(folder / "t02/step.json") for folder in (tmp_path / "saved", project / "model"))
    same = ours.keys() & theirs.keys() - {"previous", "versions"}
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert theirs.keys() - ours.keys() == {"code", "fit", "images", "split"}


def test_a_score_for_unknown_pictures_changes_no_other_byte(
    project: Path, learner: Learner, tmp_path: Path
) -> None:
    learner.save(tmp_path / "with")
    plain = Learner("glyph_vit", **QUICK, unknown=None)
    plain.learn(pictures(project, "a", "b")).learn(pictures(project, "c", "d")).save(tmp_path / "without")
    ours, bare = (steps(tmp_path / name, "t00", "t01", "t02") for name in ("with", "without"))
    record, plainer = (read_json(tmp_path / name / "t02/step.json") for name in ("with", "without"))

    assert {name for name in ours if name not in bare} == {
        f"{step}/unknown.safetensors" for step in ("t01", "t02")
    }
    assert {name: ours[name] for name in bare} == bare
    said = {name for name in record["freezing"] if name.startswith("unknown")}
    assert said == {"unknown", "unknown_threshold", "unknown_margin", "unknown_images"}
    assert {name: record["freezing"][name] for name in record["freezing"].keys() - said} == plainer[
        "freezing"
    ]
    assert record["parameters"]["adapter"].keys() - plainer["parameters"]["adapter"].keys() == {
        "unknown", "unknown_rate"
    }  # fmt: skip
    with pytest.raises(ValueError, match="t02 has no threshold: unknown was None"):
        plain.is_unknown([])


def test_a_picture_that_looks_like_no_class_is_unknown_to_the_learner_and_to_its_saved_chain(
    project: Path, learner: Learner, tmp_path: Path
) -> None:
    known = [image for images in pictures(project, *"abcd").values() for image in images]
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    learner.save(tmp_path)
    loaded = sdlora.load(tmp_path, device="cpu")
    assert loaded.scored is not None
    assert loaded.threshold is not None
    with torch.inference_mode():
        batch = torch.stack([loaded.transform(image) for image in [*known, *map(Image.fromarray, noise)]])
        logits, scores = loaded.scored(batch)
        torch.testing.assert_close(logits, loaded.module(batch))

    expected = (scores > loaded.threshold).tolist()
    assert [*learner.is_unknown(known), *learner.is_unknown(list(noise))] == expected
    assert expected[-4:] == [True] * 4
    assert sum(expected[:-4]) <= len(known) // 4


def test_a_step_whose_threshold_is_none_of_ours_is_refused_in_one_line(
    learner: Learner, tmp_path: Path
) -> None:
    learner.save(tmp_path)
    path = tmp_path / "t02/step.json"
    good = json.loads(path.read_text())
    for wrong, told in (
        ({"unknown": "guess"}, "its freezing.unknown is 'guess', expected one of relative, mahalanobis"),
        ({"unknown_threshold": "high"}, "its freezing.unknown_threshold is 'high', expected a number"),
    ):
        path.write_text(json.dumps({**good, "freezing": {**good["freezing"], **wrong}}))
        with pytest.raises(ValueError, match=told) as refused:
            sdlora.load(tmp_path)
        assert "\n" not in str(refused.value)


def test_a_chain_of_the_stages_goes_on_in_python_with_the_same_bytes(project: Path, tmp_path: Path) -> None:
    before = contents(project / "model")
    opened = Learner.open(project / "model/t01", progress=False)
    opened.learn(pictures(project, "c", "d"))

    assert contents(project / "model") == before
    opened.save(tmp_path / "saved")
    assert contents(tmp_path / "saved/t01") == contents(project / "model/t01")
    assert steps(tmp_path / "saved", "t02") == steps(project / "model", "t02")


def test_a_chain_of_a_learner_goes_on_in_the_stages_with_the_same_bytes(
    project: Path, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner.save(tmp_path / "model")
    expected = steps(tmp_path / "model", "t02")
    for name in ("split", "train", "params.yaml"):
        (tmp_path / name).symlink_to(project / name)
    monkeypatch.chdir(tmp_path)
    run_step("t02", "t01")

    assert steps(tmp_path / "model", "t02") == expected


def test_the_saved_chain_is_loaded_and_predicts_the_same(
    project: Path, learner: Learner, tmp_path: Path
) -> None:
    assert learner.save(tmp_path) == tmp_path / "t02"
    loaded = sdlora.load(tmp_path, device="cpu")
    tests = [image for images in pictures(project, *"abcd", part="test").values() for image in images]
    with torch.inference_mode():
        expected = loaded.module(torch.stack([loaded.transform(image) for image in tests])).softmax(dim=1)
    found = learner.predict_proba(tests)

    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    assert learner.classes_.tolist() == loaded.classes == list("abcd")
    assert learner.tasks == {"t01": ["a", "b"], "t02": ["c", "d"]}
    guesses = learner.predict(tests[0], top=2)
    assert [guess.name for guess in guesses] == learner.classes_[found[0].argsort()[::-1][:2]].tolist()
    assert guesses[0].probability == pytest.approx(float(found[0].max()), abs=1e-5)
    labels = [name for name in "abcd" for _ in range(2)]
    right = (learner.classes_[found.argmax(axis=1)] == labels).mean()
    assert (
        learner.score(tests, labels) == learner.score(pictures(project, *"abcd", part="test")) == right > 0.6
    )


def test_a_folder_takes_the_next_steps_and_no_other_chain(
    project: Path, learner: Learner, tmp_path: Path
) -> None:
    first = Learner.open(project / "model/t01", progress=False)
    first.save(tmp_path)
    kept = contents(tmp_path)
    Learner.open(tmp_path, progress=False).learn(pictures(project, "c", "d")).save(tmp_path)
    assert {name: contents(tmp_path)[name] for name in kept} == kept
    assert (tmp_path / "t02").is_dir()

    before = contents(tmp_path)
    with pytest.raises(ValueError, match="t01: another step stands there; save into a folder of its own"):
        learner.save(tmp_path)
    assert contents(tmp_path) == before


def test_a_task_that_is_broken_off_is_undone(project: Path, learner: Learner) -> None:
    told: list[EpochRecord] = []

    def stop(epoch: EpochRecord) -> None:
        told.append(epoch)
        if len(told) == 1:
            raise KeyboardInterrupt

    made = Learner("glyph_vit", **QUICK).learn(pictures(project, "a", "b"))
    with pytest.raises(KeyboardInterrupt):
        made.learn(pictures(project, "c", "d"), callbacks=[stop])
    assert made.tasks == {"t01": ["a", "b"]}

    made.partial_fit(pictures(project, "c", "d"), callbacks=[told.append])
    assert made.record == learner.record
    assert made.curves["t02"] == told[1:]
    assert [epoch.epoch for epoch in told] == [1, 1, 2]


def test_a_model_that_is_passed_in_stays_as_it_is(project: Path, learner: Learner) -> None:
    model = timm.create_model("glyph_vit", pretrained=True, num_classes=3).train()
    before = copy.deepcopy(model.state_dict())
    own = Learner(model, **QUICK).learn(pictures(project, "a", "b"))

    assert model.training
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    named = Learner(create_backbone("glyph_vit"), **QUICK).learn(pictures(project, "a", "b"))
    assert own.record["backbone"] == named.record["backbone"] == learner.record["backbone"]
    assert own.record["files"].items() >= {
        (name, digest) for name, digest in named.record["files"].items() if name.startswith("directions/")
    }


def changed_model() -> torch.nn.Module:
    """A model with weights that timm's own reads otherwise."""
    model = timm.create_model("glyph_vit", pretrained=True)
    model.blocks[0].ls1 = torch.nn.Flatten(0, 0)
    model.blocks[1].attn.scale = 3.0
    model.blocks[1].attn.fused_attn = False
    return model


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vit_base_patch16_224", "no tag says which weights"),
        (3, "backbone is of type int, expected a timm model, its name or a Path"),
        (torch.nn.Linear(2, 2), "a model of type Linear that timm has not made under a name"),
        (tiny_vit(), "a model of type VisionTransformer that timm has not made under a name"),
        (timm.create_model("glyph_vit").half(), r"its weights are torch.float16, expected torch.float32"),
        (changed_model(), "its features are others than those of timm's model with its weights"),
        (
            timm.create_model("resnet10t"),
            "ResNet has no `blocks` with attention; choose one of timm's vision",
        ),
        (Path("nowhere"), "nowhere: no step.json of a step, and no folder such as t01 with one"),
    ],
    ids=["untagged", "number", "layer", "nameless", "half", "changed", "blockless", "missing"],
)
def test_what_is_no_backbone_is_refused_in_one_line(backbone: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as refused:
        Learner(backbone)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"head": "lad"}, "head is 'lad', expected one of 'linear', 'ncm', 'lda', 'rgda', 'aligned'"),
        ({"method": "joint"}, "method is 'joint', expected one of 'sdlora', "),
        ({"epochs": 0}, "epochs is 0, expected a whole number of at least 1"),
        ({"epochs": True}, "epochs is True, expected a whole number of at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, expected a number above 0"),
        ({"crop_scale": 2}, "crop_scale is 2, expected a number above 0 to 1"),
        (
            {"targets": ("q", "w")},
            r"targets is \('q', 'w'\), expected 'all', a tuple of some of q, k, v, proj, fc1, fc2",
        ),
        ({"method": "ncm", "head": "linear"}, "head is 'linear', but ncm trains no rows; choose 'rgda'"),
        ({"method": "sdlora-kd", "magnitudes": "restarted"}, "magnitudes are restarted, which throws away"),
        (
            {"method": "sdlora-rr", "rank_schedule": {"t02": 4}},
            "rank_schedule has no rank for the first tasks",
        ),
        ({"penalty": 0.5}, "penalty is 0.5, but sdlora does not read it; leave it out"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_choice_without_a_meaning_is_refused(choices: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learner("glyph_vit", **choices)


def test_a_chain_keeps_what_all_its_steps_share(project: Path) -> None:
    with pytest.raises(
        ValueError, match=r"head is 'lda', but .*t02 was learned with 'rgda', which a chain keeps"
    ):
        Learner.open(project / "model", head="lda")
    with pytest.raises(TypeError, match="a Learner is not copied or pickled; save it, and open the folder"):
        copy.deepcopy(Learner.open(project / "model"))
    opened = Learner.open(project / "model", targets="all", epochs=5, learning_rate=0.1)
    assert (opened.epochs, opened.learning_rate, opened.rank) == (5, 0.1, 2)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda it, some: it.learn({"e": []}), "e: no picture; leave the class out, or give it some"),
        (lambda it, some: it.learn({}), "no picture; give some"),
        (lambda it, some: it.learn({"e\n": some}), "the name of a class is 'e.n', expected one line of 1 to"),
        (
            lambda it, some: it.score({"e": some}),
            "e: no class of that name was learned; known are a, b, c, d",
        ),
        (
            lambda it, some: it.predict(some),
            r"several pictures \(5\), expected one; predict_proba takes several",
        ),
        (lambda it, some: Learner("glyph_vit").predict(some[0]), "nothing is learned yet; call learn first"),
    ],
    ids=["empty", "nothing", "name", "unknown", "several", "untrained"],
)
def test_what_cannot_be_learned_or_told_is_named(
    act: Callable[[Learner, list[Image.Image]], object], message: str, learner: Learner, project: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        act(learner, pictures(project, "a")["a"])
    assert list(learner.tasks) == ["t01", "t02"]


def test_the_choices_are_blocks_of_params_yaml_and_of_a_record() -> None:
    own = Choices(temperature="auto", head_rate=None, targets=None)
    kept = {"checkpoint_seconds": 30.0, "checkpoint_store": None}
    adapter, training = Adapter(**own.parameters["adapter"]), Training(**own.parameters["training"], **kept)

    assert adapter.recorded == own.parameters["adapter"]
    assert training.of_the_fit == own.parameters["training"]
    assert Choices(**recorded_choices(own.parameters)) == own
    assert Adapter.model_fields.keys() == own.parameters["adapter"].keys()
    known = {*own.parameters["training"], *kept, "head_rate", "magnitude_rate"}
    assert Training.model_fields.keys() == known


def test_learning_leaves_torch_as_it_was_and_nothing_in_the_temporary_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.use_deterministic_algorithms(False)
    made = Learner("glyph_vit", **QUICK).learn(pictures(project, "a"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert [path.name for path in tmp_path.glob("*/t0*")] != []

    del made
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_line_says_how_the_training_ended(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Learner("glyph_vit", **{**QUICK, "progress": True}).learn(pictures(project, "a", "b"))
    (line,) = capfd.readouterr().err.splitlines()

    assert line.startswith(f"t01 {'█' * 24} epoch 2/2  loss ")
    assert " %  " in line
    assert line.rstrip().endswith(" images/s")


def test_the_package_has_a_version_and_types() -> None:
    assert sdlora.__version__ == version("sdlora")
    assert Path(sdlora.__file__).with_name("py.typed").is_file()
    assert {"Learner", "load", "__version__"} <= {*dir(sdlora)}


def test_what_is_chosen_by_default_is_what_a_new_project_has() -> None:
    shipped, own = Params.load(PARAMS), Choices().parameters

    assert own == {
        "adapter": shipped.adapter.recorded,
        "training": shipped.training.of_the_fit,
        "seed": shipped.seed,
    }
    assert Choices(head="linear").temperature is None
    assert CHOICE_READERS == READ_BY


@pytest.mark.parametrize("head", ["ncm", "lda", "rgda"])
def test_images_that_come_in_two_tasks_are_learned_as_if_they_had_come_in_one(
    head: str, project: Path
) -> None:
    """The features of a frozen backbone do not move, and the rank that is kept holds all images."""
    images = pictures(project, "a", "b", "c")
    parts = [{name: its[place] for name, its in images.items()} for place in (slice(3), slice(3, None))]
    frozen = {**QUICK, "method": "frozen", "targets": None, "head": head, "temperature": None}
    once, twice = (Learner("glyph_vit", **frozen) for _ in range(2))
    once.learn(images)
    twice.learn({name: parts[0][name] for name in "ab"})
    twice.learn({"b": parts[1]["b"], "c": images["c"], "a": parts[1]["a"]})

    tests = [image for its in pictures(project, "a", "b", "c", part="test").values() for image in its]
    assert twice.classes_.tolist() == once.classes_.tolist() == ["a", "b", "c"]
    assert twice.tasks == {"t01": ["a", "b"], "t02": ["a", "b", "c"]}
    np.testing.assert_allclose(twice.predict_proba(tests), once.predict_proba(tests), atol=1e-4)
    assert twice.record["classes"][0]["task"] == "t01"


def test_more_images_of_known_classes_add_no_class(learner: Learner, project: Path, tmp_path: Path) -> None:
    opened = Learner.open(learner.save(tmp_path / "first"), progress=False)
    opened.learn(pictures(project, "b", "d", part="test"))
    opened.save(tmp_path / "second")

    assert opened.classes_.tolist() == list("abcd")
    assert opened.record["step_classes"] == {"t03": [1, 3]}
    assert sdlora.load(tmp_path / "second").classes == list("abcd")
