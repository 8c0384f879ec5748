"""Policies on the hub: what is pushed is what is read back; no network is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lac_vla import CheckpointError, InputError, LACConfig, LACPolicy, hub
from lac_vla.policies.lac import policy as module
from lac_vla.policies.lac.card import model_card

ABOUT = {"training": {"model": "openvla/openvla-7b", "dataset": "kitchen"}, "steps": 260, "frames": 9, "episodes": 2}


class FakeHub:
    """Keeps what is uploaded in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: list[tuple[str, bool]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.made.append((repo_id, private))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, name: str, allow_patterns: list[str]) -> str:
        assert {path.name for path in (self.root / name).iterdir()} - {"README.md"} <= set(allow_patterns)
        return str(self.root / name)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(module, "HfApi", lambda token: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.download)
    return fake


def test_a_pushed_policy_comes_back_from_the_hub(fake: FakeHub) -> None:
    policy = LACPolicy(LACConfig(grids={"front": (4, 4)}))
    policy.about = ABOUT
    assert policy.push_to_hub("me/my-lac", private=True) == "https://hub/me/my-lac/commit/1"
    assert fake.made == [("me/my-lac", True)]
    back = LACPolicy.from_pretrained("me/my-lac", recovery=0.25)
    assert (back.config, back.about, back.recovery) == (policy.config, ABOUT, 0.25)
    assert all(w.equal(v) for w, v in zip(back.networks.parameters(), policy.networks.parameters(), strict=True))
    card = (fake.root / "me" / "my-lac" / "README.md").read_text()
    assert "base_model: openvla/openvla-7b" in card.split("---")[1]
    assert 'CachedVLA.from_pretrained("openvla/openvla-7b", policy="lac:path=me/my-lac")' in card
    assert "dataset kitchen" in card
    assert "front 4 × 4" in card


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("policy.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("config.json", b"\n<!DOCTYPE html><title>404</title>", "is an HTML page"),
        ("policy.safetensors", b"Entry not found", "cannot be read"),
        ("config.json", b'{"error": "Repository not found"}', "does not hold a LAC policy"),
        ("policy.safetensors", {"selector.shift": torch.tensor(torch.nan)}, "NaN or infinity"),
        ("policy.safetensors", {"selector.shift": torch.tensor(0, dtype=torch.int8)}, "quantised"),
        ("policy.safetensors", {"selector.shift": torch.zeros(3)}, r"(?s)does not fit .*selector\.shift"),
        ("policy.safetensors", {"selector.other": torch.zeros(3)}, r"(?s)does not fit .*selector\.other"),
    ],
)
def test_a_damaged_policy_of_the_hub(fake: FakeHub, name: str, content: Any, message: str) -> None:
    LACPolicy(LACConfig(grids={"front": (4, 4)})).push_to_hub("me/my-lac")
    file = fake.root / "me" / "my-lac" / name
    if isinstance(content, dict):
        save_file(load_file(file) | content, file)
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        LACPolicy.from_pretrained("me/my-lac")


@pytest.mark.parametrize("name", ["my-lac", "a/b/c", "https://hub/a/b"])
def test_only_owner_and_name_are_pushed_to(fake: FakeHub, name: str) -> None:
    with pytest.raises(InputError, match="give owner/name"):
        LACPolicy(LACConfig(grids={"front": (4, 4)})).push_to_hub(name)
    assert not fake.made


def test_a_hub_that_refuses_is_told_of(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("401 Unauthorized")

    monkeypatch.setattr(fake, "create_repo", refuse)
    with pytest.raises(InputError, match=r"401 Unauthorized.*hf auth login"):
        LACPolicy(LACConfig(grids={"front": (4, 4)})).push_to_hub("me/my-lac")


def test_a_card_tells_nothing_of_a_machines_folders() -> None:
    card = model_card(LACConfig(grids={"front": (4, 4)}), {"training": {"model": "/home/someone/models/mine"}})
    assert "someone" not in card
    assert '"mine"' in card
