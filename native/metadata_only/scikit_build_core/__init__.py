"""Stands in for the build backend while the package client downloads the source. See native/README.md."""
