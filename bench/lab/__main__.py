"""``python -m bench.lab selfcheck [LINK...]`` or ``sweep`` (remove leftovers of dead labs)."""

from __future__ import annotations

import sys

from bench.lab import LINKS, LabError, lab_available, namespaces, selfcheck


def main(arguments: list[str]) -> int:
    command, names = (arguments or [""])[0], arguments[1:]
    available, why = lab_available()
    if command == "sweep" and not names and available:
        for name in namespaces.sweep():
            print(f"removed {name}")
        return 0
    if command != "selfcheck" or not set(names) <= set(LINKS):
        print(f"usage: python -m bench.lab selfcheck [{'|'.join(LINKS)}]... | sweep", file=sys.stderr)
        return 2
    if not available:
        print(f"error: no lab here: {why}", file=sys.stderr)
        return 1
    try:
        return selfcheck.main(names)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
