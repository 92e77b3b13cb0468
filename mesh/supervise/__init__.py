"""Starts, watches and ends this node's part of the engine, one epoch at a time."""
