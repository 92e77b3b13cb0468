"""Answers the only question the package client asks about a source archive it merely downloads: its name and version.

The real backend would be installed first, and asked to run code of the archive; neither is of use here.
"""

from __future__ import annotations

from pathlib import Path


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: object = None) -> str:
    """Hand out the archive's own PKG-INFO (PEP 517; the working directory is the unpacked archive)."""
    metadata = Path("PKG-INFO").read_text("utf-8")
    fields = dict(line.split(": ", 1) for line in metadata.split("\n\n", 1)[0].splitlines() if ": " in line)
    info = Path(metadata_directory) / f"{fields['Name'].replace('-', '_')}-{fields['Version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(metadata, "utf-8")
    (info / "WHEEL").write_text(
        "Wheel-Version: 1.0\nGenerator: mesh\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "utf-8"
    )
    return info.name
