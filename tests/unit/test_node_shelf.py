"""A node finds its own copies of what others serve, also later, and tells when it has none."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mesh.engine.cache import Engine
from mesh.errors import ModelError
from mesh.models.gguf import ModelFile
from mesh.node import shelf as shelves
from mesh.node.prepare import LocalModel
from mesh.node.shelf import Shelf
from mesh.notice import Notice, View
from mesh.wire.facts import ModelCost
from tests.eventually import eventually
from tests.unit.test_plan_search import a_model

ENGINE = Engine(Path("e"), "pin", "cpu", Path("e/s"), Path("e/r"), Path("e/b"))
COST = a_model(name="qwen")
FILE = ModelFile.__new__(ModelFile)


class Screen:
    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def show(self, notice: Notice) -> None:
        self.notices.append(notice)

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        pass

    def close(self) -> None:
        pass


class Disk:
    """What the search finds; counts how often it looked."""

    def __init__(self) -> None:
        self.found: LocalModel | None = None
        self.error: ModelError | None = None
        self.looked = 0

    def find(self, cost: ModelCost, engine: Engine | None, view: View) -> LocalModel | None:
        self.looked += 1
        if self.error is not None:
            raise self.error
        return self.found


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(shelves, "_find", disk.find)
    return disk


def a_shelf(screen: Screen, told: list[int], engine: Engine | None = ENGINE) -> Shelf:
    return Shelf(None, engine, screen, lambda: told.append(1))


async def test_a_copy_on_this_disk_is_found_and_told(disk: Disk) -> None:
    screen, told = Screen(), list[int]()
    shelf = a_shelf(screen, told)
    disk.found = LocalModel(FILE, COST)
    shelf.look_for([COST, COST])
    await eventually(lambda: told)
    shelf.look_for([COST])
    assert shelf.costs == (COST,)
    assert shelf.file(COST.fingerprint) is FILE
    assert disk.looked == 1
    assert "fingerprint matches" in screen.notices[0].text


async def test_a_missing_copy_is_told_once_and_used_when_it_arrives(disk: Disk) -> None:
    screen, told = Screen(), list[int]()
    shelf = a_shelf(screen, told)
    shelf.look_for([COST])
    await eventually(lambda: screen.notices)
    assert "no copy of qwen" in screen.notices[0].text
    shelf.look_again()
    await eventually(lambda: disk.looked == 2 and not shelf._searches)
    assert len(screen.notices) == 1
    disk.found = LocalModel(FILE, COST)
    shelf.look_again()
    await eventually(lambda: told)
    shelf.look_again()
    assert disk.looked == 3
    assert shelf.costs == (COST,)


async def test_a_copy_that_cannot_be_read_is_a_warning_once(disk: Disk) -> None:
    screen = Screen()
    shelf = a_shelf(screen, [])
    disk.error = ModelError("the disk is on fire")
    shelf.look_for([COST])
    await eventually(lambda: screen.notices)
    shelf.look_again()
    await eventually(lambda: disk.looked == 2 and not shelf._searches)
    assert [notice.kind for notice in screen.notices] == ["warning"]


async def test_a_lite_client_looks_for_nothing(disk: Disk) -> None:
    shelf = a_shelf(Screen(), [], None)
    shelf.look_for([COST])
    shelf.look_again()
    assert disk.looked == 0


async def test_closing_gives_up_a_search_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()

    def hash_for_hours(cost: ModelCost, engine: Engine | None, view: View) -> LocalModel | None:
        begun.set()
        try:
            while not ended.wait(0.001):
                view.progress("checking", 1, 2)
        finally:
            ended.set()
        return None

    monkeypatch.setattr(shelves, "_find", hash_for_hours)
    shelf = a_shelf(Screen(), [])
    shelf.look_for([COST])
    await eventually(begun.is_set)
    await shelf.close()
    await eventually(ended.is_set)
