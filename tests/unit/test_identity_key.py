"""The node key on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mesh.errors import StateError
from mesh.identity.key import NodeKey, node_id, signed_by


def test_a_node_keeps_its_key_and_id(tmp_path: Path) -> None:
    path = tmp_path / "state" / "node.key"
    first = NodeKey.load_or_create(path)
    again = NodeKey.load_or_create(path)
    assert first.id == again.id == node_id(first.public)
    assert len(first.id) == 26
    assert first.id.islower()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_new_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    NodeKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path], "no draft is left behind"


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    NodeKey.load_or_create(path)
    path.chmod(0o640)
    with pytest.raises(StateError, match="other users") as caught:
        NodeKey.load_or_create(path)
    assert "chmod 600" in str(caught.value)


def test_a_damaged_key_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(b"nonsense")
    path.chmod(0o600)
    with pytest.raises(StateError, match="holds no private key"):
        NodeKey.load_or_create(path)
    assert path.read_bytes() == b"nonsense"


def test_a_signature_speaks_for_one_key_and_one_message() -> None:
    key, other = NodeKey.generate(), NodeKey.generate()
    signature = key.sign(b"yes")
    assert signed_by(key.public, signature, b"yes")
    assert not signed_by(key.public, signature, b"no")
    assert not signed_by(other.public, signature, b"yes")
    assert not signed_by(b"short", signature, b"yes")


def test_the_certificate_carries_the_key() -> None:
    key = NodeKey.from_seed(bytes(32))
    certificate, secret = key.certificate()
    public = certificate.public_key()
    assert public.public_bytes(Encoding.Raw, PublicFormat.Raw) == key.public  # type: ignore[union-attr]
    assert secret.public_key() == public
