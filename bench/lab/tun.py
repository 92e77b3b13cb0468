"""One TUN device per namespace, its file descriptor in our hand."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from bench.lab import namespaces

DEVICE = "lab0"
_TUNSETIFF = 0x400454CA
_IFF_TUN = 0x0001
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_TUNSETOFFLOAD = 0x400454D0
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 1, 2, 4

PARTIAL_CHECKSUM = 1
"""In the first byte of the header: the checksum's place holds the sum over addresses and length only."""
HEADER = 10
"""Bytes before every packet read or written: the kernel's note on checksums and segmentation (virtio_net_hdr)."""
TRAIN_BYTES = 16384
"""Longest train of segments left in one piece: 0.13 ms at 1 Gb/s."""

# The device's own queue only covers the router's pauses; queues that mean something are in the router.
_QUEUE_PACKETS = 8192

_SETTINGS = {
    "net/ipv4/tcp_rmem": "4096 131072 33554432",
    "net/ipv4/tcp_wmem": "4096 65536 33554432",
    # What one connection learnt about the path must not help the next: runs have to be alike.
    "net/ipv4/tcp_no_metrics_save": "1",
}


def open_device(namespace: str) -> int:
    """Make the device inside the namespace; the descriptor works from anywhere, and the device goes with it.

    The calling thread ends up in the namespace.
    """
    import fcntl

    namespaces.enter(namespace)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
    return fd


def allow_trains(fd: int, allowed: bool) -> None:
    """Let the kernel hand over trains of TCP segments unsplit: a tenth of the work at LAN speed."""
    import fcntl

    fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | (_TUN_F_TSO4 | _TUN_F_TSO6 if allowed else 0))


def wire_size(packet: bytes) -> tuple[int, int]:
    """IP bytes and packets that ``packet``, header first, is on a wire."""
    size = len(packet) - HEADER
    if not packet[1]:
        return size, 1
    headers, segment = struct.unpack_from("<HH", packet, 2)
    count = max(1, -(-(size - headers) // segment)) if segment else 1
    return size + (count - 1) * headers, count


def configure(namespace: str, addresses: list[str], mtu: int, *, gateway: bool) -> None:
    """Give the device its addresses (``a.b.c.d/n`` or IPv6) and routes. The calling thread must be in the namespace.

    Args:
        gateway: whether packets to any address go out, rather than to those of the device's networks alone.
    """
    script = ["link set lo up", f"link set {DEVICE} mtu {mtu} txqueuelen {_QUEUE_PACKETS} multicast on"]
    script.append(f"link set {DEVICE} gso_max_size {TRAIN_BYTES}")
    six = any(":" in address for address in addresses)
    _write("net/ipv6/conf/all/disable_ipv6", "0" if six else "1")
    if six:
        # Link-local addresses would only add chatter: nothing here answers router solicitations.
        script.append(f"link set {DEVICE} addrgenmode none")
    script.append(f"link set {DEVICE} up")
    namespaces.run_ip(
        "-n", namespace, "-batch", "-", script="\n".join([*script, *_addressing(addresses, gateway)]) + "\n"
    )
    for key, value in _SETTINGS.items():
        _write(key, value)


def readdress(namespace: str, addresses: list[str], *, gateway: bool) -> None:
    """Give a device in use other addresses; what is bound to the old ones sends no more."""
    script = [f"addr flush dev {DEVICE}", *_addressing(addresses, gateway)]
    namespaces.run_ip("-n", namespace, "-batch", "-", script="\n".join(script) + "\n")


def _addressing(addresses: list[str], gateway: bool) -> list[str]:
    script = []
    for address in addresses:
        if ":" in address:
            script.append(f"addr add {address} dev {DEVICE} nodad")
        else:
            script.append(f"addr add {address} broadcast + dev {DEVICE}")
    # The kernel forgets a device's routes with its last address.
    script.append(f"route replace 224.0.0.0/4 dev {DEVICE}")
    script.append(f"route replace 255.255.255.255/32 dev {DEVICE}")
    if gateway:
        script.append(f"route replace default dev {DEVICE}")
    return script


def set_congestion_control(names: list[str], algorithm: str) -> None:
    """Choose TCP's congestion control in the namespaces; without a word where the kernel has no such algorithm.

    The calling thread must be outside of them, and ends up inside the last one.
    """
    if algorithm not in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split():
        return
    # A namespace may choose only among what the machine allows everybody; allow it while we choose.
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
    before = allowed.read_text().strip()
    allowed_fd = os.open(allowed, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if algorithm not in before.split():
            os.pwrite(allowed_fd, f"{before} {algorithm}".encode(), 0)
        for namespace in names:
            namespaces.enter(namespace)
            _write("net/ipv4/tcp_congestion_control", algorithm)
    finally:
        if algorithm not in before.split():
            os.pwrite(allowed_fd, before.encode(), 0)
        os.close(allowed_fd)


def _write(key: str, value: str) -> None:
    # /proc/sys/net shows the namespace of the thread that opens it.
    path = Path("/proc/sys") / key
    if path.exists():
        path.write_text(value)
