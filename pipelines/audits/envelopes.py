"""Signed statements as other programs of the supply chain read them: in-toto, DSSE, and OpenSSF Model Signing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.project.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509 import Certificate

STATEMENT = "https://in-toto.io/Statement/v1"
_PAYLOAD = "application/vnd.in-toto+json"
_SIGSTORE_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


@dataclass(frozen=True)
class SigningKey:
    """A private key: Ed25519, or ECDSA on one of NIST's curves."""

    private: Ed25519PrivateKey | EllipticCurvePrivateKey

    @classmethod
    def read(cls, path: Path) -> SigningKey:
        """Read a key as OpenSSH or OpenSSL writes it. An `InputError` says why it is none to sign with."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519

        if not path.is_file():
            raise InputError(f"{path}: no such key; make one with `ssh-keygen -t ed25519 -f {path}`")
        data = path.read_bytes()
        ssh = b"BEGIN OPENSSH PRIVATE KEY" in data
        load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
        try:
            key = load(data, password=None)
        except TypeError:
            raise InputError(
                f"{path}: the key has a passphrase; give a copy without (`ssh-keygen -p`)"
            ) from None
        except (ValueError, UnsupportedAlgorithm) as error:
            fault = " ".join(str(error).split())[:80]
            raise InputError(f"{path}: not a private key ({fault}); name one of OpenSSH or OpenSSL") from None
        curves = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
        if isinstance(key, ed25519.Ed25519PrivateKey) or (
            isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, curves)
        ):
            return cls(key)
        raise InputError(
            f"{path}: neither Ed25519 nor ECDSA on a curve of NIST; make another (`ssh-keygen -t ed25519`)"
        )

    @property
    def fingerprint(self) -> str:
        """The name of the key, as `ssh-keygen -l` says it."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        text = self.private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
        return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"

    @property
    def on_curve(self) -> bool:
        """Whether it is ECDSA."""
        return hasattr(self.private, "curve")

    def sign(self, data: bytes) -> bytes:
        """Return the signature of some bytes."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        if not isinstance(self.private, ec.EllipticCurvePrivateKey):
            return self.private.sign(data)
        digests = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
        return self.private.sign(data, ec.ECDSA(digests[self.private.key_size]))


def read_certificates(path: Path, key: SigningKey) -> list[Certificate]:
    """Read the certificate of a key, and those between it and a root. An `InputError` where it is another key's."""
    from cryptography.x509 import load_pem_x509_certificates

    if not path.is_file():
        raise InputError(f"{path}: no such certificate; name a PEM file, the key's own certificate first")
    try:
        found = load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"{path}: not a PEM file of certificates ({' '.join(str(error).split())[:80]})"
        ) from None
    if found[0].public_key() != key.private.public_key():
        raise InputError(f"{path}: its first certificate is of another key; put that of the key first")
    return found


def envelope_of(statement: Mapping[str, Any], key: SigningKey | None) -> dict[str, Any]:
    """Return a statement in a DSSE envelope, with a signature where there is a key."""
    payload = json.dumps(statement, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    # The pre-authentication encoding of DSSE: a signature of it cannot be taken for one of another kind of bytes.
    signed = b"DSSEv1 %d %b %d %b" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)
    signatures = [{"keyid": key.fingerprint, "sig": _base64(key.sign(signed))}] if key else []
    return {"payload": _base64(payload), "payloadType": _PAYLOAD, "signatures": signatures}


def model_signature(
    name: str, files: Mapping[str, str], key: SigningKey, certificates: list[Certificate]
) -> dict[str, Any]:
    """Return what OpenSSF Model Signing writes for a folder: a Sigstore bundle around one signed statement.

    Args:
        name: of the folder.
        files: the SHA-256 of each file by its path in the folder.
        key: on a curve of NIST, which is all that Model Signing knows.
        certificates: of the key, if it has one.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    ordered = {path: files[path] for path in sorted(files, key=lambda path: Path(path).parts)}
    whole = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in ordered.values())).hexdigest()
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": whole}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": True,  # DVC can be told to link its files
                "ignore_paths": [],
            },
            "resources": [
                {"name": path, "algorithm": "sha256", "digest": digest} for path, digest in ordered.items()
            ],
        },
    }
    if certificates:
        chain = [{"rawBytes": _base64(one.public_bytes(Encoding.DER))} for one in certificates]
        material: dict[str, Any] = {"x509CertificateChain": {"certificates": chain}}
    else:
        public = key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        material = {"publicKey": {"hint": hashlib.sha256(public).hexdigest()}}
    return {
        "mediaType": _SIGSTORE_BUNDLE,
        "verificationMaterial": {**material, "tlogEntries": []},
        "dsseEnvelope": envelope_of(statement, key),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
