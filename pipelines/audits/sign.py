"""`sdlora audit sign`: put a name to the head of the ledger, with the keys and the format of OpenSSH."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.audits.verify import verify
from pipelines.ledger.journal import heads_of, read_journal
from pipelines.ledger.receipts import read_receipts, receipt_of
from pipelines.project.errors import FaultError, InputError
from pipelines.project.files import sha256_of, write_whole
from pipelines.project.layout import JOURNAL, SIGNATURES

NAMESPACE = "sdlora-ledger"
"""What a signature is for: one of another namespace, such as git's, is none of the ledger."""
_HASH = "[0-9a-f]{64}"
_STATEMENT = (
    rf"sdlora ledger\nstep (t[0-9]+)\nhead ({_HASH})\nreceipts ({_HASH}|none)\n"
    rf"(?:steps ([0-9]+)\njournal ({_HASH}(?: {_HASH})*|none)\n)?"
)
"""The last two lines are not in statements that version 0.1 has signed."""


class _Signature(NamedTuple):
    """A signature that holds."""

    step: str
    by: str
    """Whom the file of signers knows the key as; else the key's fingerprint."""
    known: bool
    """Whether the file of signers knows the key."""


def sign(key: Path) -> list[str]:
    """Verify the whole chain, sign its head with an SSH key, and return lines to print.

    The statement is a file of six lines, `ledger/signatures/STEP`, its signature `STEP.sig` beside it; both belong into
    version control. It names the last step, its head, the newest receipt of deleted images, the number of steps and the
    heads of the journal. `ssh-keygen -Y verify` needs nothing of ours to check it (docs/how-to/verify.md).
    """
    if not key.is_file():
        raise InputError(f"{key}: no such key; make one with `ssh-keygen -t ed25519 -f {key}`")
    findings = list(verify())
    if findings[-1].fault:
        raise InputError(
            f"{findings[-1].step}: {findings[-1].fault}; a chain that does not hold is not signed"
        )
    heads = {finding.step: finding.head for finding in findings if finding.head}
    last = next(reversed(heads))
    told = " ".join(heads_of(read_journal())) or "none"
    statement = SIGNATURES / last
    text = (
        f"sdlora ledger\nstep {last}\nhead {heads[last]}\nreceipts {newest_receipt()}\n"
        f"steps {len(heads) - 1}\njournal {told}\n"
    ).encode()
    # Signed on the way through, so that nothing is there until all of it is.
    done = _ssh_keygen(["-Y", "sign", "-f", str(key), "-n", NAMESPACE], text=text)
    if done.returncode:
        raise InputError(f"{key}: ssh-keygen does not sign with it ({_last_line(done)}); nothing was written")
    write_whole(statement, text)
    write_whole(statement.with_suffix(".sig"), done.stdout)
    return [
        f"{statement}.sig: {last} signed, head {heads[last]}",
        f"commit {SIGNATURES}; `sdlora audit verify --signers FILE` checks it",
    ]


def newest_receipt() -> str:
    """Return the hash of the last receipt of deleted images, which holds those of all before it. None without any."""
    receipts = list(read_receipts())
    return sha256_of(receipt_of(receipts[-1])) if receipts else "none"


def check_signatures(heads: Mapping[str, str], signers: Path | None) -> Iterator[_Signature]:
    """Check every signature that there is against the chain. A `FaultError` at the first that does not hold.

    Args:
        heads: step → the hash of its verdict, in order.
        signers: a file of allowed signers (ssh-keygen(1)); with one the head must be signed by somebody in it, without
            one a key is only named.
    """
    if signers is not None and not signers.is_file():
        raise InputError(
            f"--signers {signers}: no such file; a line of it is `ana@example.org ssh-ed25519 AAAA…`"
        )
    newest, signed = newest_receipt(), False
    for path in sorted(SIGNATURES.glob("*.sig")):
        statement = path.with_suffix("")
        found = re.fullmatch(_STATEMENT, statement.read_text() if statement.is_file() else "")
        if found is None:
            raise FaultError(f"{statement}: not the statement that {path.name} signs")
        step, head, receipts, steps, told = found.groups()
        if step not in heads:
            raise FaultError(
                f"{path}: it signs {step}, and the chain ends at {list(heads)[-1]}; sign anew, or remove it"
            )
        if heads[step] != head:
            raise FaultError(
                f"{path}: it signs another ledger (head {head[:12]} at {step}); sign anew, or remove it"
            )
        if steps is not None:
            _check_extent(path, steps, told, list(heads).index(step))
        signature = _check(path, statement.read_bytes(), step, signers)
        if step == list(heads)[-1]:
            if receipts != newest:
                raise FaultError(
                    f"{path}: it signs other receipts (the newest is {newest[:12]}, not {receipts[:12]}); sign anew"
                )
            signed = signed or signature.known
        yield signature
    if signers is not None and not signed:
        raise FaultError(
            f"{SIGNATURES}: nobody whom {signers} knows has signed the head of the chain ({list(heads)[-1]})"
        )


def _check_extent(path: Path, steps: str, told: str, number: int) -> None:
    """Check the number of steps, and that the journal still has the lines, that a statement names."""
    if int(steps) != number:
        raise FaultError(
            f"{path}: it signs a chain of {steps} steps, and these are {number}; sign anew, or remove it"
        )
    known = read_journal()
    missing = [line for line in told.split() if told != "none" and line not in known]
    if missing:
        raise FaultError(
            f"{path}: it signs a line of the journal that was changed or is missing ({missing[0][:12]}); restore "
            f"{JOURNAL} from version control"
        )


def _check(path: Path, text: bytes, step: str, signers: Path | None) -> _Signature:
    """Check one signature of a statement."""
    checked = _ssh_keygen(["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(path)], text=text)
    if checked.returncode:
        raise FaultError(f"{path}: the signature does not hold ({_last_line(checked)})")
    key = re.search(r"SHA256:\S+", checked.stdout.decode())
    fingerprint = key[0] if key else "unknown key"
    if signers is None:
        return _Signature(step, fingerprint, known=False)
    found = _ssh_keygen(["-Y", "find-principals", "-f", str(signers), "-s", str(path)], text=b"")
    for name in found.stdout.decode().split("\n") if found.returncode == 0 else []:
        asked = ["-Y", "verify", "-f", str(signers), "-I", name.strip(), "-n", NAMESPACE, "-s", str(path)]
        if name.strip() and _ssh_keygen(asked, text=text).returncode == 0:
            return _Signature(step, name.strip(), known=True)
    raise FaultError(f"{path}: {signers} knows nobody who signs with {fingerprint}")


def _ssh_keygen(arguments: list[str], *, text: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run OpenSSH's ssh-keygen on a text. An `InputError` where there is none."""
    try:
        # A passphrase is asked for on the terminal, which is not the standard input.
        return subprocess.run(
            ["ssh-keygen", *arguments], input=text, capture_output=True, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        raise InputError("ssh-keygen is not installed; install OpenSSH's client (openssh-client)") from None


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return what ssh-keygen said at the end."""
    lines = (done.stderr or done.stdout).decode(errors="replace").split("\n")
    return " ".join([line.strip() for line in lines if line.strip()][-1:]) or f"status {done.returncode}"
