"""Commands and views; no decisions."""
