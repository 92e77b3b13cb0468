"""A node is its Ed25519 key."""

from __future__ import annotations

import base64
import datetime
import hashlib
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from mesh.errors import StateError
from mesh.identity.store import read_private, write_private
from mesh.wire.facts import NodeId


def node_id(public: bytes) -> NodeId:
    """The name of a key: lowercase base32 of the first 16 bytes of its SHA-256, 26 characters."""
    return base64.b32encode(hashlib.sha256(public).digest()[:16]).decode().rstrip("=").lower()


def signed_by(public: bytes, signature: bytes, message: bytes) -> bool:
    """Is ``signature`` that of the holder of ``public`` (raw, 32 bytes) over ``message``?"""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


class NodeKey:
    """The secret that makes a node what it is."""

    def __init__(self, secret: Ed25519PrivateKey) -> None:
        self._secret = secret
        self.public = secret.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        """Raw public key, 32 bytes."""
        self.id: NodeId = node_id(self.public)

    def __repr__(self) -> str:
        return f"NodeKey({self.id})"

    @classmethod
    def generate(cls) -> NodeKey:
        """A new key, on no disk."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> NodeKey:
        """The key of a 32-byte seed; for tests that need the same ids every time."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: Path) -> NodeKey:
        """Read the key at ``path``, or make one there, mode 0600.

        Raises:
            StateError: unreadable, not an Ed25519 key, or on POSIX readable by other users.
        """
        pem = read_private(path)
        if pem is None:
            fresh = cls.generate()
            body = fresh._secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            if write_private(path, body, exclusive=True):
                return fresh
            pem = read_private(path)  # another process was faster: its key is the node's
        try:
            secret = load_pem_private_key(pem or b"", password=None)
        except (ValueError, TypeError) as error:
            raise StateError(f"{path} holds no private key", remedy=_LOST.format(path=path)) from error
        if not isinstance(secret, Ed25519PrivateKey):
            raise StateError(f"{path} holds a key of another kind than Ed25519", remedy=_LOST.format(path=path))
        return cls(secret)

    def sign(self, message: bytes) -> bytes:
        """Ed25519 signature, 64 bytes."""
        return self._secret.sign(message)

    def certificate(self) -> tuple[x509.Certificate, Ed25519PrivateKey]:
        """A self-signed certificate for TLS, and its key.

        Peers pin the key and look at nothing else, so dates and names in it mean nothing.
        """
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.id)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._secret.public_key())
            .serial_number(1)
            .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
            .not_valid_after(datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC))
        )
        return builder.sign(self._secret, None), self._secret


_LOST = "restore it from a copy; or move {path} away: this machine is then a new node and must be invited again"
