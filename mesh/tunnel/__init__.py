"""Carries RPC and HTTP bytes between local ports and the mesh."""

from mesh.tunnel.host import HostTunnels
from mesh.tunnel.member import HttpTunnel, WorkerTunnel
from mesh.tunnel.pump import Traffic
from mesh.tunnel.push import PushTunnels

__all__ = ["HostTunnels", "HttpTunnel", "PushTunnels", "Traffic", "WorkerTunnel"]
