"""The gate lets a step through that keeps every limit, and no other unless a person approved of just its results."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.packed import read_images, write_rows
from pipelines.ledger.newcomers import unknown_figures
from pipelines.ledger.verdicts import broken, measure, measured_in
from pipelines.planning.approvals import approve
from pipelines.project.errors import GateClosedError, InputError
from pipelines.project.files import read_json, sha256_of, write_json
from pipelines.project.layout import EVALUATIONS
from pipelines.project.params import Params
from pipelines.project.settings import Gate
from pipelines.stages.freeze import _warn
from pipelines.stages.gate import gate
from pipelines.stages.start import start
from sdlora.classifier import ModelState
from sdlora.freezing import FrozenStep
from tests.support.evaluations import ROW, write_evaluation, write_scores
from tests.support.parameters import settings

NO_LIMITS = Gate(fall=None, negative_flips=None, calibration_error=None, new_task=None)


FIRST: list[ROW] = [
    ("a", "t01", 0, 0, 0.75),
    ("b", "t01", 0, 0, 0.75),
    ("c", "t01", 1, 1, 0.75),
    ("d", "t01", 1, 0, 0.75),
]
SECOND: list[ROW] = [
    ("a", "t01", 0, 2, 0.5),
    ("b", "t01", 0, 0, 0.5),
    ("c", "t01", 1, 3, 0.5),
    ("d", "t01", 1, 1, 0.5),
    ("e", "t02", 2, 2, 1.0),
    ("f", "t02", 3, 3, 1.0),
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two steps as other stages leave them, the second of which lost two images of four and gained one."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(settings(), encoding="utf-8")
    start(
        out=Path("artifacts/split/t00"),
        evaluation=Path("artifacts/evaluation/t00"),
        gate=Path("artifacts/gate/t00"),
    )
    write_evaluation(Path("artifacts/evaluation/t01"), FIRST)
    write_evaluation(Path("artifacts/evaluation/t02"), SECOND)
    for task in ("t01", "t02"):
        write_json(Path(f"artifacts/model/{task}/step.json"), {"step": task})
        write_json(Path(f"artifacts/split/{task}/split.json"), {"digest": digest_of(task)})
    return tmp_path


def digest_of(task: str) -> str:
    """What stands for the digest of a task's samples."""
    return hashlib.sha256(task.encode()).hexdigest()


def limit(**limits: float) -> None:
    """Set limits in params.yaml."""
    text = Path("params.yaml").read_text(encoding="utf-8")
    for name, value in limits.items():
        text = text.replace(f"\n  {name}:  ", f"\n  {name}: {value}")
    Path("params.yaml").write_text(text, encoding="utf-8")


def run_gate(task: str, before: str) -> None:
    gate(
        task,
        model=Path(f"artifacts/model/{task}"),
        split=Path(f"artifacts/split/{task}/split.json"),
        evaluation=Path(f"artifacts/evaluation/{task}"),
        evaluation_before=Path(f"artifacts/evaluation/{before}"),
        before=Path(f"artifacts/gate/{before}"),
        out=Path(f"artifacts/gate/{task}"),
    )


def measured(task: str, before: str) -> dict[str, float | None]:
    now, was = (read_json(Path(f"artifacts/evaluation/{step}/metrics.json")) for step in (task, before))
    earlier = read_images(Path(f"artifacts/evaluation/{before}/predictions.arrow")) if was["tasks"] else None
    return measure(now, was, read_images(Path(f"artifacts/evaluation/{task}/predictions.arrow")), earlier)


def test_what_a_gate_measures_is_what_one_counts_by_hand(project: Path) -> None:
    assert measured("t02", "t01") == {
        "fall": 0.25,  # three of four right, then two
        "negative_flips": 0.5,  # a and c of a, b, c, d
        "calibration_error": 0.0,  # half of those at 0.5 are right, all of those at 1.0
        "new_task": 1.0,
    }
    assert measured("t01", "t00") == {
        "fall": None, "negative_flips": None, "calibration_error": 0.0, "new_task": 0.75,
    }  # fmt: skip


def test_images_that_came_since_are_no_flips(project: Path) -> None:
    write_evaluation(Path("artifacts/evaluation/t03"), [*SECOND[:1], ("z", "t01", 0, 1, 0.5)])
    assert measured("t03", "t01")["negative_flips"] == 1.0


@pytest.mark.parametrize(
    ("name", "keeps", "breaks"),
    [
        ("fall", 0.25, 0.24),
        ("negative_flips", 0.5, 0.49),
        ("calibration_error", 0.0, None),
        ("new_task", 1.0, None),
    ],
)
def test_a_limit_that_is_just_kept_is_kept(
    project: Path, name: str, keeps: float, breaks: float | None
) -> None:
    found = measured("t02", "t01")
    assert not broken(NO_LIMITS.model_copy(update={name: keeps}), found)
    if breaks is not None:
        assert len(broken(NO_LIMITS.model_copy(update={name: breaks}), found)) == 1


def test_a_new_task_that_was_not_learned_breaks_its_limit(project: Path) -> None:
    found = broken(NO_LIMITS.model_copy(update={"new_task": 0.8}), measured("t01", "t00"))
    assert found == {"new_task": "names 75.0 % of its own task right (gate.new_task: 80.0)"}


def test_verdicts_are_a_chain_from_the_first_step_to_the_last(project: Path) -> None:
    for task, before in (("t01", "t00"), ("t02", "t01")):
        run_gate(task, before)
        verdict = read_json(Path(f"artifacts/gate/{task}/verdict.json"))
        assert verdict["previous"] == sha256_of(Path(f"artifacts/gate/{before}/verdict.json"))
        assert verdict["record"] == sha256_of(Path(f"artifacts/model/{task}/step.json"))
        assert verdict["samples"] == digest_of(task)
        assert verdict["evaluation"] == {
            path.name: sha256_of(path) for path in Path(f"artifacts/evaluation/{task}").iterdir()
        }
        assert (verdict["broken"], verdict["approved"]) == ({}, None)


def test_a_step_that_breaks_a_limit_leaves_nothing_and_says_what_to_do(project: Path) -> None:
    limit(fall=0.1, negative_flips=0.2)
    run_gate("t01", "t00")
    with pytest.raises(InputError) as caught:
        run_gate("t02", "t01")

    assert str(caught.value) == (
        "gate: t02 made an old task fall by 25.0 points (gate.fall: 10.0) and turned 50.0 % of the old test images "
        "wrong (gate.negative_flips: 20.0); look at it (`sdlora audit diff t01 t02`), then mend the step, or let it "
        "through with `sdlora approve t02 --by NAME --why REASON`"
    )
    assert not Path("artifacts/gate/t02").exists()


def test_what_opens_the_next_fit_is_the_same_whatever_the_limits(project: Path) -> None:
    run_gate("t01", "t00")
    opened = Path("artifacts/gate/t01/open.json").read_bytes()
    limit(new_task=0.1)
    run_gate("t01", "t00")
    run_gate("t02", "t01")

    assert Path("artifacts/gate/t01/open.json").read_bytes() == opened
    assert Path("artifacts/gate/t02/open.json").read_bytes() == opened
    assert Path("artifacts/gate/t00/open.json").read_bytes() == opened


def test_an_approved_step_passes_and_the_ledger_says_who_and_why(project: Path) -> None:
    limit(fall=0.1)
    before = Path("params.yaml").read_text(encoding="utf-8")
    run_gate("t01", "t00")
    lines = approve("t02", by="Zoë", why='the "new" camera: accepted')
    run_gate("t02", "t01")
    verdict = read_json(Path("artifacts/gate/t02/verdict.json"))

    assert verdict["approved"] == {"by": "Zoë", "why": 'the "new" camera: accepted'}
    assert len(verdict["broken"]) == 1
    assert "t02 approved by Zoë" in lines[0]
    changed = Path("params.yaml").read_text(encoding="utf-8")
    removed = [line for line in before.splitlines() if line not in changed.splitlines()]
    assert removed == ["approvals: {}"]


def test_an_approval_holds_for_the_results_that_were_looked_at_only(project: Path) -> None:
    limit(fall=0.1)
    run_gate("t01", "t00")
    approve("t02", by="me", why="fine")
    worse: list[ROW] = [*SECOND[:3], ("d", "t01", 1, 0, 0.5), *SECOND[4:]]
    for path in Path("artifacts/evaluation/t02").iterdir():
        path.unlink()
    Path("artifacts/evaluation/t02").rmdir()
    write_evaluation(Path("artifacts/evaluation/t02"), worse)

    with pytest.raises(
        InputError,
        match=r"fall by 50.0 points .*; what was approved were other results, or other limits; look",
    ):
        run_gate("t02", "t01")
    approve("t02", by="me", why="still fine")  # in place of the first
    run_gate("t02", "t01")
    assert list(Params.load().approvals) == ["t02"]


def test_an_approval_holds_for_the_limits_that_were_broken_then_only(project: Path) -> None:
    limit(fall=0.1)
    run_gate("t01", "t00")
    approve("t02", by="me", why="fine")
    limit(negative_flips=0.2)
    with pytest.raises(InputError, match="what was approved were other results, or other limits"):
        run_gate("t02", "t01")


def test_an_approval_holds_for_the_predictions_and_not_for_their_number_alone(project: Path) -> None:
    limit(fall=0.1)
    run_gate("t01", "t00")
    approve("t02", by="me", why="fine")
    others: list[ROW] = [("a", "t01", 0, 0, 0.5), ("b", "t01", 0, 2, 0.5), *SECOND[2:]]
    metrics = Path("artifacts/evaluation/t02/metrics.json").read_bytes()
    shutil.rmtree("artifacts/evaluation/t02")
    write_evaluation(Path("artifacts/evaluation/t02"), others)
    assert Path("artifacts/evaluation/t02/metrics.json").read_bytes() == metrics
    with pytest.raises(InputError, match="what was approved were other results"):
        run_gate("t02", "t01")


def test_what_breaks_no_limit_needs_no_approval(project: Path) -> None:
    with pytest.raises(InputError, match=r"approve: t01 breaks no limit of gate in params\.yaml"):
        approve("t01", by="me", why="just so")


@pytest.mark.parametrize(
    ("task", "by", "why", "fault"),
    [
        ("t09", "me", "x", "approve: there is no task t09; known are t01, t02"),
        ("t02", " ", "x", r'approve: --by: " " is empty; write another'),
        ("t02", "me", "a\nb", r'approve: --why: "a.nb" has a line break'),
    ],
)
def test_an_approval_that_says_nothing_is_refused(
    project: Path, task: str, by: str, why: str, fault: str
) -> None:
    before = Path("params.yaml").read_bytes()
    with pytest.raises(InputError, match=fault):
        approve(task, by=by, why=why)
    assert Path("params.yaml").read_bytes() == before


def test_a_step_without_results_cannot_be_approved(project: Path) -> None:
    Path("artifacts/evaluation/t02/metrics.json").unlink()
    with pytest.raises(InputError, match=r"metrics\.json: t02 has no results to approve of yet"):
        approve("t02", by="me", why="x")


def test_approvals_of_tasks_that_are_not_there_are_refused(project: Path) -> None:
    entry = json.dumps({"by": "me", "why": "x", "evaluation": "0" * 64, "limits": ["fall"]})
    text = (
        Path("params.yaml")
        .read_text(encoding="utf-8")
        .replace("approvals: {}", f"approvals:\n  t07: {entry}")
    )
    with pytest.raises(InputError, match=r"approvals.t07: there is no such task; known are t01, t02"):
        Params.parse(text, origin="params.yaml")


def test_approving_leaves_every_line_around_its_block(project: Path) -> None:
    """A block of text ends before what follows it, which must not go with it."""
    limit(fall=0.1)
    run_gate("t01", "t00")
    entry = f"approvals:\n  t01:\n    by: me\n    evaluation: '{'0' * 64}'\n    limits: [fall]\n"
    entry += "    why: |\n      two\n      lines\n"
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(
        text.replace("approvals: {}\n", entry + "# what follows\n"), encoding="utf-8"
    )
    approve("t02", by="me", why="x")
    assert "\n# what follows\n" in Path("params.yaml").read_text(encoding="utf-8")
    assert Params.load().approvals["t01"].why == "two\nlines\n"


def hold_out(task: str, rows: list[ROW]) -> None:
    """Leave what a step says of validation images, beside the tests, as the stage does."""
    types = {"id": pa.string(), "task": pa.string(), "label": pa.int32(), "prediction": pa.int32()}
    write_rows(
        Path(f"artifacts/evaluation/{task}/validation.arrow"), rows, {**types, "confidence": pa.float32()}
    )


def on_validation() -> None:
    text = Path("params.yaml").read_text(encoding="utf-8")
    text = text.replace("\n  validation:", "\n  validation: 0.1").replace(
        "\n  on: test", "\n  on: validation"
    )
    Path("params.yaml").write_text(text, encoding="utf-8")


def test_a_gate_on_validation_images_looks_at_no_test_image(project: Path) -> None:
    hold_out("t01", [("v", "t01", 0, 0, 0.75), ("w", "t01", 1, 1, 0.75)])
    hold_out("t02", [("v", "t01", 0, 0, 1.0), ("w", "t01", 1, 1, 1.0), ("x", "t02", 2, 3, 0.0)])
    limit(fall=0.0, negative_flips=0.0)  # of which the tests break both
    on_validation()
    run_gate("t01", "t00")
    run_gate("t02", "t01")
    verdict = read_json(Path("artifacts/gate/t02/verdict.json"))
    assert verdict["measured"] == {
        "fall": 0.0, "negative_flips": 0.0, "calibration_error": 0.0, "new_task": 0.0,
    }  # fmt: skip
    assert verdict["limits"]["on"] == "validation"
    assert set(verdict["evaluation"]) == {"metrics.json", "predictions.arrow", "validation.arrow"}
    limit(new_task=0.5)
    with pytest.raises(GateClosedError, match=r"t02 names 0\.0 % of its own task right"):
        run_gate("t02", "t01")
    approve("t02", by="me", why="fine")
    run_gate("t02", "t01")


def test_an_old_task_without_images_to_hold_out_is_not_measured_and_a_new_one_is_refused(
    project: Path,
) -> None:
    hold_out("t02", [("x", "t02", 2, 3, 0.5)])
    on_validation()
    with pytest.raises(InputError, match=r"gate\.on: validation, but no image of t01 is held out"):
        run_gate("t01", "t00")
    folders = (Path(f"artifacts/evaluation/{task}") for task in ("t02", "t01"))
    assert measured_in(*folders, "validation", model=Path("artifacts/model/t02")) == {
        "fall": None, "negative_flips": None, "calibration_error": 0.5, "new_task": 0.0,
    }  # fmt: skip


def test_a_verdict_on_test_images_has_the_bytes_that_it_always_had(project: Path) -> None:
    limit(fall=0.5)
    run_gate("t01", "t00")
    assert read_json(Path("artifacts/gate/t01/verdict.json"))["limits"] == {
        "fall": 0.5, "negative_flips": None, "calibration_error": None, "new_task": None,
    }  # fmt: skip


def test_a_gate_stops_a_step_that_has_lost_too_much_to_drift_by_its_own_estimate(project: Path) -> None:
    limit(drift=0.3)
    write_json(Path("artifacts/model/t02/step.json"), {"step": "t02", "freezing": {"drift_loss": 0.3001}})
    run_gate("t01", "t00")  # which has no earlier class, and no estimate
    assert "drift" not in read_json(Path("artifacts/gate/t01/verdict.json"))["measured"]
    with pytest.raises(
        GateClosedError, match=r"t02 has lost an estimated 30\.0 % of the accuracy of earlier classes"
    ):
        run_gate("t02", "t01")
    approve("t02", by="me", why="fine")
    run_gate("t02", "t01")
    verdict = read_json(Path("artifacts/gate/t02/verdict.json"))
    assert verdict["measured"]["drift"] == 0.3001
    assert verdict["limits"]["drift"] == 0.3
    assert set(verdict["broken"]) == {"drift"}


def test_a_gate_without_a_limit_of_drift_measures_it_all_the_same(project: Path) -> None:
    write_json(Path("artifacts/model/t01/step.json"), {"step": "t01", "freezing": {"drift_loss": 0.9}})
    run_gate("t01", "t00")
    verdict = read_json(Path("artifacts/gate/t01/verdict.json"))
    assert verdict["measured"]["drift"] == 0.9
    assert "drift" not in verdict["limits"]


def test_much_drift_is_told_by_the_step_that_adds_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"old_accuracy_before": 0.9, "old_accuracy_after": 0.45, "drift_loss": 0.5}
    for lost, told in ((0.0, 1), (0.5, 0)):  # nothing more was lost in the second
        _warn(
            FrozenStep(learned=ModelState(), trained=ModelState(), facts=facts), "t02", lost=lost, classes=4
        )
        assert capsys.readouterr().err.splitlines() == told * [
            "freeze t02: warning: drift has cost about 50 % of the accuracy of earlier classes (in this step an "
            "estimated 90.0 % right became 45.0); lower training.learning_rate, or set training.feature_distillation, "
            "training.head_rate and training.head_start"
        ]
    for few in ({"drift_loss": 0.25}, {}):
        step = FrozenStep(learned=ModelState(), trained=ModelState(), facts=few)
        _warn(step, "t02", lost=0.0, classes=4)
    assert not capsys.readouterr().err
    _warn(FrozenStep(learned=ModelState(), trained=ModelState(), facts=facts), "t02", lost=0.0, classes=3)
    assert ", or much less, as a task of so few classes tells little (" in capsys.readouterr().err


def test_a_limit_of_drift_wants_a_head_that_can_estimate_it() -> None:
    text = settings(head="linear", temperature="null").replace("\n  drift:  ", "\n  drift: 0.2")
    with pytest.raises(InputError, match=r"gate\.drift: found 0\.2, but the head linear keeps no statistics"):
        Params.parse(text, origin="params.yaml")


def test_a_gate_stops_a_step_whose_new_images_the_step_before_does_not_tell_from_known_ones(
    project: Path,
) -> None:
    write_scores(EVALUATIONS / "t01", [0.0, 1.0, 2.0, 3.0], [])
    write_scores(EVALUATIONS / "t02", [0.0] * 6, [("test", 2.5), ("test", 1.0), ("validation", 9.0)])
    limit(unknown=0.6)
    run_gate("t01", "t00")
    assert "unknown" not in read_json(Path("artifacts/gate/t01/verdict.json"))["measured"]
    with pytest.raises(
        GateClosedError,
        match=r"t02 brings images of new classes, of which the step before tells 56\.2 % from known ones",
    ):
        run_gate("t02", "t01")
    approve("t02", by="me", why="fine")
    run_gate("t02", "t01")
    verdict = read_json(Path("artifacts/gate/t02/verdict.json"))
    assert verdict["measured"]["unknown"] == (3 + 1.5) / 8
    assert verdict["limits"]["unknown"] == 0.6
    assert set(verdict["broken"]) == {"unknown"}


def test_what_a_step_tells_of_unknown_images_is_what_one_counts_by_hand(project: Path) -> None:
    write_scores(EVALUATIONS / "t01", [0.0, 1.0, 2.0, 3.0], [])
    write_scores(
        EVALUATIONS / "t02",
        [0.0, 0.0, 0.0, 0.0, 0.0, 5.0],
        [("test", 2.5), ("test", 4.0), ("validation", 0.0)],
    )

    assert unknown_figures(["t01", "t02"], EVALUATIONS.joinpath, [2.0, 4.0]) == {
        "t01": {"false_alarms": 0.25, "noticed": 1.0, "auroc": 0.875, "fpr95": 0.5},
        "t02": {"false_alarms": 0.166667, "noticed": None, "auroc": None, "fpr95": None},
    }
    assert unknown_figures(["t01", "t02"], EVALUATIONS.joinpath, [None, None]) == {}


def test_a_limit_of_unknown_images_wants_a_score() -> None:
    text = settings(unknown="null").replace("\n  unknown:  ", "\n  unknown: 0.8")
    with pytest.raises(
        InputError, match=r"gate\.unknown: found 0\.8, but adapter\.unknown is null, so no image"
    ):
        Params.parse(text, origin="params.yaml")


def test_a_gate_on_images_that_nobody_holds_out_is_refused() -> None:
    text = settings().replace("\n  on: test", "\n  on: validation")
    with pytest.raises(
        InputError, match=r"gate\.on: found validation, but data\.validation is null; write a share"
    ):
        Params.parse(text, origin="params.yaml")
    without = "\n".join(line for line in settings().splitlines() if not line.startswith("  on: test"))
    assert Params.parse(without, origin="params.yaml").gate.on == "test"
