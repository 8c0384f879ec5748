"""Policies, models and benchmarks from outside: announced by a package, or given as ``module:name``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lac_vla import CheckpointError, InputError, load_vla, make_policy, plugins, save_vla
from lac_vla.cli import main
from lac_vla.factory import make_policies, resolve_policy
from lac_vla.policies import POLICIES
from lac_vla.sims import benchmark_of

CODE = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from lac_vla import CachePolicy, Decision, PolicyInput, VLA, random_vla
from lac_vla.sims.base import Benchmark, Env

@dataclass(frozen=True)
class Blink(CachePolicy):
    ratio: float = 0.5
    every: int = 2
    camera: str = ""

    def decide(self, inputs: PolicyInput) -> Decision:
        return Decision.dense(inputs.layout.n_visual, inputs.n_layers)

def load(*, device: torch.device, dtype: torch.dtype, preset: str = "tiny", path: Path | None = None) -> VLA:
    return random_vla(preset, device=device, dtype=dtype, seed=1 if path else 0)

@dataclass(frozen=True)
class Desk(Benchmark):
    suite: str = "desk"
    suites: ClassVar[tuple[str, ...]] = ("desk",)

    @property
    def trials(self) -> tuple[int, ...]:
        return (3,)

    def make_env(self, task: int) -> Env:
        raise NotImplementedError

def wrong(device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    return {}

NUMBER = 3
"""
ANNOUNCED = """
[lac_vla.policies]
blink = outside:Blink
[lac_vla.models]
my-vla = outside:load
[lac_vla.benchmarks]
desk = outside:Desk
not-one = outside:load
"""


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A module in the current folder."""
    (tmp_path / "outside.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("outside", None)


@pytest.fixture
def package(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, installed and announced."""
    info = outside / "outside-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1\n")
    (info / "entry_points.txt").write_text(ANNOUNCED)
    monkeypatch.syspath_prepend(str(outside))
    return outside


@pytest.mark.usefixtures("outside")
def test_a_policy_of_the_current_folder() -> None:
    methods = make_policies(("outside:Blink:ratio=0.25,every=3", "own@outside:Blink"), None)
    assert list(methods) == ["Blink-0.25-3", "own"]
    assert vars(methods["Blink-0.25-3"]) == {"ratio": 0.25, "every": 3, "camera": ""}


@pytest.mark.usefixtures("package")
def test_an_announced_policy() -> None:
    assert type(resolve_policy("blink:every=4", None)).__name__ == "Blink"
    with pytest.raises(InputError, match=r"unknown policy 'blnk'.*did you mean 'blink'"):
        resolve_policy("blnk", None)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("outside:Blink:ration=1", r"has no option 'ration' \(did you mean 'ratio'\?\); its options are ratio, every"),
        ("outside:Blink:every=2.5", r"every is '2\.5'; it must be int"),
        ("blink:ratio=80%", r"policy 'blink': ratio is '80%'; it must be a number"),
        ("outside:Blnk", r"outside has no 'Blnk' \(did you mean 'Blink'\?\)"),
        ("nowhere:Blink", "there is no module 'nowhere'.*nowhere.py here"),
        ("outside:NUMBER", "is a int; give a class or a function"),
        ("outside:Desk", "made a Desk; it must be a CachePolicy"),
    ],
)
def test_what_is_wrong_with_a_plug_in_is_said(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_policy(spec, None)


@pytest.mark.parametrize("name", POLICIES)
def test_a_wrong_option_of_any_policy_names_the_right_ones(name: str) -> None:
    known = plugins.options_of(POLICIES[name])
    with pytest.raises(InputError, match=f"policy '{name}' has no option 'speed'") as refused:
        make_policy(name, speed=3)
    assert all(option in str(refused.value) for option in known)


def test_a_text_of_digits_stays_one_where_a_text_is_wanted() -> None:
    with pytest.raises(CheckpointError, match="there is no policy at 007"):
        resolve_policy("lac:path=007", None)


@pytest.mark.usefixtures("outside")
def test_a_model_of_the_current_folder() -> None:
    assert load_vla("outside:load").decoder.shape == load_vla("outside:load:preset=tiny").decoder.shape
    with pytest.raises(InputError, match=r"no option 'size'.*its options are preset, path"):
        load_vla("outside:load:size=3")
    with pytest.raises(InputError, match="takes no unnorm_key: leave it out"):
        load_vla("outside:load", unnorm_key="bridge")
    with pytest.raises(InputError, match="takes no device, dtype: it must take both"):
        load_vla("outside:Desk")
    with pytest.raises(InputError, match="made a dict; it must be a VLA"):
        load_vla("outside:wrong")


def test_an_announced_model_by_name_and_by_its_folder(package: Path) -> None:
    vla = load_vla("my-vla:preset=tiny")
    (package / "saved").mkdir()
    (package / "saved" / "config.json").write_text('{"model_type": "my-vla"}')
    weights = [next(iter(found.module.parameters())) for found in (vla, load_vla(package / "saved"))]
    assert not weights[0].equal(weights[1])  # the latter was told its path
    (package / "saved" / "config.json").write_text('{"model_type": "another"}')
    with pytest.raises(CheckpointError, match="model_type is 'another'"):
        load_vla(package / "saved")


def test_a_plugged_model_is_not_saved_as_one_of_ours(outside: Path) -> None:
    vla = load_vla("outside:load")
    object.__setattr__(vla, "family", "outside")
    with pytest.raises(InputError, match="save its weights yourself"):
        save_vla(vla, outside / "saved")
    assert not (outside / "saved").exists()


def test_a_benchmark_by_its_class_and_by_its_suite(package: Path) -> None:
    for suite in ("outside:Desk",):
        assert benchmark_of(suite).suites == ("desk",)
    with pytest.raises(InputError, match="'not-one' is no Benchmark"):
        benchmark_of("desk")
    points = package / "outside-1.dist-info" / "entry_points.txt"
    points.write_text(ANNOUNCED.replace("not-one = outside:load\n", ""))
    assert benchmark_of("desk").suites == ("desk",)
    with pytest.raises(InputError, match=r"unknown suite 'dsk' \(did you mean 'desk'\?\)"):
        benchmark_of("dsk")


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("words", [["--suite", "outside:Desk"], ["--suite=outside:Desk"]])
def test_the_command_line_takes_a_benchmarks_class(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", *words])
    assert capsys.readouterr().out == "desk: 3 episodes; missing: 0\n"


@pytest.mark.usefixtures("package")
def test_a_plug_in_without_a_docstring_is_listed_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models"])
    assert "my-vla" in capsys.readouterr().out.splitlines()


def test_the_lists_show_plug_ins_and_one_that_is_broken(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = package / "outside-1.dist-info" / "entry_points.txt"
    points.write_text(ANNOUNCED.replace("blink = outside:Blink", "blink = outside:Blink\nbroken = outside:Nothing"))
    main(["policies"])
    text = capsys.readouterr().out
    assert "\nblink " in text
    assert "every=2" in text
    assert "broken: cannot be loaded" in text
    main(["models"])
    assert "preset=tiny" in capsys.readouterr().out


def test_the_short_name_of_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def verb(state_key: str = "") -> None:
        given.append(state_key)

    monkeypatch.setattr("lac_vla.cli.function_of", lambda name, words: (verb, words))
    for words in (["--state", "a"], ["--state=b"], ["--state-key", "c"]):
        main(["train", *words])
    assert given == ["a", "b", "c"]
