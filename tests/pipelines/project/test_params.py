import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.project.errors import InputError
from pipelines.project.names import class_name_fault
from pipelines.project.param_checks import HEADS_OF, JOINT_METHODS, READ_BY, missing_source
from pipelines.project.params import Params
from pipelines.project.settings import Adapter, Section
from tests.support.repository import REPOSITORY

SHIPPED = REPOSITORY / "params.yaml"

TASKS = """\
tasks:
  t01: {after: t00, source: data/raw/digits, classes: ["4", "2"]}
  t02: {after: t01, source: data/raw/digits, classes: ["7", "6"]}
  t03: {after: t02, source: data/raw/own, classes: [zebra]}
"""

LINE_OF_T02 = SHIPPED.read_text().split("tasks:\n")[0].count("\n") + 3


def shipped_with(old: str, new: str) -> str:
    """The shipped file with three tasks and one place changed."""
    text = SHIPPED.read_text()
    text = text[: text.index("tasks:\n")] + TASKS
    assert text.count(old) == 1, old
    return text.replace(old, new)


def fault_of(text: str) -> str:
    with pytest.raises(InputError) as caught:
        Params.parse(text, origin="params.yaml")
    return str(caught.value)


def test_the_shipped_params_are_valid() -> None:
    params = Params.load(SHIPPED)

    assert params.seed == 1993
    assert [task.classes for task in params.tasks.values()] == [
        ("4", "2"), ("7", "6"), ("0", "3"), ("5", "8"), ("9", "1"),
    ]  # fmt: skip
    assert params.fetch.digits is not None
    assert params.fetch.glyphs100 is None


def test_params_of_a_version_that_knew_fewer_keys_load_and_mean_the_same() -> None:
    text = SHIPPED.read_text()
    of_the_fit = {"head_rate", "magnitude_rate", "head_start", "feature_distillation"}
    pattern = re.compile(rf"^  ({'|'.join(of_the_fit)}|temperature|unknown):.*\n", re.MULTILINE)
    older, newer = pattern.sub("", text), pattern.sub(r"  \1: null\n", text)
    older = re.sub(r"^  unknown_rate:.*\n", "", older, flags=re.MULTILINE)
    assert older.count("\n") == text.count("\n") - 8

    then, now = (Params.parse(each, origin="params.yaml") for each in (older, newer))
    assert then == now
    assert not of_the_fit & now.training.of_the_fit.keys()
    later = {"temperature", "unknown", "unknown_rate"}
    assert not later & {**now.adapter.of_the_fit, **now.adapter.recorded}.keys()


def test_rows_that_are_kept_as_they_were_trained_have_no_temperature() -> None:
    text = SHIPPED.read_text().replace("head: rgda", "head: linear")

    with pytest.raises(
        InputError, match=r"adapter\.temperature: found \"auto\", but the head linear is kept"
    ):
        Params.parse(text, origin="params.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"head": "linear", "temperature": "null"},
            'found "relative", but the head linear is kept as it was trained',
        ),
        (
            {"head": "aligned"},
            'found "relative", but logits of the head aligned are no distances; write max_logit',
        ),
        ({"unknown_rate": "1"}, "unknown_rate"),
    ],
)
def test_a_score_that_a_head_does_not_have_is_one_clear_line(changes: dict[str, str], said: str) -> None:
    text = SHIPPED.read_text()
    for key, value in changes.items():
        text = re.sub(rf"^  {key}: \S+", f"  {key}: {value}", text, flags=re.MULTILINE)

    with pytest.raises(InputError, match=re.escape(said)) as refused:
        Params.parse(text, origin="params.yaml")
    assert str(refused.value).count("\n") == 0


def test_params_cannot_be_changed() -> None:
    params = Params.load(SHIPPED)

    with pytest.raises(ValidationError, match="frozen"):
        params.training.epochs = 3  # type: ignore[misc]


def test_every_key_is_documented_by_a_sentence_under_it() -> None:
    fields = {
        f"{section.__name__}.{name}": field.description
        for section in Section.__subclasses__()
        for name, field in section.model_fields.items()
    }

    assert [name for name, description in fields.items() if not description] == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param(
            "epochs: 8 ", "epoch: 8 ",
            "training.epoch: unknown key; did you mean epochs? (and 1 more)",
            id="a-misspelt-key",
        ),
        pytest.param(
            "seed: 1993", "seed: 1993\ncolour: red",
            "colour: unknown key;"
            " known are seed, fetch, data, backbone, adapter, training, evaluation, gate, approvals, workers, tasks",
            id="an-unknown-key",
        ),
        pytest.param(
            "epochs: 8 ", "",
            "training.epochs: the key is missing; add it (passes over each task's images)",
            id="a-missing-key",
        ),
        pytest.param(
            re.findall(r"^evaluation:\n(?:  .*\n)+", SHIPPED.read_text(), re.MULTILINE)[0], "",
            "evaluation: the key is missing; add it (how each step is tested)",
            id="a-missing-section",
        ),
        pytest.param(
            "epochs: 8 ", 'epochs: "8" ',
            'training.epochs: expected a whole number, found the text "8"; remove the quotes or correct it',
            id="a-number-in-quotes",
        ),
        pytest.param(
            "epochs: 8 ", "epochs: true ",
            "training.epochs: expected a whole number, found true; correct it",
            id="true-for-a-number",
        ),
        pytest.param(
            "learning_rate: 0.002", "learning_rate: true",
            "training.learning_rate: expected a number, found true; correct it",
            id="true-for-a-float",
        ),
        pytest.param(
            "epochs: 8 ", "epochs: 2.5 ",
            "training.epochs: expected a whole number, found 2.5; correct it",
            id="a-float-for-a-whole-number",
        ),
        pytest.param(
            "flip: false", "flip: 0",
            "training.flip: expected true or false, found 0; correct it",
            id="a-number-for-a-flag",
        ),
        pytest.param(
            "momentum: 0.9 ", "momentum: null ",
            "training.momentum: expected a number, found nothing (null); correct it",
            id="null-for-a-number",
        ),
        pytest.param(
            "learning_rate: 0.002", "learning_rate: .nan",
            "training.learning_rate: expected a finite number, found NaN; correct it",
            id="not-a-number",
        ),
        pytest.param(
            "method: sdlora ", "method: sdlore ",
            "adapter.method: expected one of sdlora, sdlora-rr, sdlora-kd, finetune, frozen, ncm, joint, olora, nlora,"
            ' inflora, clora, found "sdlore"; did you mean sdlora?',
            id="an-unknown-method",
        ),
        pytest.param(
            "weights:  ", "weights: model.pth ",
            'backbone.weights: expected the path of a .safetensors file, found "model.pth";'
            " other formats are not loaded",
            id="weights-that-could-run-code",
        ),
        pytest.param(
            "weights:  ", "weights: mine.safetensors ",
            "backbone.sha256: found null, expected the hash of mine.safetensors;"
            " write what `sha256sum` prints of it",
            id="weights-without-their-hash",
        ),
        pytest.param(
            "sha256:  ", "sha256: 12ab ",
            'backbone.sha256: expected 64 hexadecimal digits, found "12ab";'
            " write what `sha256sum` prints of the file",
            id="a-short-hash",
        ),
        pytest.param(
            "sha256:  ", f"sha256: {'0f' * 32} ",
            "backbone.sha256: found a hash without backbone.weights; name the file, or set it to null",
            id="a-hash-without-weights",
        ),
        pytest.param(
            "digits: {test_fraction: 0.2, seed: 0}", "digit: {}",
            "fetch.digit: unknown key; did you mean digits?",
            id="an-unknown-data-set",
        ),
        pytest.param(
            "digits: {test_fraction: 0.2, seed: 0}", "speech: {}",
            "fetch.speech: unknown key; known are digits, glyphs100, glyphs100-scene, mnist, fashion-mnist, cifar100,"
            " imagenet-r, imagenet-a, cub200, domainnet",
            id="a-data-set-that-no-name-is-like",
        ),
        pytest.param(
            "digits: {test_fraction: 0.2, seed: 0}", "glyphs100:",
            "fetch.glyphs100: expected a block of keys, found nothing (null); correct it",
            id="a-data-set-without-a-block",
        ),
        pytest.param(
            "digits: {test_fraction: 0.2, seed: 0}", "imagenet-r: {}",
            "fetch.imagenet-r.split: the key is missing; add it (which images are tested on)",
            id="a-data-set-without-its-setting",
        ),
        pytest.param(
            "digits: {test_fraction: 0.2, seed: 0}", "imagenet_r: {split: stratified}",
            "fetch.imagenet_r: unknown key; did you mean imagenet-r?",
            id="a-data-set-by-its-attribute",
        ),
        pytest.param(
            "digits: {test_fraction: 0.2, seed: 0}", "imagenet-a: {split: archive, archive: a.zip}",
            "fetch.imagenet-a.sha256: the split is your own archive, found nothing; write what `sha256sum` prints"
            " of a.zip",
            id="an-archive-without-a-hash",
        ),
        pytest.param(
            "digits: {test_fraction: 0.2, seed: 0}", "cub200: {split: official, archive: a.zip}",
            'fetch.cub200.archive: found "a.zip", but the split official does not read it; remove it, or write'
            " split: archive",
            id="an-archive-that-is-not-read",
        ),
        pytest.param(
            "seed: 1993", "seed: 1993\nseed: 7",
            "line 5: the key 'seed' stands there a second time; remove one of the two",
            id="a-key-twice",
        ),
        pytest.param(
            '["7", "6"]', '["7", "6"',
            f"line {LINE_OF_T02}: not valid YAML (did not find expected ',' or ']'); mend that line",
            id="a-bracket-left-open",
        ),
        pytest.param(
            "seed: 1993", "seed: 1993\n\tx: 1",
            "line 5: not valid YAML (found a tab character that violates indentation); mend that line",
            id="a-tab",
        ),
        pytest.param(
            "seed: 1993", "seed: !!python/name:os.system 1",
            'line 4: a tag ("tag:yaml.org,2002:python/name:os.system"); write the value without it',
            id="a-python-object",
        ),
        pytest.param(
            "  t02: {", "  2: {",
            "tasks: the key 2 is not text, and DVC would drop it silently; write t02",
            id="a-task-key-that-is-a-number",
        ),
        pytest.param(
            "  t03: {", "  zoo: {",
            "tasks.zoo: a task's key is t01, t02, ...; rename it, to t03 for example",
            id="a-task-key-of-another-form",
        ),
        pytest.param(
            "  t01: {", "  t00: {",
            "tasks.t00: a task's key is t01, t02, ...; rename it, to t01 for example (and 1 more)",
            id="a-task-zero",
        ),
        pytest.param(
            "  t02: {after: t01", "  t04: {after: t01",
            "tasks.t03: stands after t04; keep the tasks in ascending order (and 1 more)",
            id="tasks-out-of-order",
        ),
        pytest.param(
            "after: t00", "after: t07",
            'tasks.t01.after: found "t07", expected t00; the first task comes after t00',
            id="a-first-task-after-another",
        ),
        pytest.param(
            "after: t02", "after: t07",
            'tasks.t03.after: found "t07", expected t02; each comes after the one above it',
            id="an-unknown-predecessor",
        ),
        pytest.param(
            "after: t02", "after: t01",
            'tasks.t03.after: found "t01", expected t02; each comes after the one above it',
            id="two-tasks-after-the-same",
        ),
        pytest.param(
            '["7", "6"]', '["7", "4"]',
            'tasks.t02.classes: "4" is already a class of t01; remove one, or write kind: more if these are more '
            "images of it",
            id="a-class-in-two-tasks",
        ),
        pytest.param(
            '["7", "6"]', '["7", "7"]',
            'tasks.t02.classes: "7" stands there twice; remove one',
            id="a-class-twice-in-a-task",
        ),
        pytest.param(
            '["7", "6"]', '["7", 6]',
            'tasks.t02.classes[1]: expected text, found 6; write it in quotes: "6"',
            id="a-class-name-without-quotes",
        ),
        pytest.param(
            '["7", "6"]', '"76"',
            'tasks.t02.classes: expected a list, found "76"; correct it',
            id="classes-that-are-no-list",
        ),
        pytest.param(
            '["7", "6"]', "[]",
            "tasks.t02.classes: the list is empty; name at least one class folder",
            id="no-classes",
        ),
        pytest.param(
            "source: data/raw/own", "source: data/raw/own, manifest: lists/all.csv",
            'tasks.t03.manifest: "lists/all.csv" is not the name of a .csv, .jsonl, .parquet or .tar file in the source'
            " folder; name that file, its folder being the source",
            id="a-manifest-in-another-folder",
        ),
        pytest.param(
            "source: data/raw/own", "source: data/raw/own, manifest: all.xlsx",
            'tasks.t03.manifest: "all.xlsx" is not the name of a .csv, .jsonl, .parquet or .tar file in the source'
            " folder; name that file, its folder being the source",
            id="a-manifest-of-another-kind",
        ),
        pytest.param(
            "validation:  ", "validation: none",
            'data.validation: expected a number, found the text "none"; remove the quotes or correct it',
            id="no-validation-in-words",
        ),
        pytest.param(
            '["7", "6"]', '["../7", "6"]',
            'tasks.t02.classes[0]: "../7" has a path separator; rename the class and its folder',
            id="a-class-name-that-is-a-path",
        ),
        pytest.param(
            "source: data/raw/own", "source: /data/own",
            'tasks.t03.source: "/data/own" is absolute, which no other machine shares;'
            " give a path inside the project (a link will do)",
            id="an-absolute-source",
        ),
        pytest.param(
            "source: data/raw/own", "source: data/../../own",
            'tasks.t03.source: "data/../../own" is not a folder inside the project;'
            " copy or link the images into data/raw",
            id="a-source-outside-the-project",
        ),
        pytest.param(
            "source: data/raw/own", "source: ledger/retired/t01",
            'tasks.t03.source: "ledger/retired/t01" is where receipts of deleted images are, expected'
            " ledger/retired/t03 and no manifest; put back what `sdlora retire` wrote",
            id="the-receipt-of-another-task",
        ),
        pytest.param(
            "source: data/raw/own", 'source: "data/raw; rm x"',
            'tasks.t03.source: "data/raw; rm x" has characters that a command line would not leave alone;'
            " use letters, digits and . _ - + @ % =",
            id="a-source-that-a-shell-would-run",
        ),
        pytest.param(
            re.findall(r"  method: sdlora (?:.*\n)+?  head: rgda", SHIPPED.read_text())[0],
            "  method: ncm\n  head: aligned",
            'adapter.head: found "aligned", expected ncm or lda or rgda with the method ncm',
            id="a-head-of-trained-rows-for-a-method-that-trains-none",
        ),
        pytest.param(
            "method: sdlora ", "method: joint ",
            'adapter.head: found "rgda", expected linear with the method joint',
            id="a-settled-head-for-a-joint-method",
        ),
        pytest.param(
            "{t01: 10, t04: 8, t08: 6}", "{t04: 8}",
            "adapter.rank_schedule: the first tasks have no rank; add t01",
            id="a-rank-schedule-without-a-start",
        ),
        pytest.param(
            "{t01: 10, t04: 8, t08: 6}", "{t01: 10, four: 8}",
            'adapter.rank_schedule: found "four", expected a task\'s key; write t01, t02, ...',
            id="a-rank-schedule-of-other-keys",
        ),
        pytest.param(
            "{t01: 10, t04: 8, t08: 6}", "{t01: 0}",
            "adapter.rank_schedule: found 0 for t01, which leaves no direction at all; write a rank of at least 1",
            id="a-rank-schedule-that-begins-without-a-direction",
        ),
        pytest.param(
            "targets: all ", "targets: [] ",
            "adapter.targets: the list is empty; name at least one, or write null",
            id="no-targets",
        ),
        pytest.param(
            "{t01: 10, t04: 8, t08: 6}", "{1: 10}",
            "adapter.rank_schedule: the key 1 is not text, and DVC would drop it silently; write t01",
            id="a-rank-schedule-of-numbers",
        ),
        pytest.param(
            "penalty:  ", "penalty: 0.5",
            "adapter.penalty: found 0.5, but sdlora does not read it; write null",
            id="a-penalty-that-no-one-reads",
        ),
        pytest.param(
            "targets: all ", "targets: [q, q] ",
            "adapter.targets: found q, q; name each projection once",
            id="a-target-twice",
        ),
        pytest.param(
            "targets: all ", "targets: [q, w] ",
            'adapter.targets[1]: expected one of q, k, v, proj, fc1, fc2, found "w"',
            id="an-unknown-target",
        ),
        pytest.param(
            TASKS, "tasks: {}\n",
            "tasks: no task is listed; write some with `sdlora plan FOLDER` or `sdlora add-task FOLDER`",
            id="no-tasks",
        ),
        pytest.param(
            TASKS, "tasks: [t01]\n",
            "tasks: expected a block of keys, found a list; correct it",
            id="tasks-as-a-list",
        ),
    ],
)  # fmt: skip
def test_broken_params_are_one_clear_line(old: str, new: str, fault: str) -> None:
    message = fault_of(shipped_with(old, new))

    assert re.fullmatch(re.escape(f"params.yaml: {fault}"), message)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("place", "value", "bound"),
    [
        pytest.param("seed: 1993", "-1", "seed: expected at least 0", id="seed"),
        pytest.param("rank: 10", "0", "adapter.rank: expected at least 1", id="rank"),
        pytest.param("tolerance: 0.5", "1.5", "adapter.tolerance: expected at most 1", id="tolerance"),
        pytest.param("compress:  ", "0", "adapter.compress: expected more than 0", id="compress"),
        pytest.param("penalty:  ", "-1", "adapter.penalty: expected at least 0", id="penalty"),
        pytest.param("covariance_rank: 16", "0", "covariance_rank: expected at least 1", id="covariance"),
        pytest.param("magnitude_start:  ", "0", "magnitude_start: expected more than 0", id="magnitude"),
        pytest.param("learning_rate: 0.002", "0", "learning_rate: expected more than 0", id="learning-rate"),
        pytest.param("momentum: 0.9", "1", "momentum: expected less than 1", id="momentum"),
        pytest.param("momentum: 0.9", "-0.1", "momentum: expected at least 0", id="negative-momentum"),
        pytest.param("epochs: 8", "0", "epochs: expected at least 1", id="epochs"),
        pytest.param("batch_size: 64", "0", "training.batch_size: expected at least 1", id="batch"),
        pytest.param("batch_size: 256", "0", "evaluation.batch_size: expected at least 1", id="test-batch"),
        pytest.param("crop_scale: 0.5", "1.1", "crop_scale: expected at most 1", id="crop-above"),
        pytest.param("crop_scale: 0.5", "0", "crop_scale: expected more than 0", id="crop-below"),
        pytest.param("test_fraction: 0.2 ", "1", "data.test_fraction: expected less than 1", id="fraction"),
        pytest.param("validation:  ", "1", "data.validation: expected less than 1", id="validation"),
        pytest.param("max_pixels: 178_956_970", "0", "max_pixels: expected at least 1", id="pixels"),
        pytest.param("checkpoint_seconds: 30", "0", "checkpoint_seconds: expected more than 0", id="seconds"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_bound(place: str, value: str, bound: str) -> None:
    key = place.split(":")[0]

    assert f"{bound}, found {value}; correct it" in fault_of(shipped_with(place, f"{key}: {value}"))


def test_a_whole_number_is_a_float_and_an_exponent_too() -> None:
    params = Params.parse(
        shipped_with("learning_rate: 0.002", "learning_rate: 1").replace("momentum: 0.9", "momentum: 9e-1"),
        origin="",
    )

    assert (params.training.learning_rate, params.training.momentum) == (1.0, 0.9)


def test_own_images_need_nothing_fetched() -> None:
    params = Params.parse(shipped_with("  digits: {test_fraction: 0.2, seed: 0}", "  {}"), origin="")

    assert params.fetch.digits is None


def test_a_hundredth_task_follows_the_ninety_ninth() -> None:
    keys = [f"t{number:02d}" for number in range(1, 102)]
    lines = [
        f"  {key}: {{after: {before}, source: data/own, classes: [c{key}]}}\n"
        for before, key in zip(["t00", *keys], keys, strict=False)
    ]

    params = Params.parse(shipped_with(TASKS, "tasks:\n" + "".join(lines)), origin="")

    assert list(params.tasks)[-3:] == ["t99", "t100", "t101"]


def test_a_missing_file_says_where_to_be(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"params.yaml: the file is missing; run the command in the project's folder"
    ):
        Params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"# nothing\n", "the file is empty", id="only-a-comment"),
        pytest.param(b"- 1\n", "expected a block of keys, found a list", id="a-list"),
        pytest.param(b"caf\xe9: 1\n", "byte 3 is not UTF-8", id="latin-1"),
        pytest.param(b"a: \x07\n", r"line 1: the character U\+0007", id="a-control-character"),
        pytest.param(b"1: x\n", "top level: the key 1 is not text", id="a-number-as-key"),
    ],
)
def test_a_file_that_is_no_params_file_is_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)

    with pytest.raises(InputError, match=f"params.yaml: {fault}") as caught:
        Params.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        " a",
        ".",
        "..",
        ".hidden",
        "a/b",
        "a\\b",
        "a\nb",
        "a\0b",
        "a\u2028b",
        "a\ud800",
        "a${seed}",
        "ж" * 128,
    ],
)
def test_names_that_no_class_folder_can_have_are_refused(name: str) -> None:
    assert class_name_fault(name)


@pytest.mark.parametrize(
    "name",
    [
        "3",
        "zebra",
        "grand piano",
        "Ж",
        "a.b",
        "no",
        "12:30",
        "? q",
        "$x",
        "ж" * 127,
        "a\u202fb",
        "نمی\u200cدانم",
    ],
)
def test_names_that_folders_have_are_allowed(name: str) -> None:
    assert class_name_fault(name) is None


def test_a_missing_source_says_how_to_get_it() -> None:
    assert "sdlora fetch digits" in missing_source("data/raw/digits")
    assert "put images there" in missing_source("data/raw/own")


def test_the_paper_cannot_start_from_a_direction_without_a_norm() -> None:
    text = shipped_with("formulation: continuous ", "formulation: paper ").replace(
        "initial_up:  ", "initial_up: zero"
    )

    assert fault_of(text).startswith("params.yaml: adapter.initial_up: zero gives a direction without a norm")


def test_the_formulation_keeps_what_is_not_chosen() -> None:
    from sdlora.choices import settings_of
    from sdlora.formulations import FORMULATIONS

    shipped = Params.load(SHIPPED).adapter
    chosen = shipped.model_copy(update={"magnitudes": "restarted", "magnitude_start": 0.5})

    assert settings_of(shipped).formulation == FORMULATIONS["continuous"]
    formulation = settings_of(chosen).formulation
    assert (formulation.carried, formulation.magnitude_start) == (False, 0.5)
    assert formulation.per_target
    assert formulation.trains_earlier
    fixed = settings_of(shipped.model_copy(update={"magnitudes": "fixed"})).formulation
    assert (fixed.carried, fixed.trains_earlier) == (True, False)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        pytest.param(
            {"method: sdlora ": "method: sdlora-kd ", "formulation: continuous": "formulation: paper"},
            "magnitudes: sdlora-kd keeps",
            id="absorption-into-magnitudes-that-restart",
        ),
        pytest.param(
            {"method: sdlora ": "method: sdlora-rr ", "{t01: 10, t04: 8, t08: 6}": "{}"},
            "rank_schedule: the first tasks have no rank",
            id="reduced-ranks-without-any",
        ),
        pytest.param(
            {"method: sdlora ": "method: olora ", "compress:  ": "compress: 0.9"},
            "compress: found 0.9, but olora does not read it",
            id="compression-of-another-method",
        ),
    ],
)
def test_choices_that_exclude_each_other_are_refused(changes: dict[str, str], fault: str) -> None:
    text = SHIPPED.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)

    assert fault_of(text).startswith(f"params.yaml: adapter.{fault}")


def test_the_names_that_can_be_chosen_are_those_of_the_library() -> None:
    from sdlora.adapters import TARGETS
    from sdlora.formulations import FORMULATIONS
    from sdlora.heads import HEADS
    from sdlora.methods import METHODS

    def choices(key: str) -> set[str]:
        text = str(Adapter.model_fields[key].annotation)
        return set(re.findall(r"'(.*?)'", text))

    assert choices("method") == set(METHODS)
    assert choices("head") == set(HEADS)
    assert choices("formulation") == set(FORMULATIONS)
    assert choices("targets") - {"always"} == set(TARGETS)  # how it is written, pydantic says
    assert {name for name, m in METHODS.items() if m.joint} == JOINT_METHODS
    assert set(HEADS_OF) == {name for name, m in METHODS.items() if m.joint or not m.trains_head}
    assert {name for names in READ_BY.values() for name in names} <= set(METHODS)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param(
            "schedule:  ", "schedule: daily", "workers.schedule: expected a cron line", id="schedule"
        ),
        pytest.param("inbox: data/inbox", "inbox: /data", 'workers.inbox: "/data" is absolute', id="inbox"),
        pytest.param("inbox: data/inbox", "inbox: ../data", "not a folder inside the project", id="outside"),
        pytest.param(
            "branch:  ", "branch: -f", 'workers.branch: "-f" is no name as Git has them', id="branch"
        ),
        pytest.param("push:  ", "push: origin", "workers.branch: found nothing (null)", id="push alone"),
        pytest.param(
            "heartbeat_seconds: 30", "heartbeat_seconds: 5", "expected at least 30, found 5", id="heartbeat"
        ),
        pytest.param(
            "dead_after_seconds: 90", "dead_after_seconds: 45", "at least 60, two heartbeats", id="dead"
        ),
    ],
)
def test_workers_that_could_not_work_are_refused(old: str, new: str, fault: str) -> None:
    found = fault_of(shipped_with(old, new))

    assert fault in found
    assert "\n" not in found


_SOURCE, _STORE = "source: data/raw/own", "checkpoint_store:  "


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param("name: glyph_vit ", "name: ../../etc ", '"../../etc" is no model\'s name', id="name"),
        pytest.param(_SOURCE, "source: artifacts", "is in artifacts, where no images belong", id="artifacts"),
        pytest.param(_SOURCE, "source: artifacts/train/t01", "is in artifacts", id="in artifacts"),
        pytest.param(_SOURCE, "source: data/../.dvc/cache", "is in .dvc", id="in the cache"),
        pytest.param(_SOURCE, "source: .git/objects", "is in .git", id="in git"),
        pytest.param(_SOURCE, "source: ledger/mine", "is in ledger", id="in the ledger"),
        pytest.param(_SOURCE, f"source: {'a/' * 2500}", "has 5,000 bytes, and at most 4,096", id="long source"),
        pytest.param(_SOURCE, f"source: data/{'a' * 256}", "a part of more than 255 bytes", id="long part"),
        pytest.param(_SOURCE, f'{_SOURCE}, manifest: "a\\nb.csv"', "has a line break", id="line break"),
        pytest.param(_SOURCE, f'{_SOURCE}, manifest: "a\\0.csv"', "has a line break or another control", id="nul"),
        pytest.param(_SOURCE, f"{_SOURCE}, manifest: {'a' * 252}.csv", "has 256 bytes", id="long manifest"),
        pytest.param(_SOURCE, f"{_SOURCE}, manifest: '${{seed}}.csv'", "has ${, which DVC would", id="replaced"),
        pytest.param("classes: [zebra]", "classes: ['${seed}']", "classes[0]: \"${seed}\" has ${", id="class"),
        pytest.param("weights:  ", 'weights: "a\\0.safetensors"', "backbone.weights: \"a\\u0000", id="weights"),
        pytest.param(_STORE, 'checkpoint_store: "a\\nb"', "checkpoint_store: \"a\\nb\" has", id="store"),
        pytest.param("inbox: data/inbox", "inbox: .sdlora/inbox", "workers.inbox: ", id="inbox"),
        pytest.param("branch:  ", "branch: a..b", "workers.branch: ", id="branch of two dots"),
        pytest.param("branch:  ", "branch: a/.b", "workers.branch: ", id="branch with a hidden part"),
        pytest.param("branch:  ", "branch: a.lock", "workers.branch: ", id="branch like a lock"),
        pytest.param("pool: gpu", 'pool: "a\\e[1m"', "workers.pool: ", id="pool that colours a terminal"),
    ],
)  # fmt: skip
def test_names_and_paths_that_no_place_takes_are_refused(old: str, new: str, fault: str) -> None:
    assert fault in fault_of(shipped_with(old, new))
