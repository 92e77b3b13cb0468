"""TLS 1.3 between two keys, over bytes: no sockets, no chains, no names.

asyncio's own TLS closes a whole connection when one half of it ends. OpenSSL does not: its close alert ends one half
only (RFC 8446, section 6.1). That is why it is driven here directly, and it costs no framing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)

from mesh.identity.key import NodeKey

ALPN = "mesh-bulk/1"
_RECORD = 16384
"""The most that one TLS record holds; OpenSSL gives one at a time."""


def server_context(key: NodeKey) -> ssl.SSLContext:
    """For the side that listens: it shows the certificate of ``key``, and asks for none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    certificate, secret = key.certificate()
    # The ssl module reads keys from files only: under a password that is forgotten at once, it is a key to nobody.
    password = secrets.token_hex(32)
    body = secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password.encode()))
    handle, name = tempfile.mkstemp(prefix="mesh-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body + certificate.public_bytes(Encoding.PEM))
        context.load_cert_chain(name, password=password)
    finally:
        Path(name).unlink()
    return _restrict(context)


def client_context() -> ssl.SSLContext:
    """For the side that dials. It checks no certificate: look at :attr:`TlsSession.peer_key`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return _restrict(context)


def _restrict(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context


class TlsSession:
    """One end of one connection: ciphertext and plaintext in and out. Every method may leave ciphertext to send."""

    def __init__(self, context: ssl.SSLContext, *, server: bool) -> None:
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)
        self.established = False
        self.ended = False
        """Our half is over."""
        self.peer_ended = False
        """The peer said that its half is over, and that was no forgery."""

    def handshake(self) -> bool:
        """Go on with the handshake. Returns whether it is done.

        Raises:
            ssl.SSLError: the other side does not speak TLS 1.3, or not our protocol over it.
        """
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        if self._tls.selected_alpn_protocol() != ALPN:
            raise ssl.SSLError("the other side is no mesh node")
        self.established = True
        return True

    @property
    def peer_key(self) -> bytes | None:
        """Raw Ed25519 key that the other side proved to hold, 32 bytes; None when it showed none of that kind."""
        shown = self._tls.getpeercert(binary_form=True)
        if shown is None:
            return None
        try:
            public = x509.load_der_x509_certificate(shown).public_key()
        except ValueError:
            return None
        return public.public_bytes(Encoding.Raw, PublicFormat.Raw) if isinstance(public, Ed25519PublicKey) else None

    @property
    def is_drained(self) -> bool:
        """All that came was read; not even a part of a record is left."""
        return not (self._in.pending or self._tls.pending())

    def feed(self, ciphertext: bytes | memoryview) -> None:
        """What the network brought."""
        self._in.write(ciphertext)

    def read(self) -> bytes:
        """Plaintext of the next record; ``b""`` when no whole one is there. Call until then.

        Raises:
            ssl.SSLError: what came is not what the other side sent.
        """
        if self.peer_ended or not (self._in.pending or self._tls.pending()):  # spares OpenSSL an error, and us too
            return b""
        try:
            data = self._tls.read(_RECORD)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:
            data = b""
        if not data:
            self.peer_ended = True
        return data

    def write(self, plaintext: bytes | memoryview) -> None:
        """Encrypt."""
        self._tls.write(plaintext)

    def end(self) -> None:
        """End our half. Everything fed must have been read before, or it is lost."""
        self.ended = True
        with contextlib.suppress(ssl.SSLWantReadError):  # it would wait for the other half's end; we read on till then
            self._tls.unwrap()

    def to_send(self) -> bytes:
        """Ciphertext for the network."""
        return self._out.read()
