"""The engine's ring against the network's limit: every bar of it measured in one run, upstream beside it."""
