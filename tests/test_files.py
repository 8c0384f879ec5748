"""Folders that are made for nothing go again; nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lac_vla.errors import InputError
from lac_vla.files import locked


@pytest.mark.parametrize("name", ["run", "block"])
def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "new" / "deep" / name
    with (
        pytest.raises(InputError, match="refused"),
        locked(folder / ".lock", "held", ["store.lock"]),
        locked(folder / "store.lock", "held"),
    ):
        raise InputError("refused")
    assert not [*tmp_path.iterdir()]
    with locked(folder / ".lock", "held"):
        (folder / "kept").touch()
    assert {path.name for path in folder.iterdir()} == {".lock", "kept"}
    with locked(folder / ".lock", "held"):
        pass
    assert {path.name for path in folder.iterdir()} == {".lock", "kept"}


def test_locks_of_others_and_files_of_the_user_stay(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    with locked(folder / "a.lock", "held"), locked(folder / "b.lock", "held"):
        (folder / "uv.lock").touch()
    with locked(folder / "b.lock", "held"):
        with locked(folder / "a.lock", "held"):
            pass
        with pytest.raises(InputError, match="held"), locked(folder / "b.lock", "held"):
            pass
    assert (folder / "uv.lock").exists()
    with locked(tmp_path / "q" / "b.lock", "held"):
        with locked(tmp_path / "q" / "a.lock", "held"):
            pass
        assert (tmp_path / "q" / "b.lock").exists()
