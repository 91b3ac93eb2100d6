"""The stages from images to evaluations, called in order on a tiny project: what each leaves, and how fit resumes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import sdlora
from pipelines.data.packed import read_images
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of
from pipelines.stages.backbone import backbone
from pipelines.stages.evaluate import evaluate
from sdlora.classifier import IncrementalClassifier
from sdlora.ledger import JoinedRecords, read_record, record_hash
from sdlora.loading import read_step
from sdlora.methods import METHODS
from sdlora.verification import faults_of_step
from tests.support.folders import contents
from tests.support.parameters import PARAMS, settings
from tests.support.stage_project import run_freeze, run_step
from tests.support.steps import run_fit
from tests.support.task_splits import split_task


def run_evaluation(task: str) -> None:
    evaluate(
        task,
        model=Path(f"model/{task}"),
        backbone=Path("model/t00"),
        split=Path(f"split/{task}"),
        out=Path(f"evaluation/{task}"),
    )


EVERY = [
    *((method, "linear", "continuous") for method in METHODS if method != "ncm"),
    *(("sdlora", head, "continuous") for head in ("aligned", "rgda", "lda", "ncm")),
    *(("sdlora", "aligned", formulation) for formulation in ("reference", "paper")),
    *(("ncm", head, "continuous") for head in ("ncm", "lda")),
    ("finetune", "aligned", "continuous"),
    ("inflora", "lda", "continuous"),
    ("inflora", "rgda", "continuous"),
]


@pytest.mark.parametrize(("method", "head", "formulation"), EVERY)
def test_every_method_and_head_goes_through_the_stages(
    project: Path, method: str, head: str, formulation: str
) -> None:
    choices = {"method": method, "head": head, "formulation": formulation}
    if head == "aligned":  # its temperature trains the rows three times more, which the next test looks at
        choices["temperature"] = "null"
    Path("params.yaml").write_text(settings(**choices))
    for task, before in (("t01", "t00"), ("t02", "t01")):
        run_step(task, before)
        run_evaluation(task)
    record = read_json(Path("model/t02/step.json"))
    metrics = read_json(Path("evaluation/t02/metrics.json"))

    assert (record["method"], record["head"], record["formulation"]) == (method, head, formulation)
    assert record["needs_old_images"] == (method == "joint")
    assert metrics["samples"] == [4, 4]
    assert ("classifier.safetensors" in record["files"]) == (head != "linear")
    assert ("per_class" in record["remembered"]) == (head != "linear")
    assert (record["remembered"]["memory"] > 0) == (method == "inflora")


@pytest.mark.parametrize("head", ["aligned", "rgda", "lda", "ncm"])
def test_a_temperature_is_recorded_and_changes_confidences_alone(project: Path, head: str) -> None:
    for temperature in ("null", "auto"):
        Path("params.yaml").write_text(settings(head=head, temperature=temperature))
        for task, before in (("t01", "t00"), ("t02", "t01")):
            run_step(task, before)
            run_evaluation(task)
        shutil.copytree("model", f"{temperature}/model")
        shutil.copytree("evaluation", f"{temperature}/evaluation")
    plain, divided = (read_json(Path(f"{name}/model/t02/step.json")) for name in ("null", "auto"))
    found = divided["freezing"]
    rows, smaller = (
        safetensors.torch.load_file(f"{name}/model/t02/classifier.safetensors") for name in ("null", "auto")
    )

    assert "temperature" not in {**plain["freezing"], **plain["parameters"]["adapter"]}
    assert divided["parameters"]["adapter"]["temperature"] == "auto"
    assert found["calibration_error_after"] <= 1
    assert found["calibration_error_before"] <= 1
    torch.testing.assert_close(
        smaller["t01.weight"] * found["temperature"], rows["t01.weight"], rtol=1e-3, atol=1e-4
    )
    named, again = (
        read_images(Path(f"{name}/evaluation/t02/predictions.arrow"))["prediction"].to_pylist()
        for name in ("null", "auto")
    )
    assert named == again
    linear, divided_linear = (
        read_step(Path(f"{name}/model/t02"), linear=True).learned.rows["t01"].weight
        for name in ("null", "auto")
    )
    torch.testing.assert_close(divided_linear * found["temperature"], linear, rtol=1e-3, atol=1e-4)


def test_an_evaluation_scores_all_images_and_has_the_step_before_score_those_of_new_classes(
    project: Path,
) -> None:
    for score in ("null", "relative"):
        Path("params.yaml").write_text(settings(unknown=score))
        for task, before in (("t01", "t00"), ("t02", "t01")):
            run_step(task, before)
            run_evaluation(task)
        shutil.copytree("evaluation", f"{score}/evaluation")
    plain, scored = (Path(f"{score}/evaluation") for score in ("null", "relative"))
    bare, table = (read_images(folder / "t02/predictions.arrow") for folder in (plain, scored))

    assert contents(plain / "t02").keys() == {"metrics.json", "predictions.arrow"}
    assert contents(scored / "t02").keys() - contents(plain / "t02").keys() == {"newcomers.arrow"}
    assert contents(scored / "t01").keys() == contents(plain / "t01").keys()
    assert table.drop_columns(["score"]).equals(bare)
    for step, of, name in (("t02", ("t01", "t02"), "predictions"), ("t01", ("t02",), "newcomers")):
        found = read_images(scored / f"t02/{name}.arrow")
        tests = [read_images(Path(f"split/{task}/test/{task}.arrow")) for task in of]
        loaded = sdlora.load(f"model/{step}", device="cpu")
        images = [Image.open(io.BytesIO(data.as_py())) for each in tests for data in each["image"]]
        assert loaded.scored is not None
        with torch.inference_mode():
            _, expected = loaded.scored(torch.stack([loaded.transform(image) for image in images]))
        assert found["id"].to_pylist() == [name.as_py() for each in tests for name in each["id"]]
        torch.testing.assert_close(torch.tensor(found["score"].to_numpy()), expected, rtol=1e-3, atol=1e-2)


def test_two_freezings_of_one_fit_leave_the_same_bytes(project: Path) -> None:
    for task, before in (("t01", "t00"), ("t02", "t01")):
        run_step(task, before)
    first = contents(Path("model/t02"))
    run_freeze("t02", "t01")

    assert contents(Path("model/t02")) == first


def test_freezing_a_linear_head_looks_at_no_image_and_no_backbone(project: Path) -> None:
    Path("params.yaml").write_text(settings(head="linear"))
    run_fit("t01", "t00", "fit/t01")
    Path("train/t01/train.arrow").unlink()
    Path("model/t00/backbone.safetensors").unlink()
    record = read_json(Path("model/t00/step.json"))
    Path("model/t00/step.json").write_text(json.dumps({**record, "files": {}}))
    run_freeze("t01", "t00")

    assert Path("model/t01/head/t01.safetensors").is_file()


def test_an_absorbed_direction_is_in_the_ledger_with_what_it_changed(project: Path) -> None:
    Path("params.yaml").write_text(settings(method="sdlora-kd", tolerance="1.0"))
    for task, before in (("t01", "t00"), ("t02", "t01")):
        run_step(task, before)
    record = read_json(Path("model/t02/step.json"))

    assert record["directions"] == ["t01"]
    assert record["freezing"]["absorbed"] == 1
    assert 0 <= record["freezing"]["residual"] <= 1
    assert 0 <= record["freezing"]["output_change"] < 1


@pytest.mark.parametrize("formulation", ["continuous", "paper"])
def test_a_step_of_rank_zero_is_recorded_without_a_direction_and_verified(
    project: Path, formulation: str
) -> None:
    changes = {"method": "sdlora-rr", "formulation": formulation, "rank_schedule": "{t01: 3, t02: 0}"}
    Path("params.yaml").write_text(settings(**changes))
    for task, before in (("t01", "t00"), ("t02", "t01")):
        run_step(task, before)
        run_evaluation(task)
    first, record = (read_json(Path(f"model/{task}/step.json")) for task in ("t01", "t02"))

    assert record["directions"] == list(record["magnitudes"]) == ["t01"]
    assert record["magnitudes"] != first["magnitudes"]
    assert record["rank"] == 0
    chain = JoinedRecords()
    for task, before in (("t00", None), ("t01", Path("model/t00")), ("t02", Path("model/t01"))):
        assert not list(faults_of_step(Path(f"model/{task}"), task, chain, before=before))


@pytest.mark.parametrize("lone", ["t01", "t02"])
def test_a_step_of_one_class_is_recorded_without_a_direction_and_verified(project: Path, lone: str) -> None:
    text = settings(formulation="paper", head="aligned")
    Path("params.yaml").write_text(
        text.replace('"a", "b"' if lone == "t01" else '"c", "d"', '"a"' if lone == "t01" else '"c"')
    )
    for task, before in (("t01", "t00"), ("t02", "t01")):
        split_task(task, before)
        run_step(task, before)
        run_evaluation(task)
    record = read_json(Path("model/t02/step.json"))
    other = "t02" if lone == "t01" else "t01"

    assert record["directions"] == list(record["magnitudes"]) == [other]
    assert read_json(Path(f"model/{lone}/step.json"))["rank"] == 0
    assert read_json(Path(f"fit/{lone}/fit.json"))["steps"] == 0
    assert len(read_record(Path("model/t02"))["classes"]) == 3
    chain = JoinedRecords()
    for task, before in (("t00", None), ("t01", Path("model/t00")), ("t02", Path("model/t01"))):
        assert not list(faults_of_step(Path(f"model/{task}"), task, chain, before=before))


@pytest.mark.parametrize("stage", ["fit", "freeze"])
def test_training_images_that_are_missing_or_others_are_named_with_the_way_back(
    project: Path, stage: str
) -> None:
    def run() -> None:
        if stage == "fit":
            run_fit("t01", "t00", "elsewhere")
        else:
            run_freeze("t01", "t00")

    run_fit("t01", "t00", "fit/t01")
    shutil.copy("train/t02/train.arrow", "train/t01/train.arrow")
    with pytest.raises(
        InputError, match=r"train/t01/train\.arrow: not the images that split/t01/train\.json describes"
    ):
        run()
    Path("train/t01/train.arrow").unlink()
    with pytest.raises(InputError) as caught:
        run()
    assert str(caught.value) == (
        "train/t01/train.arrow: the training images of t01 are missing; restore them with "
        "`dvc checkout train/t01` or `dvc pull train/t01`"
    )
    assert not Path("elsewhere").exists()
    assert not Path("model/t01").exists()


def test_joint_says_which_old_images_it_misses(project: Path) -> None:
    Path("params.yaml").write_text(settings(method="joint", head="linear"))
    run_step("t01", "t00")
    Path("train/t01/train.arrow").unlink()

    with pytest.raises(InputError, match=r"train/t01/train\.arrow: the images of t01 are missing"):
        run_fit("t02", "t01", "fit/t02")


def test_joint_refuses_old_images_that_are_not_those_it_learned(project: Path) -> None:
    Path("params.yaml").write_text(settings(method="joint", head="linear"))
    run_step("t01", "t00")
    shutil.copy("train/t02/train.arrow", "train/t01/train.arrow")

    with pytest.raises(InputError, match=r"train/t01/train\.arrow: changed since t01 was learned"):
        run_fit("t02", "t01", "fit/t02")


def test_a_fit_of_another_adapter_block_is_not_frozen(project: Path) -> None:
    run_fit("t01", "t00", "fit/t01")
    Path("params.yaml").write_text(settings(rank="1"))

    with pytest.raises(InputError, match=r"fit/t01: made with another adapter block"):
        run_freeze("t01", "t00")


def test_a_fit_serves_every_head(project: Path) -> None:
    run_fit("t01", "t00", "fit/t01")
    before = contents(Path("fit/t01"))
    Path("params.yaml").write_text(settings(head="lda"))
    run_freeze("t01", "t00")
    run_fit("t01", "t00", "fit/t01")

    assert contents(Path("fit/t01")) == before


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"head": "linear"}, "made with head 'rgda'"),
        ({"targets": "[q]"}, "made with targets 'fc1, fc2, k, proj, q, v'"),
    ],
    ids=["head", "targets"],
)
def test_a_chain_keeps_its_head_and_its_targets(project: Path, change: dict[str, str], fault: str) -> None:
    run_step("t01", "t00")
    Path("params.yaml").write_text(settings(**change))

    with pytest.raises(InputError, match=f"model/t01: this step was {fault}"):
        run_step("t02", "t01")


@pytest.mark.parametrize("method", ["sdlora", "finetune", "frozen"])
@pytest.mark.parametrize("formulation", ["continuous", "reference"])
def test_two_steps_leave_whole_folders_and_evaluations(project: Path, method: str, formulation: str) -> None:
    Path("params.yaml").write_text(settings(method=method, formulation=formulation))
    for task, before in (("t01", "t00"), ("t02", "t01")):
        run_step(task, before)
        run_evaluation(task)
    directions = {"sdlora": {"t02"}, "finetune": {"t02"}, "frozen": set()}[method]

    assert {path.stem for path in Path("model/t02").glob("directions/*")} == directions
    assert {path.stem for path in Path("model/t02").glob("head/*")} == {"t02"}
    assert set(contents(Path("fit/t02"))) == {
        "curve.csv",
        "factors.safetensors",
        "fit.json",
        "head.safetensors",
        "magnitudes.safetensors",
        "memory.safetensors",
    }
    metrics = read_json(Path("evaluation/t02/metrics.json"))
    table = read_images(Path("evaluation/t02/predictions.arrow"))
    right = [a == b for a, b in zip(table["label"].to_pylist(), table["prediction"].to_pylist(), strict=True)]
    assert metrics["tasks"] == ["t01", "t02"]
    assert metrics["samples"] == [4, 4]
    assert sum(metrics["correct"]) == sum(right)
    assert set(table["prediction"].to_pylist()) <= {0, 1, 2, 3}


def test_validation_images_are_evaluated_beside_the_tests_and_never_trained_on(project: Path) -> None:
    run_step("t01", "t00")
    run_evaluation("t01")
    plain = read_json(Path("evaluation/t01/metrics.json"))
    Path("params.yaml").write_text(settings(validation="0.4"))
    for task, before in (("t01", "t00"), ("t02", "t01")):
        split_task(task, before)
        run_step(task, before)
        run_evaluation(task)
    metrics = read_json(Path("evaluation/t02/metrics.json"))

    assert "validation_accuracy" not in plain
    assert len(read_images(Path("train/t02/train.arrow"))) == 6
    assert metrics["samples"] == [4, 4]
    assert metrics["validation_tasks"] == ["t01", "t02"]
    assert metrics["validation_samples"] == [4, 4]
    assert metrics["validation_accuracy"] == [right / 4 for right in metrics["validation_correct"]]
    rows = read_images(Path("evaluation/t02/validation.arrow")).to_pylist()
    assert [row["task"] for row in rows] == ["t01"] * 4 + ["t02"] * 4
    hits = [row["prediction"] == row["label"] for row in rows]
    assert [sum(hits[:4]), sum(hits[4:])] == metrics["validation_correct"]
    assert len(read_images(Path("evaluation/t02/predictions.arrow"))) == 8


def test_an_evaluation_in_bf16_says_nearly_the_same(project: Path) -> None:
    run_step("t01", "t00")
    run_evaluation("t01")
    full = read_images(Path("evaluation/t01/predictions.arrow"))
    params = Path("params.yaml").read_text()
    head, _, rest = params.partition("evaluation:\n")
    assert "  precision: fp32 " in rest
    Path("params.yaml").write_text(f"{head}evaluation:\n{rest.replace('fp32', 'bf16', 1)}")
    run_evaluation("t01")
    half = read_images(Path("evaluation/t01/predictions.arrow"))

    assert half["confidence"].to_pylist() != full["confidence"].to_pylist()
    assert half["confidence"].to_numpy() == pytest.approx(full["confidence"].to_numpy(), abs=0.05)


@pytest.mark.parametrize(("precision", "tf32"), [("tf32", True), ("fp32", False)])
def test_an_evaluation_rounds_as_its_own_precision_says(project: Path, precision: str, tf32: bool) -> None:
    run_step("t01", "t00")
    params = Path("params.yaml").read_text()
    head, _, rest = params.partition("evaluation:\n")
    Path("params.yaml").write_text(f"{head}evaluation:\n{rest.replace('fp32', precision, 1)}")
    run_evaluation("t01")

    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_each_record_holds_the_hash_of_the_one_before_and_earlier_folders_keep_their_bytes(
    project: Path,
) -> None:
    run_step("t01", "t00")
    first = contents(Path("model/t01"))
    run_step("t02", "t01")
    record = read_json(Path("model/t02/step.json"))

    assert record["previous"] == record_hash(Path("model/t01"))
    assert read_json(Path("model/t01/step.json"))["previous"] == record_hash(Path("model/t00"))
    assert [entry["name"] for entry in record["classes"]] == ["c", "d"]
    assert [entry["name"] for entry in read_record(Path("model/t02"))["classes"]] == ["a", "b", "c", "d"]
    assert contents(Path("model/t01")) == first


def test_a_fit_run_twice_leaves_the_same_bytes(project: Path) -> None:
    run_fit("t01", "t00", "fit/a")
    shutil.rmtree(".sdlora", ignore_errors=True)
    run_fit("t01", "t00", "fit/b")

    assert contents(Path("fit/a")) == contents(Path("fit/b"))


def test_an_interrupted_fit_goes_on_from_its_checkpoint_and_leaves_the_same_bytes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_fit("t01", "t00", "fit/undisturbed")
    Path("params.yaml").write_text(settings(checkpoint_seconds="0.000001"))
    monkeypatch.setattr("sdlora.training.Fit.result", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_fit("t01", "t00", "fit/resumed")
    monkeypatch.undo()
    monkeypatch.chdir(project)

    assert not Path("fit/resumed").exists()
    run_fit("t01", "t00", "fit/resumed")
    assert "going on from step 5 of 6" in capsys.readouterr().err
    assert contents(Path("fit/resumed")) == contents(Path("fit/undisturbed"))


FIT = """
import sys, time
from pathlib import Path
import fsspec
from fsspec.implementations.local import LocalFileSystem
from pipelines.runtime import processes
from pipelines.stages.fit import fit

class Hanging(LocalFileSystem):
    protocol = "hanging"

    def pipe_file(self, path, value, **kwargs):
        Path("hangs").touch()
        time.sleep(3600)

fsspec.register_implementation("hanging", Hanging)
processes.GRACE_SECONDS = float(sys.argv[1])
fit(
    "t01", train=Path("split/t01/train.json"), images=Path("train"), classes=Path("split/t01/classes.json"),
    before=Path("model/t00"), backbone=Path("model/t00"), out=Path("fit/stopped"),
)
"""


def terminate_fit(when: str, *, grace: float = 20.0) -> tuple[int, str]:
    """Run the fit of t01 in a process, send SIGTERM when a file is there; its status, and what it said."""
    command = [sys.executable, "-c", FIT, str(grace)]
    environment = {**os.environ, "PYTHONPATH": str(PARAMS.parent)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not any(Path().glob(when)):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        process.terminate()
        _, error = process.communicate(timeout=15)
    return process.returncode, error


@pytest.mark.slow
def test_a_fit_that_is_told_to_stop_saves_itself_at_once_and_the_same_goes_on_to_the_same_bytes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("params.yaml").write_text(settings(epochs="20", checkpoint_seconds="0.2"))
    status, error = terminate_fit(".sdlora/checkpoints/*/*.safetensors")

    assert status == 143
    found = re.search(r"fit t01: stopped by SIGTERM at step (\d+)", error)
    assert found
    newest = max(Path().glob(".sdlora/checkpoints/*/*.safetensors"))
    assert int(newest.name.partition("-")[0]) == int(found[1])
    assert not Path("fit").exists()

    run_fit("t01", "t00", "fit/stopped")
    assert f"going on from step {found[1]} of 60" in capsys.readouterr().err
    shutil.rmtree(".sdlora")
    run_fit("t01", "t00", "fit/undisturbed")
    assert contents(Path("fit/stopped")) == contents(Path("fit/undisturbed"))


@pytest.mark.slow
def test_a_fit_that_is_told_to_stop_ends_though_its_store_hangs(project: Path) -> None:
    Path("params.yaml").write_text(
        settings(epochs="200", checkpoint_seconds="0.000001", checkpoint_store="hanging://store")
    )
    status, _ = terminate_fit("hangs", grace=0.5)

    assert status == 143
    assert not Path("fit").exists()


def test_a_fit_that_runs_out_of_memory_goes_on_with_fewer_images_at_once_and_says_so(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Adam would divide the rounding of a small gradient by the gradient.
    Path("params.yaml").write_text(settings(optimizer="sgd", learning_rate="0.01"))
    run_fit("t01", "t00", "fit/rich")
    give_memory_for(2, monkeypatch)
    run_fit("t01", "t00", "fit/poor")

    lines = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert lines == ["fit t01: out of memory; going on with 2 images at a time"]
    rich, poor = contents(Path("fit/rich")), contents(Path("fit/poor"))
    assert rich["fit.json"] == poor["fit.json"]
    for name in ("factors.safetensors", "head.safetensors", "magnitudes.safetensors"):
        known, found = safetensors.torch.load(rich[name]), safetensors.torch.load(poor[name])
        assert known.keys() == found.keys()
        for key in known:
            torch.testing.assert_close(found[key], known[key], rtol=0, atol=1e-5)


def test_a_fit_without_memory_for_one_image_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_memory_for(0, monkeypatch)
    with pytest.raises(InputError, match=r"^fit t01: not even one image at a time fits the memory"):
        run_fit("t01", "t00", "fit/t01")
    assert not Path("fit/t01").exists()


def give_memory_for(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the model fail, as on an accelerator, with more images at once."""
    features = IncrementalClassifier.features

    def limited(model: IncrementalClassifier, batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > images:
            raise torch.OutOfMemoryError("out of memory")
        return features(model, batch)

    monkeypatch.setattr(IncrementalClassifier, "features", limited)


def test_a_fit_whose_store_takes_nothing_is_finished_all_the_same(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.runtime.checkpoints.WRITE_WAITS", ())
    run_fit("t01", "t00", "fit/kept")
    Path("closed").touch()  # a file, where a folder would have to be
    Path("params.yaml").write_text(settings(checkpoint_seconds="0.000001", checkpoint_store="closed"))
    run_fit("t01", "t00", "fit/lost")

    assert "warning: no checkpoint of step 1 could be kept" in capsys.readouterr().err
    assert contents(Path("fit/lost")) == contents(Path("fit/kept"))


def test_a_checkpoint_of_other_settings_is_not_picked_up(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("params.yaml").write_text(settings(checkpoint_seconds="0.000001"))
    run_fit("t01", "t00", "fit/a")
    Path("params.yaml").write_text(settings(checkpoint_seconds="0.000001", learning_rate="0.02"))
    run_fit("t01", "t00", "fit/b")

    assert "going on" not in capsys.readouterr().err
    assert contents(Path("fit/a")) != contents(Path("fit/b"))


def test_where_and_how_often_checkpoints_are_kept_changes_no_byte(project: Path) -> None:
    run_fit("t01", "t00", "fit/a")
    Path("params.yaml").write_text(settings(checkpoint_seconds="0.000001", checkpoint_store="elsewhere"))
    run_fit("t01", "t00", "fit/b")

    assert any(Path("elsewhere").rglob("*.safetensors"))
    assert contents(Path("fit/a")) == contents(Path("fit/b"))


@pytest.mark.parametrize(("method", "head"), [("sdlora", "aligned"), ("joint", "linear")])
def test_images_for_which_there_is_no_room_in_memory_change_no_byte(
    project: Path, method: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("params.yaml").write_text(settings(method=method, head=head), encoding="utf-8")
    run_step("t01", "t00")
    run_fit("t02", "t01", "fit/t02")
    monkeypatch.setenv("SDLORA_IMAGES_GIB", "0")
    run_fit("t02", "t01", "fit/other")
    assert contents(Path("fit/other")) == contents(Path("fit/t02"))
    run_freeze("t02", "t01")
    expected = contents(Path("model/t02"))
    shutil.rmtree("model/t02")
    monkeypatch.delenv("SDLORA_IMAGES_GIB")
    run_freeze("t02", "t01")
    assert contents(Path("model/t02")) == expected


def test_a_diverging_fit_is_one_line_and_leaves_nothing(project: Path) -> None:
    Path("params.yaml").write_text(settings(learning_rate="1.0e+30"))

    with pytest.raises(InputError, match=r"params\.yaml: training\.learning_rate: t01: the loss became"):
        run_fit("t01", "t00", "fit/t01")
    assert not Path("fit/t01").exists()


def test_a_step_of_another_formulation_is_not_continued(project: Path) -> None:
    run_step("t01", "t00")
    Path("params.yaml").write_text(settings(formulation="reference"))

    with pytest.raises(InputError, match=r"made with formulation 'continuous'.* is 'reference'"):
        run_fit("t02", "t01", "fit/t02")


def test_the_fit_of_another_task_is_not_frozen(project: Path) -> None:
    run_fit("t01", "t00", "fit/t01")

    with pytest.raises(InputError, match="this is the fit of t01, expected t02"):
        run_freeze("t02", "t00", "fit/t01")


def test_a_model_is_not_evaluated_on_the_classes_of_another_step(project: Path) -> None:
    run_step("t01", "t00")

    with pytest.raises(InputError, match="its 2 classes are not the 4 of"):
        evaluate(
            "t01",
            model=Path("model/t01"),
            backbone=Path("model/t00"),
            split=Path("split/t02"),
            out=Path("evaluation/t01"),
        )


def test_local_weights_are_loaded_by_their_hash_and_others_under_their_name_are_refused(
    project: Path,
) -> None:
    shutil.copy("model/t00/backbone.safetensors", "mine.safetensors")
    digest = sha256_of(Path("mine.safetensors"))
    Path("params.yaml").write_text(settings(weights="mine.safetensors", sha256=digest))
    backbone(out=Path("model/own"))
    assert contents(Path("model/own")) == contents(Path("model/t00"))

    with Path("mine.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        InputError, match=r"mine\.safetensors: its sha256 is \w+, params\.yaml: backbone\.sha256"
    ):
        backbone(out=Path("model/own"))
    Path("mine.safetensors").unlink()
    with pytest.raises(InputError, match=r"mine\.safetensors: no such weight file"):
        backbone(out=Path("model/own"))


def test_a_tampered_direction_stops_the_next_fit(project: Path) -> None:
    run_step("t01", "t00")
    path = Path("model/t01/directions/t01.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(ValueError, match="changed since the step was frozen"):
        run_fit("t02", "t01", "fit/t02")
