"""A bundle tells others what this program knows: one file without it, and others' tools, check it."""

from __future__ import annotations

import base64
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pipelines.audits.envelopes import SigningKey
from tests.support.commands import call_here, said_here
from tests.support.repository import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="OpenSSL is not installed"),
]
VERIFIER = REPOSITORY / "docs/reference/verify_bundle.py"
BUNDLE = Path("chain.intoto.jsonl")
JOURNAL = Path("ledger/journal.jsonl")


def write_keys(root: Path) -> None:
    """Leave Ed25519 keys of two people, and an ECDSA key with a certificate that a root has signed."""
    for name in ("ana", "bo"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / name], check=True)
    for command in (
        "ecparam -name prime256v1 -genkey -noout -out ec.pem",
        "ec -in ec.pem -pubout -out ec.pub",
        "ecparam -name prime256v1 -genkey -noout -out root.pem",
        "req -x509 -new -key root.pem -subj /CN=Root -out root.crt",
        "req -x509 -new -key ec.pem -CA root.crt -CAkey root.pem -subj /CN=Ana -out ec.crt "
        "-addext keyUsage=critical,digitalSignature -addext basicConstraints=critical,CA:false",
    ):
        subprocess.run(["openssl", *command.split()], cwd=root, check=True, capture_output=True)


def note_fits(project: Path) -> None:
    """Let Ana's fits stand in the journal, each line naming those that no other names."""
    path = project / JOURNAL
    path.parent.mkdir(exist_ok=True)
    path.touch()
    for step in ("t01", "t02"):
        lines = path.read_bytes().splitlines()
        named = {name for line in lines for name in json.loads(line)["previous"]}
        fit = (project / f"artifacts/fit/{step}/fit.json").read_bytes()
        line = {
            "stage": f"fit@{step}",
            "ended": "2026-01-02T03:04:05+00:00",
            "by": "Ana <ana@example.org>",
            "host": "here",
            "machine": "x86_64",
            "device": "cpu",
            "seconds": 1.5,
            "images": 12,
            "peak_memory": 1,
            "commit": None,
            "output": {"fit.json": sha256(fit).hexdigest()},
            "previous": sorted({sha256(line).hexdigest() for line in lines} - named),
        }
        path.write_bytes(
            b"".join(b"%b\n" % line for line in [*lines, json.dumps(line, sort_keys=True).encode()])
        )


@pytest.fixture(scope="module")
def bundled(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished project, put into a bundle that Ana has signed; the keys lie beside it."""
    root = tmp_path_factory.mktemp("bundle")
    write_keys(root)
    project = shutil.copytree(finished[0], root / "project")
    for path in (project / "artifacts").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    note_fits(project)
    call_here(project, "audit", "bundle", str(BUNDLE), "--key", "../ana")
    return project


@pytest.fixture
def project(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """It, as the working directory, put back afterwards."""
    kept = shutil.copytree(bundled, tmp_path / "kept")
    monkeypatch.chdir(bundled)
    yield bundled
    for part in ("artifacts", "ledger", "metrics.json", BUNDLE):
        path = bundled / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.move(kept / part, path)


def verdict_of(*arguments: str) -> str:
    """What the verifier ends with, in this process, which is faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["verify_bundle.py", str(BUNDLE), *arguments])
        try:
            runpy.run_path(str(VERIFIER), run_name="__main__")
        except SystemExit as end:
            return str(end.code)
    return "holds"


def rewrite(change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the statements of the bundle, without a signature."""
    envelopes = [json.loads(line) for line in BUNDLE.read_text().splitlines()]
    statements = [json.loads(base64.b64decode(envelope["payload"])) for envelope in envelopes]
    change(statements)
    payloads = [base64.b64encode(json.dumps(statement).encode()).decode() for statement in statements]
    lines = [{**envelopes[0], "payload": payload, "signatures": []} for payload in payloads]
    BUNDLE.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_records(name: str, change: Callable[[dict[str, Any]], object], *, of: str = "t01") -> None:
    """Forge a record in its file and in its statement, hashes included, as who can write every file would."""
    part = {"step.json": "record", "verdict.json": "verdict", "metrics.json": "metrics"}[Path(name).name]
    content = json.loads(Path(name).read_bytes())
    change(content)
    Path(name).write_text(json.dumps(content))

    def forge(statements: list[dict[str, Any]]) -> None:
        statement = next(its for its in statements if its["predicate"]["record"]["step"] == of)
        statement["predicate"][part] = content
        for entry in [*statement["subject"], *statement["predicate"]["materials"]]:
            if entry["name"] == name:
                entry["digest"]["sha256"] = sha256(Path(name).read_bytes()).hexdigest()

    rewrite(forge)


def test_the_verifier_needs_nothing_but_python_and_says_the_same_head(project: Path) -> None:
    command = [sys.executable, "-I", "-S", VERIFIER, BUNDLE]  # no package but the standard library
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(call_here(project, "audit", "verify", "--json"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [[step, "holds"] for step in ("t00", "t01", "t02")]
    assert lines[-1] == f"the bundle holds; its head is {report['head']}"
    assert len(VERIFIER.read_text().splitlines()) < 150


def test_a_bundle_says_what_a_step_was_made_of_and_by_whom(project: Path) -> None:
    def look(statements: list[dict[str, Any]]) -> None:
        told = statements[2]["predicate"]
        names = {entry["name"] for entry in told["materials"]}
        assert {
            "artifacts/train/t02/train.arrow",
            "artifacts/code/fit",
            "artifacts/fit/t02/fit.json",
        } <= names
        assert not [name for name in names if name.endswith("/t01.arrow")]
        assert ("fit@t02", "Ana <ana@example.org>") in {
            (line["stage"], line["by"]) for line in told["journal"]
        }
        assert {Path(entry["name"]).parts[3] for entry in told["classifier"]} == {
            "classifier.safetensors",
            "unknown.safetensors",
            "drift",
            "head",
            "statistics",
        }
        assert told["record"]["code"]["fit"] == sha256(Path("artifacts/code/fit").read_bytes()).hexdigest()
        assert told["chain"]["steps"] == 2

    rewrite(look)


def test_one_flipped_bit_of_any_file_of_the_bundle_is_found_and_the_file_named(project: Path) -> None:
    names: list[str] = []

    def look(statements: list[dict[str, Any]]) -> None:
        parts = [part for its in statements for part in (its["subject"], its["predicate"]["materials"])]
        names.extend({entry["name"] for part in parts for entry in part})

    rewrite(look)
    for name in sorted(names):
        data = Path(name).read_bytes()
        Path(name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        assert verdict_of().startswith(f"{name}: not the file of the bundle\n")
        Path(name).write_bytes(data)
    assert verdict_of() == "holds"
    Path("artifacts/model/t02/head/t09.safetensors").touch()
    assert verdict_of().startswith("t02: number of these files: ")
    Path("artifacts/model/t02/head/t09.safetensors").unlink()
    Path("artifacts/fit/t02/fit.json").unlink()
    assert verdict_of().startswith("artifacts/fit/t02/fit.json: not in the checkout")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda its: its.pop(), "t00: not its place in a chain of "),
        (lambda its: its.pop(1), "t00: not its place in a chain of "),
        (lambda its: its.reverse(), "t02: previous record"),
        (lambda its: its.append(its[2]), "t00: not its place in a chain of "),
        (lambda its: its[1]["predicate"]["record"]["parameters"].update(seed=7), "t01/step.json: not the record"),
        (lambda its: its[1]["predicate"]["verdict"].update(approved=1), "t01/verdict.json: not the verdict"),
        (lambda its: its[1]["predicate"]["journal"][0].update(by="Bo"), "t01: the journal is another"),
        (lambda its: its[1]["subject"][0].update(name="../step.json"), "../step.json: not in the checkout"),
        (lambda its: its[1]["subject"][0].update(name="/dev/null"), "/dev/null: not in the checkout"),
        (lambda its: its[1]["predicate"]["classifier"][0]["digest"].update(sha256="0"), "not the file of the bundle"),
        (lambda its: its[1].update(predicateType="urn:other"), "a statement is of other types"),
        (lambda its: [its[n]["predicate"]["chain"].update(head="0" * 64) for n in range(3)], "the head is"),
        (lambda its: its.pop() and [i["predicate"]["chain"].update(steps=1) for i in its], "metrics.json: it is of 2"),
    ],
)  # fmt: skip
def test_a_bundle_that_was_rewritten_is_found(
    project: Path, change: Callable[[list[dict[str, Any]]], object], fault: str
) -> None:
    rewrite(change)
    said = verdict_of()
    assert fault in said
    assert said.endswith("\nthe bundle does not hold")


def test_records_that_were_forged_with_their_hashes_contradict_each_other(project: Path) -> None:
    record, gate = "artifacts/model/t01/step.json", "artifacts/gate/t01/verdict.json"
    last, results = "artifacts/gate/t02/verdict.json", "artifacts/evaluation/t02/metrics.json"
    forgeries: list[tuple[str, Callable[[dict[str, Any]], object], str, str]] = [
        (record, lambda its: its["parameters"].update(seed=7), "t01", "t01: record of the verdict"),
        (record, lambda its: its["images"].update(t01="0" * 64), "t01", "t01: images"),
        (record, lambda its: its["files"].popitem(), "t01", "t01: files of the model"),
        (gate, lambda its: its.update(samples="0" * 64), "t01", "t01: samples"),
        (last, lambda its: its["measured"].update(new_task=0.5), "t02", "t02: measured accuracies"),
        (
            last,
            lambda its: its["limits"].update(calibration_error=0.0),
            "t02",
            "t02: broken limits",
        ),
        (results, lambda its: its.update(correct=[0, 0]), "t02", "t02: evaluation"),
    ]
    for name, change, of, fault in forgeries:
        kept = {path: path.read_bytes() for path in (Path(name), BUNDLE)}
        write_records(name, change, of=of)
        assert fault in verdict_of()
        for path, data in kept.items():
            path.write_bytes(data)


def test_a_journal_that_was_changed_or_cut_is_found(project: Path) -> None:
    *earlier, last = JOURNAL.read_text().splitlines()
    missing, other = "the journal lacks a line", "t02: the journal is another"
    for lines, fault in (
        ([earlier[0].replace('"host": "', '"host": "t'), *earlier[1:], last], missing),
        ([*earlier[1:], last], missing),
        ([*earlier, last.replace("Ana", "Bo")], other),
        (earlier, other),
    ):
        JOURNAL.write_text("".join(f"{line}\n" for line in lines))
        assert fault in verdict_of()


def test_who_has_not_the_key_cannot_sign(project: Path) -> None:
    assert verdict_of("--key", "../ana.pub") == "holds"
    assert verdict_of("--key", "../bo.pub").startswith("not signed by ../bo.pub")
    rewrite(lambda statements: None)
    assert verdict_of("--key", "../ana.pub").startswith("not signed by ../ana.pub")
    assert verdict_of("--expect", "0" * 64).endswith(f"expected {'0' * 64}\nthe bundle does not hold")


def test_what_is_no_bundle_or_no_checkout_cannot_be_checked(project: Path, tmp_path: Path) -> None:
    text = BUNDLE.read_text()
    assert verdict_of("--key", "../nobody.pub") == "2"
    assert verdict_of("--key", "../root.crt") == "2"
    for content in ("", "hello\n", "[]\n", text[:-100], text.replace("payloadType", "type")):
        BUNDLE.write_text(content)
        assert verdict_of() == "2", content[:20]
    BUNDLE.unlink()
    assert verdict_of() == "2"


def test_securesystemslib_and_in_toto_verify_what_was_written(project: Path) -> None:
    """Two other programs: the envelopes and signatures of the first, the statements of the second."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key
    from google.protobuf.json_format import Parse
    from in_toto_attestation.v1.statement import Statement
    from in_toto_attestation.v1.statement_pb2 import Statement as Message
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    keys = {"../ana": load_ssh_public_key(Path("../ana.pub").read_bytes())}
    keys["../ec.pem"] = load_pem_public_key(Path("../ec.pub").read_bytes())
    for private, public in keys.items():
        call_here(project, "audit", "bundle", str(BUNDLE), "--key", private)
        for line in BUNDLE.read_text().splitlines():
            envelope = Envelope.from_dict(json.loads(line))
            keyid = json.loads(line)["signatures"][0]["keyid"]
            assert list(envelope.verify([SSlibKey.from_crypto(public, keyid)], 1)) == [keyid]
            Statement.copy_from_pb(Parse(envelope.payload, Message())).validate()
            envelope.payload += b" "
            with pytest.raises(VerificationError):
                envelope.verify([SSlibKey.from_crypto(public, keyid)], 1)
    said = subprocess.run(["ssh-keygen", "-l", "-f", "../ana.pub"], capture_output=True, text=True).stdout
    assert said.split()[1] == SigningKey.read(Path("../ana")).fingerprint


def test_the_command_of_model_signing_verifies_model_folders(project: Path) -> None:
    def asked(*words: str) -> int:
        tool = str(Path(sys.executable).parent / "model_signing")
        done = subprocess.run([tool, "verify", *words], capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    options = ("--key", "../ec.pem", "--model-signatures", "../signatures")
    call_here(project, "audit", "bundle", str(BUNDLE), *options)
    words = ("artifacts/model/t02", "--signature", "../signatures/t02.sig")
    assert asked("key", *words, "--public_key", "../ec.pub") == 0
    assert asked("key", "artifacts/model/t01", *words[1:], "--public_key", "../ec.pub") != 0
    call_here(project, "audit", "bundle", str(BUNDLE), *options, "--certificates", "../ec.crt")
    assert asked("certificate", *words, "--certificate_chain", "../root.crt") == 0


def test_what_cannot_sign_is_one_line_and_leaves_the_bundle_as_it_was(project: Path) -> None:
    before = BUNDLE.read_bytes()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", "../locked"], check=True)
    subprocess.run(["openssl", "genrsa", "-out", "../rsa.pem", "2048"], check=True, capture_output=True)
    ec, folder = ("--key", "../ec.pem"), ("--model-signatures", "../none")
    for options, fault in (
        (("--key", "nobody"), "nobody: no such key"),
        (("--key", "params.yaml"), "params.yaml: not a private key"),
        (("--key", "../locked"), "../locked: the key has a passphrase"),
        (("--key", "../rsa.pem"), "../rsa.pem: neither Ed25519 nor ECDSA"),
        (("--key", "../ana", *folder), "--model-signatures needs a --key that OpenSSF Model Signing knows"),
        (folder, "--model-signatures needs a --key"),
        ((*ec, "--certificates", "../ec.crt"), "name a folder by --model-signatures"),
        (
            (*ec, *folder, "--certificates", "../root.crt"),
            "../root.crt: its first certificate is of another key",
        ),
        ((*ec, *folder, "--certificates", "params.yaml"), "params.yaml: not a PEM file of certificates"),
        ((*ec, *folder, "--certificates", "nothing"), "nothing: no such certificate"),
    ):
        error = said_here(project, "audit", "bundle", str(BUNDLE), *options, status=2)[1]
        assert fault in error
        assert len(error) <= 300
        assert BUNDLE.read_bytes() == before
    for line in ('{"stage":', "[]", '{"stage": "fit@t01"}'):
        JOURNAL.write_text(f"{JOURNAL.read_text().splitlines()[0]}\n{line}")
        error = said_here(project, "audit", "bundle", str(BUNDLE), status=2)[1]
        assert "ledger/journal.jsonl: " in error
    Path("artifacts/fit/t01/fit.json").write_text("{}")
    assert "a chain that does not hold" in said_here(project, "audit", "bundle", str(BUNDLE), status=2)[1]
    assert BUNDLE.read_bytes() == before
    assert not Path("../none").exists()
