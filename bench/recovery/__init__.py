"""How a mesh of real nodes takes real faults: see :mod:`bench.recovery.__main__`."""
