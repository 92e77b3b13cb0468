"""Lanes between nodes: authenticated connections that carry streams with flow control."""

from mesh.transport.lane import Connection, Lane, Path, Stream

__all__ = ["Connection", "Lane", "Path", "Stream"]
