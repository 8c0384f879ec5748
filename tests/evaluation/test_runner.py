"""Paired runs: resumable, repeatable, and refusing what does not fit; on a fake simulator and a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.evaluation.worlds import FakeEnv, outcomes

from lac_vla import InputError
from lac_vla.bundled import MINI
from lac_vla.evaluation import runner
from lac_vla.evaluation.config import EvalConfig
from lac_vla.evaluation.runner import describe_model, evaluate, evaluate_together
from lac_vla.factory import ModelOptions
from lac_vla.policies import POLICIES, Random
from lac_vla.results.records import read_episodes


@pytest.fixture
def config(model: str, tmp_path: Path) -> EvalConfig:
    policies = ("dense", "random:ratio=0.5")
    return EvalConfig(model, tmp_path / "run", policies, tasks=(0, 3), init_states=(4, 8), videos=0)


def test_every_method_runs_on_the_same_states(config: EvalConfig) -> None:
    episodes = read_episodes(evaluate(config) / "episodes.jsonl")
    trials = {method: {e.trial for e in episodes if e.method == method} for method in ("dense", "random-0.5")}
    assert trials["dense"] == trials["random-0.5"]
    assert len(trials["dense"]) == 8
    for episode in episodes:
        assert episode.success == (episode.init_state <= FakeEnv.horizon)
        assert episode.steps == min(episode.init_state, FakeEnv.horizon)
        assert len(episode.latency_ms["observation_to_action"]) == episode.steps
        assert episode.metrics["ratio_effective"][0] == 0
    reused = [e for e in episodes if e.method == "random-0.5"]
    assert np.mean([r for e in reused for r in e.metrics["ratio_effective"][1:]]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([m for e in reused for m in e.metrics["macs"]]) < np.mean(
        [m for e in episodes if e not in reused for m in e.metrics["macs"]]
    )


def test_a_killed_run_goes_on_without_losing_or_repeating(config: EvalConfig, tmp_path: Path) -> None:
    whole = outcomes(evaluate(config))
    log = config.out / "episodes.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:5]) + lines[5][:40])  # killed in the middle of writing the sixth
    evaluate(config)
    assert outcomes(config.out) == whole
    assert log.read_text().startswith("".join(lines[:5]))
    evaluate(config)
    assert outcomes(config.out) == whole


def test_other_settings_do_not_mix(config: EvalConfig) -> None:
    evaluate(replace(config, tasks=(0,), init_states=(4, 5)))
    with pytest.raises(InputError, match=r"other .*seed.*another --out"):
        evaluate(replace(config, tasks=(0,), init_states=(4, 5), model_options=ModelOptions(seed=1)))
    evaluate(replace(config, tasks=(0,), init_states=(4, 5), model_options=ModelOptions(threads=1)))


def test_a_run_grows_by_policies_and_initial_states(config: EvalConfig) -> None:
    small = replace(config, policies=("dense",), init_states=(4, 6))
    before = outcomes(evaluate(small))
    grown = outcomes(evaluate(config))
    assert [line for line in grown if line[0] == "dense" and line[1][2] < 6] == before
    assert grown == outcomes(evaluate(replace(config, out=config.out.with_name("at once"))))
    evaluate(small)
    settings = json.loads((config.out / "config.json").read_text())
    assert (settings["policies"], settings["init_states"]) == (["dense", "random:ratio=0.5"], [4, 8])
    assert set(json.loads((config.out / "summary.json").read_text())["methods"]) == {"dense", "random-0.5"}
    assert outcomes(config.out) == grown
    for wrong in ({"policies": ("dense@random",)}, {"init_states": (5, 8)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            evaluate(replace(config, **wrong))  # type: ignore[arg-type]


def test_stress_is_recorded_and_changes_what_the_robot_sees(config: EvalConfig) -> None:
    config = replace(config, tasks=(0,), init_states=(4, 5))
    calm = outcomes(evaluate(config))
    with pytest.raises(InputError, match=r"other .*stress"):
        evaluate(replace(config, stress="shake"))
    held = replace(config, out=config.out.with_name("held"), stress="long")
    summary = json.loads((evaluate(held) / "summary.json").read_text())
    assert summary["simulator"]["stress"] == json.loads((held.out / "config.json").read_text())["stress"] == "long"
    assert any("Stress 'long' (hold 150)" in note for note in summary["notes"])
    assert all(e.horizon == FakeEnv.horizon + 150 for e in read_episodes(held.out / "episodes.jsonl"))
    assert {e.stress for e in read_episodes(held.out / "episodes.jsonl")} == {"long"}
    told = replace(config, out=config.out.with_name("told"), stress="instruction")
    same = [(*trial, *rest) for _, (*trial, _, _), *rest in outcomes(evaluate(told))]
    assert same == [(*trial, *rest) for _, (*trial, _, _), *rest in calm], "it comes after these short episodes"


def test_a_folder_whose_episodes_are_of_another_stress_is_refused(config: EvalConfig) -> None:
    """As an older version left them: it did not mark the episodes of a stress."""
    config = replace(config, tasks=(0,), init_states=(4, 5), stress="drift")
    path = evaluate(config) / "episodes.jsonl"
    before = path.read_text().replace('"stress": "drift"', '"stress": ""')
    path.write_text(before)
    with pytest.raises(InputError, match=r"not marked 'drift'.*another --out"):
        evaluate(replace(config, policies=(*config.policies, "random:ratio=0.25")))
    assert path.read_text() == before
    assert "random:ratio=0.25" not in (config.out / "config.json").read_text(), "refused before anything was changed"


def test_a_run_from_before_an_option_was_there_goes_on(config: EvalConfig) -> None:
    config = replace(config, tasks=(0,), init_states=(4, 5))
    path = evaluate(config) / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("float8") is False
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"other \['float8'\].*float8 False"):
        evaluate(replace(config, model_options=ModelOptions(float8=True)))
    evaluate(replace(config, init_states=(4, 6)))
    assert len(outcomes(config.out)) == 2 * len(config.policies)


def test_evaluations_under_several_stresses_make_every_simulator_once(config: EvalConfig) -> None:
    stresses = (None, "drift", "long")
    alone = [replace(config, out=config.out.with_name(f"alone-{name}"), stress=name) for name in stresses]
    together = [replace(config, out=config.out.with_name(f"together-{name}"), stress=name) for name in stresses]
    for one in alone:
        evaluate(one)
    evaluate(replace(together[1], init_states=(4, 5)))
    FakeEnv.made = 0
    evaluate_together(together)
    assert FakeEnv.made == len(config.task_ids) == 2
    for one, other in zip(alone, together, strict=True):
        assert outcomes(one.out) == outcomes(other.out)
    for wrong in ({"model_options": ModelOptions(seed=1)}, {"stress": None}, {"out": together[0].out}):
        with pytest.raises(InputError, match="all else alike"):
            evaluate_together([together[0], replace(together[1], **wrong)])  # type: ignore[arg-type]
    kept, other = ((one.out / "config.json").read_text() for one in together[:2])
    more = [replace(one, policies=(*one.policies, "random:ratio=0.25")) for one in together]
    (together[1].out / "config.json").write_text(json.dumps({**json.loads(other), "seed": 1}))
    with pytest.raises(InputError, match=r"together-drift holds a run with other \['seed'\]"):
        evaluate_together(more)
    assert (together[0].out / "config.json").read_text() == kept, "refused before anything was changed"


def test_summary_says_what_was_altered(config: EvalConfig) -> None:
    summary = json.loads((evaluate(config) / "summary.json").read_text())
    assert any("Altered rendering" in note for note in summary["notes"])
    assert any("2 of 10 tasks" in note for note in summary["notes"])
    assert {"versions", "hardware", "command", "model", "methods"} <= set(summary)


def test_a_machine_that_was_busy_once_is_told_of(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on the highest load is kept: its latencies are all in one table."""
    loads = []
    for load, last in ((0.5, 5), (7.25, 6), (1.0, 7), (99.0, 7)):
        monkeypatch.setattr(runner, "load_now", lambda load=load: load)
        evaluate(replace(config, tasks=(0,), init_states=(4, last)))
        loads.append(json.loads((config.out / "summary.json").read_text())["load"])
    assert loads == [0.5, 7.25, 7.25, 7.25], "where nothing was played, nothing was timed"
    alone = replace(config, out=config.out / "alone")
    evaluate_together([alone], 0.25)
    assert json.loads((alone.out / "summary.json").read_text())["load"] == 0.25, (
        "other parts of the same work count not"
    )


def test_results_name_methods_and_no_folders(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "learned", lambda path, ratio: Random(ratio))
    policies = ("chance@random:ratio=0.5", "learned:path=/some/where/full,ratio=0.25")
    out = evaluate(replace(config, policies=policies, tasks=(0,), init_states=(4, 5)))
    assert {e.method for e in read_episodes(out / "episodes.jsonl")} == {"chance", "learned-full-0.25"}
    settings, summary = (json.loads((out / name).read_text()) for name in ("config.json", "summary.json"))
    assert settings["policies"] == ["chance@random:ratio=0.5", "learned:path=full,ratio=0.25"]
    assert settings["flow"] is None
    assert summary["methods"]["learned-full-0.25"]["policy"] == "learned:path=full,ratio=0.25"
    for name in ("config.json", "summary.json"):
        assert "/some/where" not in (out / name).read_text()
        assert str(config.out.parent) not in (out / name).read_text()


def test_unwritable_folder(config: EvalConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="another --out"):
        evaluate(replace(config, out=tmp_path / "file" / "run"))


def test_a_bundled_model_by_name_is_described_as_its_folder_is() -> None:
    assert describe_model("mini") == describe_model(str(MINI)) != {"name": "mini"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": (0, 10)},
        {"init_states": (5, 5)},
        {"init_states": (40, 60)},
        {"policies": ("x",)},
        {"policies": ("dense", "dense")},
        {"policies": ("a@dense", "a@random")},
        {"policies": ("lac:recover=0",)},
        {"camera": ("agentview",)},
        {"camera": ("agentview=front",), "server": "ws://127.0.0.1:8000"},
        {"model_options": ModelOptions(device="gpu")},
        {"ensemble": 0},
        {"actions_per_call": 0},
        {"stress": "earthquake"},
        {"workers": 0},
    ],
)
def test_bad_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        EvalConfig("mini", Path("out"), **{"policies": ("dense",), **wrong})
