"""Fakes for unit tests; each stands in for a real thing that has its own tests."""
