"""What meshes of many members say to each other:  bin/sim --scale 5 32 100 1000."""

from __future__ import annotations

def main(sizes: list[int]) -> int:
    return 0
