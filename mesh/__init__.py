"""One large language model on the machines people already own."""

__version__ = "0.1.0"
