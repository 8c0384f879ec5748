"""Methods by name: told apart, and found beside their model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lac_vla import CheckpointError, InputError, Motion, Random, hub
from lac_vla.factory import make_policies, method_name, resolve_policy
from lac_vla.policies import POLICIES


@dataclass(frozen=True)
class Learned(Random):
    """Stands for a policy with a folder."""

    path: str = ""
    recovery: float | None = None


@pytest.fixture(autouse=True)
def learned(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(path: str, recovery: float | None = None) -> Learned:
        return Learned(path=path, recovery=recovery)

    monkeypatch.setitem(POLICIES, "lac", from_pretrained)


def test_method_name() -> None:
    assert [method_name(spec) for spec in ("dense", "motion:ratio=0.5")] == ["dense", "motion-0.5"]


def test_lac_without_a_path_is_the_models_own(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    model = str(tmp_path)
    assert resolve_policy("lac", model) == Learned(path=str(tmp_path / "policy"))
    assert resolve_policy("plain@lac:recovery=0", model) == Learned(path=str(tmp_path / "policy"), recovery=0)
    assert resolve_policy("lac:path=other/full", model) == Learned(path="other/full")
    assert resolve_policy("motion:ratio=0.7", model) == Motion(0.7)


def test_lac_without_a_path_or_a_policy_beside_the_model(tmp_path: Path) -> None:
    for model in (None, str(tmp_path), "lac_vla.models:random_vla"):
        with pytest.raises(InputError, match=r"without a policy.*lac:path=FOLDER"):
            resolve_policy("lac", model)
        assert resolve_policy("lac:path=full", model) == Learned(path="full")


@pytest.mark.parametrize("model", ["nowhere", "minni"])
def test_a_missing_model_is_what_is_missing(model: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{model}' is neither a folder nor a hub id"):
        resolve_policy("lac", model)
    with pytest.raises(CheckpointError, match="did you mean 'mini-vit'"):
        resolve_policy("lac", "mini_vit")


def test_the_policy_of_a_model_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        wanted.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(InputError, match="without a policy"):
        resolve_policy("lac", "owner/name")
    (tmp_path / "policy").mkdir()
    assert resolve_policy("lac", "owner/name") == Learned(path=str(tmp_path / "policy"))
    assert wanted[0][0] == "owner/name"
    assert "policy/policy.safetensors" in wanted[0][1]


def test_methods_keep_their_order_and_have_different_names() -> None:
    specs = ("motion", "a@lac:path=x/full", "b@lac:path=y/full", "lac:path=x/full")
    assert list(make_policies(specs, None)) == ["motion", "a", "b", "lac-full"]
    with pytest.raises(InputError, match=r"two policies are called 'lac-full'.*other@lac:path=y/full"):
        make_policies(("lac:path=x/full", "lac:path=y/full"), None)
