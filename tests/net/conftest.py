"""What the tests with real sockets and engines share."""

from __future__ import annotations

import pytest

from mesh.engine.cache import Engine, find_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    built = find_engine()
    if built is None:
        pytest.skip("the engine is not built: bin/mesh engine build")
    return built
