"""The paper's tables: which rows, on which episodes, and which of them are flagged."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.evaluation.worlds import FakeEnv, outcomes

from lac_vla import InputError, LACConfig, LACPolicy
from lac_vla.bundled import MINI
from lac_vla.errors import CheckpointError
from lac_vla.evaluation.paper_tables import paper_tables
from lac_vla.evaluation.reproduce import (
    ABLATIONS,
    CURVE,
    DENSE,
    LAC,
    TABLE_1,
    ReproduceConfig,
    Reproduction,
    Row,
    ablation_row,
    plan,
    reproduce,
)
from lac_vla.factory import resolve_policy
from lac_vla.policies import POLICIES, PolicySpec, Random
from lac_vla.results.records import EpisodeRecord
from lac_vla.results.table import FLAG, TextTable


def table(done: Reproduction, title: str) -> TextTable:
    """The first table whose title begins so."""
    return next(found for found in paper_tables(done) if found.title.startswith(title))


def cells(found: TextTable, label: str) -> dict[str, str]:
    """The cells of a row by heading; line breaks become spaces."""
    row = next(row for row in found.rows if row[0] == label)
    return {heading: " ".join(cell.split()) for heading, cell in zip(found.headings, row, strict=True)}


def flagged(found: TextTable) -> list[str]:
    """Labels of the rows that are shown as flagged."""
    return [cells[0].removesuffix(f" {FLAG}") for flag, cells in found.flagged_rows if flag]


def incomplete(done: Reproduction) -> str:
    """What the setting says of incomplete rows; empty if it is not flagged."""
    setting = table(done, "Setting")
    return cells(setting, "incomplete")["value"] if "incomplete" in flagged(setting) else ""


MOTION = next(row for row in TABLE_1 if row.method == "motion-0.8")


@pytest.fixture
def config(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReproduceConfig:
    """Two tasks and two initial states; chance stands for the learned policy."""
    (Path(model) / "policy").mkdir()
    monkeypatch.setitem(POLICIES, "lac", lambda path, ratio=0.5, recovery=0.1: Random(ratio))
    policies = ("lac", "random:ratio=0.25")
    return ReproduceConfig(tmp_path / "out", model, tasks=(0, 3), first=4, trials=2, policies=policies, videos=0)


@pytest.mark.parametrize("row", [*TABLE_1, *ABLATIONS], ids=lambda row: row.label)
def test_every_row_of_a_known_policy_can_be_made(row: Row) -> None:
    if PolicySpec.parse(row.spec).name in POLICIES:
        resolve_policy(row.spec, str(MINI))


def test_the_methods_of_a_table_differ() -> None:
    for rows in (TABLE_1, ABLATIONS):
        assert len({row.method for row in rows}) == len(rows)
        assert len({row.label for row in rows}) == len(rows)
    assert DENSE in TABLE_1
    assert LAC in TABLE_1


def test_rows_are_chosen_by_method_policy_or_spec(config: ReproduceConfig) -> None:
    def methods(*words: str) -> list[str]:
        return [row.method for row in plan(replace(config, policies=words)).table_1]

    assert methods("lac") == ["dense", "lac"]
    assert methods("lac", "motion") == ["dense", "motion-0.8", "motion-wrist", "lac"]
    assert methods("random:ratio=0.25", "motion-0.8") == ["dense", "motion-0.8", "random-0.25"]
    assert plan(config).ablations == ()
    parts = plan(replace(config, policies=("lac", "lac-predictor")))
    assert [row.method for row in parts.ablations] == ["dense", "lac-predictor", "lac"]
    assert [row.method for row in parts.rows] == ["dense", "lac", "lac-predictor"]
    with pytest.raises(InputError, match="unknown policy 'quick'"):
        plan(replace(config, policies=("quick",)))
    assert not config.out.exists(), "refused before anything was run"


def test_the_simulators_cameras_may_have_other_names(config: ReproduceConfig) -> None:
    camera = ("agentview=front",)
    assert replace(config, camera=camera).run("libero_spatial", (DENSE,), 1).camera == camera


def test_a_small_run_becomes_a_larger_one(config: ReproduceConfig) -> None:
    small = reproduce(replace(config, trials=1))
    assert {e.trial for e in small.episodes} == {("libero_spatial", task, 4, 0, "", "") for task in (0, 3)}
    before = outcomes(config.folder("libero_spatial"))
    done = reproduce(config)
    assert len(done.episodes) == 3 * 2 * 2
    assert [line for line in outcomes(config.folder("libero_spatial")) if line[1][2] == 4] == before
    first = table(done, "Table 1: success")
    assert flagged(first) == ["Dense", "LAC", "random-0.25"], "all solved as many"
    assert cells(first, "LAC")["spatial solved"].startswith("4/4")
    assert "incomplete" not in " ".join(first.notes)
    reused = cells(table(done, "Table 1: per call"), "random-0.25")["ratio, effective"]
    assert reused == "19.4 %", "7 of 36 tokens and 4 of 16 in all frames but the first"
    assert cells(table(done, "Table 1: time"), "Dense")["observation to action"].endswith(" 1.00 ×")
    assert cells(first, "LAC")["net speed-up"].endswith("]")
    assert any("Pairs: lac 4, random-0.25 4." in note for note in first.notes)
    assert [len(found.rows) for found in paper_tables(done)[1:]] == [3, 3, 3, 3]
    assert not incomplete(done)


def test_incomplete_rows_are_marked(config: ReproduceConfig) -> None:
    done = reproduce(replace(config, policies=("lac",)))
    kept = [e for e in done.episodes if not (e.method == "lac" and e.task == 3)]
    first = table(replace(done, episodes=kept), "Table 1: success")
    assert [row[0] for row in first.rows] == ["Dense", "LAC *"]
    assert flagged(first) == ["Dense", "LAC *"], "by the numbers, of those that there are"
    assert "* incomplete: LAC: 2 of 4 trials" in first.notes
    assert incomplete(replace(done, episodes=kept)).startswith("1 rows, marked *")
    never = table(replace(done, table_1=(*done.table_1, MOTION)), "Table 1: success")
    assert set(cells(never, "Motion *").values()) == {"Motion *", "-"}


def test_dense_and_lac_may_have_more_seeds(config: ReproduceConfig) -> None:
    FakeEnv.seeds.clear()
    done = reproduce(replace(config, policies=("lac",), more_seeds=(1, 2), trials=1))
    assert {e.seed for e in done.episodes} == {0}
    assert {(e.method, e.seed) for e in done.seeds} == {(m, seed) for m in ("dense", "lac") for seed in range(3)}
    assert FakeEnv.seeds == sorted(FakeEnv.seeds), "one seed after the other"
    assert set(FakeEnv.seeds) == {0, 1, 2}, "the scenes' seeds, too"
    seeds = table(done, "Dense and LAC with seeds 0, 1, 2")
    assert [row[1].split()[0] for row in seeds.rows] == ["6/6", "6/6"]
    assert seeds.rows[1][2].startswith("±0.0")
    assert any("Pairs: lac 6." in note for note in seeds.notes)
    lost = [e for e in done.seeds if e.method == "dense" or e.seed < 2]
    assert table(replace(done, seeds=lost), "Dense and LAC").rows[1][0] == "LAC *"
    for wrong in ({"more_seeds": (0,)}, {"more_seeds": (1, 1)}):
        with pytest.raises(InputError, match="every seed once"):
            replace(config, **wrong)
    with pytest.raises(InputError, match="leave lac among the policies"):
        plan(replace(config, policies=("random:ratio=0.25",), more_seeds=(1,)))


def test_the_curve_runs_each_ratio_once_and_apart(config: ReproduceConfig) -> None:
    config = replace(config, policies=("lac", "random:ratio=0.25"), trials=1, curve=True, ratios=(0.25, 0.5))
    made = FakeEnv.made
    done = reproduce(config)
    assert [row.method for row in done.curve] == ["random-0.5", "lac-0.25", "lac-0.5"], "random-0.25 is a row already"
    assert {e.method for e in done.episodes} == {"dense", "lac", "random-0.25", "random-0.5", "lac-0.25", "lac-0.5"}
    methods = {line[0] for line in outcomes(config.folder("libero_spatial", curve=True))}
    assert methods == {"random-0.5", "lac-0.25", "lac-0.5"}
    assert FakeEnv.made > made
    assert all("ratio" in spec for _, spec in CURVE)
    for nothing in ("fastv", "random:ratio=0.25", "motion"):
        with pytest.raises(InputError, match=f"no further points of '{nothing}'"):
            plan(replace(config, curve_policies=(nothing,)))
    for words, chosen in (
        (("lac",), ["lac-0.25", "lac-0.5"]),
        (("random-0.5", "random:ratio=0.75"), ["random-0.5", "random-0.75"]),
    ):
        assert [row.method for row in plan(replace(config, curve_policies=words)).curve] == chosen


def test_the_curve_compares_points_on_the_same_episodes(config: ReproduceConfig) -> None:
    done = reproduce(replace(config, curve=True, ratios=(0.5,), curve_trials=1))
    assert {e.init_state for e in done.episodes if e.method == "random-0.25"} == {4, 5}
    assert {(e.method, e.init_state) for e in done.curve_episodes} == {
        (method, 4) for method in ("dense", "lac", "random-0.25", "random-0.5", "lac-0.5")
    }
    assert not incomplete(done)
    lost = [e for e in done.episodes if not (e.method == "lac-0.5" and e.task == 3)]
    assert incomplete(replace(done, episodes=lost)).startswith("1 rows, marked *")
    for wrong in ({"curve_trials": -1}, {"curve_trials": 3}, {"stress_trials": 3}):
        with pytest.raises(InputError, match="give 0 to 2, the trials"):
            replace(config, **wrong)


def test_stresses_have_a_table_of_their_own(config: ReproduceConfig) -> None:
    stresses = ("drift", "long")
    config = replace(config, stresses=stresses, stress_policies=("lac",), stress_trials=1)
    done = reproduce(config)
    assert {e.method for e in done.episodes} == {"dense", "lac", "random-0.25"}, "undisturbed episodes alone"
    for name in stresses:
        found = [e for e in done.stressed if e.stress == name]
        assert {(e.method, e.task, e.init_state) for e in found} == {
            (method, task, 4) for method in ("dense", "lac") for task in (0, 3)
        }
        assert json.loads((config.folder("libero_spatial", stress=name) / "config.json").read_text())["stress"] == name
    shown = table(done, "Under stress")
    assert shown.headings == ("method", "undisturbed", *stresses, "all stresses", "net speed-up")
    assert [row[0] for row in shown.rows] == ["Dense", "LAC"]
    assert shown.rows[0][1:] == ("2/2", "2/2", "2/2", "4/4", "-")
    assert shown.rows[1][1].startswith("2/2\n")
    assert "×" in shown.rows[1][-1]
    assert any("Pairs: lac 4." in note for note in shown.notes)
    assert [note.split(" (")[0] for note in shown.notes[-2:]] == ["Stress 'drift'", "Stress 'long'"]
    less = replace(done, stressed=[e for e in done.stressed if e.stress == "drift" or (e.method, e.task) == ("lac", 0)])
    assert paper_tables(less)[-1].notes[-1] == "incomplete: 2 of the cells have fewer than 2 trials"
    dense, lac = (row[3:5] for row in paper_tables(less)[-1].rows)
    assert (dense, [words.split("\n")[0] for words in lac]) == (("-", "2/2"), ["1/1", "3/3"])
    longer = reproduce(replace(config, stresses=("long",), stress_policies=("random:ratio=0.5",), stress_trials=2))
    assert paper_tables(longer)[-1].rows[1][0] == "random-0.5"
    assert paper_tables(longer)[-1].rows[1][1].startswith("4/4\n"), "a method that no table has runs undisturbed, too"
    again = reproduce(replace(config, stresses=("long",), stress_policies=("random:ratio=0.5",)))
    assert [row[2].split("\n")[0] for row in paper_tables(again)[-1].rows] == ["2/2", "2/2"], "the same initial states"
    assert not any("incomplete" in note for note in paper_tables(again)[-1].notes)
    everyone = plan(replace(config, stress_policies=()))
    assert everyone.stress_rows == everyone.table_1
    for unasked in ({"stress_policies": ("lac",), "stresses": ()}, {"curve_policies": ("lac",), "curve": False}):
        with pytest.raises(InputError, match="nothing would be run"):
            replace(config, **unasked)
    with pytest.raises(InputError, match="choose one of shake"):
        plan(replace(config, stresses=("earthquake",)))
    with pytest.raises(InputError, match="every one once"):
        replace(config, stresses=("drift", "drift"))


def test_a_row_of_curve_and_stress_is_run_for_both(config: ReproduceConfig) -> None:
    """Under stress it is called by its method, on the curve by a label: one row all the same."""
    config = replace(config, curve=True, ratios=(0.5,), curve_trials=1)
    done = plan(replace(config, stresses=("long",), stress_policies=("random:ratio=0.5", "lac:ratio=0.5")))
    assert {row.method: done.trials(row) for row in done.extra_rows} == {"random-0.5": 2, "lac-0.5": 2}
    undisturbed = plan(config)
    assert {row.method: undisturbed.trials(row) for row in undisturbed.extra_rows} == {"random-0.5": 1, "lac-0.5": 1}


def record(method: str, init: int, success: bool, ms: float) -> EpisodeRecord:
    return EpisodeRecord(
        method, "libero_spatial", 0, "x", init, 0, success, 1, 220, latency_ms={"observation_to_action": [ms]}
    )


def race(workers: int = 1, **rows: tuple[int, float]) -> Reproduction:
    """A reproduction in which every row solved so many of ten, at so many milliseconds a call."""
    names = {"dense": DENSE, "lac": LAC, "motion": MOTION}
    episodes = [
        record(names[name].method, init, init < solved, ms) for name, (solved, ms) in rows.items() for init in range(10)
    ]
    rows_of_table = tuple(names[name] for name in rows)
    return Reproduction(ReproduceConfig(trials=1), rows_of_table, (), (), episodes, workers=workers)


@pytest.mark.parametrize(
    ("rows", "most", "fastest"),
    [
        ({"dense": (8, 20.0), "motion": (7, 11.0), "lac": (9, 10.0)}, ["LAC"], ["LAC"]),
        ({"dense": (8, 20.0), "motion": (9, 9.0), "lac": (8, 10.0)}, ["Motion"], ["Motion"]),
        ({"dense": (8, 20.0), "motion": (7, 9.0), "lac": (8, 10.0)}, ["Dense", "LAC"], ["Motion"]),
        ({"dense": (8, 20.0)}, [], []),
    ],
)
def test_who_solved_most_and_who_is_fastest_is_flagged(
    rows: dict[str, tuple[int, float]], most: list[str], fastest: list[str]
) -> None:
    assert flagged(table(race(**rows), "Table 1: success")) == most
    assert flagged(table(race(**rows), "Table 1: time")) == fastest


@pytest.mark.parametrize(
    ("lac", "best", "dominated"),
    [
        ({"lac": (9, 0.6)}, ["Dense", "LAC"], {"Motion": "LAC", "Random, 0.5": "LAC"}),
        ({"lac": (7, 0.8)}, ["Dense", "Motion", "LAC", "Random, 0.5"], {}),
        ({"lac": (7, 0.5)}, ["Dense", "Motion", "Random, 0.5"], {"LAC": "Motion"}),
        ({"lac": (8, 0.6)}, ["Dense", "Motion", "LAC", "Random, 0.5"], {}),
    ],
)
def test_points_of_the_curve_that_none_dominates_are_flagged(
    lac: dict[str, tuple[int, float]], best: list[str], dominated: dict[str, str]
) -> None:
    played = {"dense": (10, 0.0), "motion-0.8": (8, 0.6), "random-0.5": (9, 0.3), **lac}
    episodes = [
        replace(record(method, init, init < 40 + solved, 9.0), metrics={"ratio_effective": [ratio]})
        for method, (solved, ratio) in played.items()
        for init in range(40, 50)
    ]
    points = (Row("Random, 0.5", "random:ratio=0.5"),)
    curve = table(Reproduction(ReproduceConfig(), (DENSE, MOTION, LAC), (), points, episodes), "Trade-off curve")
    assert flagged(curve) == best
    assert {row[0]: row[-1] for row in curve.rows if row[-1] != "-"} == dominated


def test_latencies_of_several_processes_are_not_compared(config: ReproduceConfig) -> None:
    done = race(workers=2, dense=(8, 20.0), lac=(9, 10.0))
    assert flagged(table(done, "Table 1: time")) == []
    assert "processes" in flagged(table(done, "Setting"))
    reproduce(replace(config, trials=1))
    folder = config.folder("libero_spatial") / "config.json"
    folder.write_text(folder.read_text().replace('"workers": 1', '"workers": 2'))
    done = reproduce(config)
    assert done.workers == 2, "whatever this call had"
    assert "several processes are not worth comparing" in " ".join(table(done, "Table 1: time").notes)


def test_whose_figures_these_are() -> None:
    done = Reproduction(ReproduceConfig(), (DENSE, LAC), (), (), [record("dense", 0, True, 1.0)])
    setting = table(done, "Setting")
    assert cells(setting, "model")["value"].startswith("mini, 2.9 M parameters: not to be compared with the paper's")
    assert cells(setting, "rendering")["value"].startswith("fast")
    assert {"model", "rendering"} <= set(flagged(setting))
    official = Reproduction(ReproduceConfig(rendering="official"), (DENSE, LAC), (), (), done.episodes)
    assert cells(table(official, "Setting"), "rendering")["value"] == "official"
    assert "rendering" not in flagged(table(official, "Setting"))


@pytest.mark.parametrize(
    ("settings", "stage1", "label", "spec"),
    [
        ({}, 100, "All parts, trained anew (mine)", "mine@lac:path={}"),
        ({}, 0, "Without stage I (mine)", "mine@lac:path={}"),
        ({"language": True}, 100, "Language-guided (mine)", "mine@lac:path={}"),
        ({"ratio": 0.8}, 100, "Selector alone (mine)", "mine@lac:path={},recovery=0"),
        ({"inputs": "paper", "flow": "none"}, 9, "Without flow, the paper's inputs (mine)", "mine@lac:path={}"),
    ],
)
def test_trained_variants_are_named_by_what_they_lack(
    tmp_path: Path, settings: dict[str, Any], stage1: int, label: str, spec: str
) -> None:
    policy = LACPolicy(LACConfig({"agentview": (2, 2)}, **settings))
    policy.save_pretrained(tmp_path / "mine" / "policy", about={"training": {"stage1_steps": stage1}})
    assert ablation_row(tmp_path / "mine") == Row(label, spec.format(tmp_path / "mine"))
    assert ablation_row(tmp_path / "mine" / "policy").label == label


def test_a_folder_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no policy"):
        plan(ReproduceConfig(ablations=(tmp_path,)))
    with pytest.raises(InputError, match="trial"):
        ReproduceConfig(trials=0)


def test_nothing_of_the_machine_is_written(config: ReproduceConfig) -> None:
    reproduce(replace(config, trials=1))
    for path in config.out.rglob("*.json"):
        assert str(config.out.parent) not in json.dumps(json.loads(path.read_text()))


def test_the_tables_fit_a_terminal(config: ReproduceConfig) -> None:
    done = reproduce(replace(config, policies=("lac", "lac-predictor"), trials=1))
    out = io.StringIO()
    for found in paper_tables(done):
        Console(file=out, width=80).print(found.to_terminal())
    text = out.getvalue()
    assert "…" not in text
    assert all(row.label in text for row in done.rows)
