"""Models are found by path, name and fingerprint, and what is not there is answered with what is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from mesh.errors import ModelError
from mesh.models.fingerprint import FingerprintCache
from mesh.models.inventory import Inventory, models_directory
from mesh.models.write import split_gguf
from tests.unit.test_models_gguf import model


@pytest.fixture
def inventory(tmp_path: Path) -> Inventory:
    (tmp_path / "models").mkdir()
    return Inventory([tmp_path / "models"], cache=FingerprintCache(tmp_path / "cache"))


def put(inventory: Inventory, name: str, **changes: tuple[str, ...]) -> Path:
    path = inventory.directories[0] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return model(path, **changes)  # type: ignore[arg-type]


def test_a_path_wins_whatever_the_directories_hold(inventory: Inventory, tmp_path: Path) -> None:
    path = model(tmp_path / "elsewhere.gguf")
    assert inventory.find(path).paths == (path,)
    assert inventory.find(str(path)).paths == (path,)


@pytest.mark.parametrize("name", ["Qwen3-32B-Q4_K_M", "qwen3-32b-q4_k_m", "Qwen3-32B-Q4_K_M.gguf", "qwen3"])
def test_a_name_is_a_stem_in_any_case_or_its_beginning(inventory: Inventory, name: str) -> None:
    path = put(inventory, "Qwen3-32B-Q4_K_M.gguf", without=("name",))
    put(inventory, "other.gguf", without=("name",))
    assert inventory.find(name).paths == (path,)


def test_a_model_may_be_called_what_it_calls_itself(inventory: Inventory) -> None:
    path = put(inventory, "file.gguf")
    assert inventory.find("a model").paths == (path,)


def test_an_unknown_name_lists_what_there_is_and_the_nearest(inventory: Inventory) -> None:
    put(inventory, "Qwen3-32B.gguf")
    put(inventory, "Llama-8B.gguf")
    with pytest.raises(ModelError) as caught:
        inventory.find("Qwen3-23B")
    assert "Llama-8B, Qwen3-32B" in caught.value.message
    assert 'did you mean "Qwen3-32B"' in (caught.value.remedy or "")


def test_an_empty_inventory_offers_the_demo(inventory: Inventory) -> None:
    with pytest.raises(ModelError) as caught:
        inventory.find("anything")
    assert "--demo" in (caught.value.remedy or "")


def test_an_ambiguous_name_names_the_paths(inventory: Inventory) -> None:
    put(inventory, "a/same.gguf")
    put(inventory, "b/same.gguf")
    with pytest.raises(ModelError, match="2 models"):
        inventory.find("same")


def test_a_misspelt_path_is_a_missing_file(inventory: Inventory, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        inventory.find(str(tmp_path / "nothing.gguf"))


def test_shards_are_one_model_and_broken_files_are_told_apart(inventory: Inventory, tmp_path: Path) -> None:
    directory = inventory.directories[0]
    split_gguf(model(tmp_path / "sharded.gguf"), 3, directory)
    put(inventory, "publisher/repository/whole.gguf")
    (directory / "broken.gguf").write_bytes(b"no")
    (directory / ".hidden.gguf").write_bytes(b"no")
    scan = inventory.scan()
    assert [m.name for m in scan.models] == ["sharded", "whole"]
    assert [p.name for p, _ in scan.broken] == ["broken.gguf"]


def test_a_missing_directory_is_an_empty_one(tmp_path: Path) -> None:
    assert Inventory([tmp_path / "nothing"], cache=FingerprintCache(tmp_path / "c")).list_models() == ()


def test_another_nodes_model_is_found_here_under_another_name(inventory: Inventory, tmp_path: Path) -> None:
    mine = put(inventory, "my-name.gguf")
    other = Inventory([tmp_path], cache=FingerprintCache(tmp_path / "other-cache"))
    (tmp_path / "theirs.gguf").write_bytes(mine.read_bytes())
    theirs = other.cost(other.find(tmp_path / "theirs.gguf"))
    found = inventory.find_like(theirs)
    assert found is not None and found.paths == (mine,)


def test_only_files_of_the_same_shape_are_hashed(inventory: Inventory) -> None:
    put(inventory, "other-shape.gguf", without=("rope_freqs.weight",))
    wanted = msgspec.structs.replace(inventory.cost(inventory.find(put(inventory, "x.gguf"))), fingerprint="0" * 64)
    inventory.cache.directory.joinpath("nothing")
    hashed: list[int] = []
    assert inventory.find_like(wanted, lambda done, total: hashed.append(total)) is None
    # x.gguf is known already and the other is of another shape: nothing was read.
    assert hashed == []


def test_same_shape_and_other_weights_is_another_model(inventory: Inventory) -> None:
    path = put(inventory, "x.gguf")
    wanted = inventory.cost(inventory.find(path))
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    assert inventory.find_like(wanted) is None


def test_the_models_directory_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_MODELS_DIR", str(tmp_path))
    assert models_directory() == tmp_path
