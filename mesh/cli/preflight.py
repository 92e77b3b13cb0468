"""What can be found wrong within a second, before a node begins with what takes minutes."""

from __future__ import annotations

import errno
import socket

from mesh.config import Settings
from mesh.errors import StateError, UsageError
from mesh.identity.invite import Invite
from mesh.models.inventory import Inventory
from mesh.node.run import api_hosts
from mesh.node.whereabouts import STUN_PORT
from mesh.proxy.keys import read_api_keys
from mesh.transport.address import split_address
from mesh.transport.udp import bind


def check(settings: Settings) -> None:
    """Look at everything the settings name: tokens, files, addresses, ports.

    Raises:
        UsageError: a token or an address is none, a key file is unreadable or empty.
        ModelError: the model is missing, damaged or no model.
        StateError, TransportError: a port is taken, or an address is not this machine's.
    """
    for token in settings.join:
        Invite.decode(token)
    for address in settings.advertise:
        split_address(address, default_port=settings.bind_port or 1)
    for server in settings.stun:
        split_address(server, default_port=STUN_PORT)
    read_api_keys(settings.api_key_file, settings.api_keys)
    if settings.model is not None:
        Inventory().find(settings.model)
    for host in api_hosts(settings.api_host):
        _check_api_port(host, settings.api_port)
    for host in settings.bind_host:
        bind(host, settings.bind_port).close()


def _check_api_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen()
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return  # whether it can do without this address is the server's to say
        raise StateError(
            f"port {port} on {host}, where the API should answer, is taken or not allowed: {error.strerror}",
            remedy="choose another: --api-port N   (is another node running? mesh status)",
            code="port-in-use",
        ) from error


def check_gpu_layers(settings: Settings, backend: str) -> None:
    """Raises:
    UsageError: ``--gpu-layers`` was given, and the engine computes on the CPU.
    """
    if settings.gpu_layers is not None and backend == "cpu":
        raise UsageError(
            "--gpu-layers needs an engine that uses a GPU; this one uses the CPU",
            remedy="build one, for example: mesh engine build --backend cuda",
        )
