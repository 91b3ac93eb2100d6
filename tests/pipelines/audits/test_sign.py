"""A signature stands for the whole chain: it holds while the chain does, and no longer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.audits.sign import NAMESPACE, check_signatures, sign
from pipelines.audits.verify import verify
from pipelines.ledger.journal import heads_of, read_journal
from pipelines.project.errors import FaultError, InputError
from pipelines.project.layout import JOURNAL
from tests.support.commands import call_here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed"),
]


@pytest.fixture(scope="module")
def signed(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished project beside keys of two people, signed by one of them."""
    root = tmp_path_factory.mktemp("signed")
    shutil.copytree(finished[0], root / "project")
    for name in ("ana", "bo"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", root / name], check=True
        )
    public = (root / "ana.pub").read_text()
    (root / "signers").write_text(f'ana@example.org namespaces="{NAMESPACE}" {public}')
    (root / "others").write_text(f"bo@example.org {(root / 'bo.pub').read_text()}")
    call_here(root / "project", "audit", "sign", "--key", str(root / "ana"))
    return root


@pytest.fixture
def project(signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the signed project, as the working directory; the keys lie beside it."""
    shutil.copytree(signed, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all/project")
    return tmp_path / "all/project"


def heads() -> dict[str, str]:
    return {finding.step: finding.head for finding in verify() if finding.head}


def test_a_signature_names_who_the_file_of_signers_says(project: Path) -> None:
    lines = call_here(project, "audit", "verify", "--signers", "../signers").splitlines()
    assert lines[-2] == "t02     signed by ana@example.org"
    assert lines[-1].startswith("the chain holds")
    report = json.loads(call_here(project, "audit", "verify", "--json"))
    assert report["signatures"][0]["by"].startswith("SHA256:")
    assert report["signatures"][0]["known"] is False


def test_openssh_alone_checks_a_signature(project: Path) -> None:
    statement = Path("ledger/signatures/t02")
    command = ["ssh-keygen", "-Y", "verify", "-f", "../signers", "-I", "ana@example.org", "-n", NAMESPACE]
    done = subprocess.run(
        [*command, "-s", f"{statement}.sig"], input=statement.read_bytes(), capture_output=True
    )
    assert done.returncode == 0
    (line,) = heads_of(read_journal())
    assert statement.read_text() == (
        f"sdlora ledger\nstep t02\nhead {heads()['t02']}\nreceipts none\nsteps 2\njournal {line}\n"
    )


def resign(text: str) -> None:
    """Sign another statement in place of the one that is there."""
    done = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", "../ana", "-n", NAMESPACE],
        input=text.encode(),
        capture_output=True,
    )
    Path("ledger/signatures/t02").write_text(text)
    Path("ledger/signatures/t02.sig").write_bytes(done.stdout)


def test_a_signature_of_before_there_were_six_lines_holds(project: Path) -> None:
    text = Path("ledger/signatures/t02").read_text()
    resign(text.partition("steps")[0])
    (found,) = check_signatures(heads(), Path("../signers"))
    assert found.by == "ana@example.org"


def test_a_chain_cut_short_and_a_journal_cut_short_are_found_by_a_signature(project: Path) -> None:
    known = heads()
    cut = {step: head for step, head in known.items() if step != "t02"}
    with pytest.raises(FaultError, match=r"t02\.sig: it signs t02, and the chain ends at t01"):
        list(check_signatures(cut, None))
    with pytest.raises(FaultError, match=r"t02\.sig: it signs a chain of 2 steps, and these are 1"):
        list(check_signatures({"t00": known["t00"], "t02": known["t02"]}, None))
    JOURNAL.write_bytes(b"".join(JOURNAL.read_bytes().splitlines(keepends=True)[:-1]))
    read_journal()
    with pytest.raises(
        FaultError, match=r"t02\.sig: it signs a line of the journal that was changed or is missing"
    ):
        list(check_signatures(known, None))


def test_a_key_that_nobody_knows_is_a_fault(project: Path) -> None:
    said = call_here(project, "audit", "verify", "--signers", "../others", status=1)
    assert "ledger/signatures/t02.sig: ../others knows nobody who signs with SHA256:" in said


def test_a_statement_or_a_signature_that_was_changed_is_found(project: Path) -> None:
    statement, signature = Path("ledger/signatures/t02"), Path("ledger/signatures/t02.sig")
    text, sealed = statement.read_text(), signature.read_text()
    known = heads()
    other = known["t02"].translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    for file, content, fault in (
        (statement, text.replace(known["t02"], other), "it signs another ledger"),
        (statement, "hello\n", "not the statement that"),
        (signature, sealed.replace(sealed[100:104], "AAAA"), "the signature does not hold"),
        (signature, "nothing", "the signature does not hold"),
    ):
        before = file.read_text()
        file.write_text(content)
        with pytest.raises(FaultError, match=fault):
            list(check_signatures(known, None))
        # Whoever changes both the ledger and the statement cannot change the signature.
        if other in content:
            with pytest.raises(FaultError, match="the signature does not hold"):
                list(check_signatures({**known, "t02": other}, None))
        file.write_text(before)
    assert len(list(check_signatures(known, None))) == 1


def test_a_signature_that_is_asked_for_and_not_there_is_a_fault(project: Path) -> None:
    """Who cannot sign must not pass by deleting the signature."""
    known = heads()
    shutil.rmtree("ledger")
    with pytest.raises(
        FaultError, match=r"nobody whom \.\./signers knows has signed the head of the chain \(t02\)"
    ):
        list(check_signatures(known, Path("../signers")))
    with pytest.raises(InputError, match="--signers nowhere: no such file"):
        list(check_signatures(known, Path("nowhere")))
    assert list(check_signatures(known, None)) == []


def test_receipts_are_signed_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.audits.sign.newest_receipt", lambda: "f" * 64)
    with pytest.raises(
        FaultError, match=r"t02\.sig: it signs other receipts \(the newest is ffffffffffff, not none\)"
    ):
        list(check_signatures(heads(), None))


def test_a_signature_for_another_purpose_is_none(project: Path) -> None:
    statement, signature = Path("ledger/signatures/t02"), Path("ledger/signatures/t02.sig")
    made = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", "../ana", "-n", "git"],
        input=statement.read_bytes(),
        capture_output=True,
    )
    signature.write_bytes(made.stdout)
    with pytest.raises(FaultError, match="the signature does not hold"):
        list(check_signatures(heads(), None))


def test_a_chain_that_does_not_hold_is_not_signed(project: Path) -> None:
    shutil.rmtree("ledger")
    path = Path("artifacts/evaluation/t01/metrics.json")
    path.chmod(0o644)
    path.write_text(path.read_text() + " ")
    with pytest.raises(InputError, match="a chain that does not hold is not signed"):
        sign(Path("../ana"))
    assert not Path("ledger/signatures").exists()


def test_a_key_that_is_none_signs_nothing(project: Path) -> None:
    shutil.rmtree("ledger")
    Path("../bad").write_text("no key\n")
    with pytest.raises(InputError, match="ssh-keygen does not sign with it"):
        sign(Path("../bad"))
    with pytest.raises(InputError, match=r"nowhere: no such key; make one with"):
        sign(Path("nowhere"))
    assert not Path("ledger/signatures").exists()
