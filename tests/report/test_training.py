from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lac_vla.cli import main
from lac_vla.errors import InputError
from lac_vla.report import build_training_report
from lac_vla.report.training import training_table
from lac_vla.report.training_run import TrainingRun, read_metrics
from tests.report.pages import Page, check_self_contained, dump_dom, needs_browser

CONFIG = {
    "model": "checkpoints/mini",
    "dataset": "libero_<spatial>",
    "out": "run",
    "loss": "distill",
    "lam": 0.1,
    "target_ratio": 0.75,
    "stage1_steps": 20,
    "stage2_steps": 30,
    "tau_ratio": [1.0, 0.5],
    "fixed_ratio": 0.0,
    "episodes": 0,
    "unheard_of": 12,
}
ABOUT = {
    "frames": 1234,
    "episodes": 56,
    "trained_with": {
        "created": "2025-03-01T12:00:00+00:00",
        "command": "lac train --model mini",
        "versions": {"torch": "2.13.0"},
        "hardware": {"processor": "A Processor", "cores": 2},
    },
}


def aligned(step: int, loss: float = 0.2) -> dict[str, Any]:
    return {"step": step, "stage": 1, "seconds": float(step), "loss": loss, "gradient": 0.5}


def joint(step: int, task: float = 0.4) -> dict[str, Any]:
    ratios = {"chosen_ratio": 0.5, "expected_ratio": 0.52, "lam": 0.1 + step / 100}
    return {"step": step, "stage": 2, "seconds": float(step), "loss": task - 0.1, "task": task, **ratios, "gradient": 1}


def held_out(step: int, task: float = 0.3) -> dict[str, Any]:
    ratios = {"held_out_chosen_ratio": 0.71, "held_out_expected_ratio": 0.66}
    row = {"step": step, "stage": 2, "seconds": float(step), "held_out_task": task, **ratios}
    return {**row, "held_out_alignment": 0.05}


STAGE_1 = [aligned(10), aligned(20, 0.1), {"step": 20, "stage": 1, "seconds": 20.0, "held_out_alignment": 0.09}]
WHOLE = [*STAGE_1, joint(30), joint(40, 0.3), joint(50, 0.2), held_out(50, 0.0123)]


def save_pictures(folder: Path) -> None:
    scores = {"front": np.full((3, 4, 4), 0.25, np.float32), "wrist": np.full((3, 2, 2), 0.75, np.float32)}
    arrays: dict[str, Any] = {"ratio": np.full(3, 0.5)}
    for camera, score in scores.items():
        arrays[f"image_{camera}"] = np.full((3, 16, 16, 3), 100, np.uint8)
        arrays[f"score_{camera}"] = score
        arrays[f"mask_{camera}"] = np.full(score.shape, camera == "wrist")
    np.savez_compressed(folder / "saliency.npz", **arrays)


def save(
    folder: Path, rows: list[dict[str, Any]], *, config: Mapping[str, Any] = CONFIG, finished: bool = True
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "policy").mkdir()
        (folder / "policy" / "config.json").write_text(json.dumps({"about": ABOUT}))
        save_pictures(folder)
    return folder


def shown(run: Path) -> tuple[Page, str]:
    """The run's page, and its text on one line."""
    page = Page(build_training_report(run, run / "report.html").read_text(encoding="utf-8"))
    return page, " ".join(page.text.split())


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = save(tmp_path_factory.mktemp("outputs") / "lac-run", WHOLE)
    return build_training_report(run, run / "deep" / "report.html")


@pytest.fixture(scope="module")
def text(html: Path) -> str:
    return " ".join(Page(html.read_text(encoding="utf-8")).text.split())


def test_it_says_what_was_trained_on_what(text: str) -> None:
    assert (
        "LAC, a selector and a ratio predictor, learned which visual tokens of checkpoints/mini to recompute on 1,234 "
        "frames of 56 episodes of libero_<spatial>, seen through front (4×4 tokens) and wrist (2×2 tokens), in 50 of "
        "50 steps and 0.8 minutes; the model itself stayed as it was."
    ) in text


def test_the_last_numbers_are_shown(text: str) -> None:
    for part in ("0.0123", "71 %", "target 75 %", "0.05", "A Processor", "lac train --model mini", "2.13.0"):
        assert part in text
    for part in ("Not finished", "not begun", "nothing noted"):
        assert part not in text
    assert "λ, steered" in text


def test_settings_are_shown_but_for_the_places_of_files(html: Path) -> None:
    page = Page(html.read_text(encoding="utf-8"))
    assert page.row("tau ratio")[1] == "1.0, 0.5"
    assert page.row("stage2 steps")[1] == "30"
    assert page.row("unheard of")[1] == "12"
    assert all(row[0] != "out" for row in page.rows if row)


def test_saliency_is_shown_for_every_camera(html: Path, text: str) -> None:
    page = Page(html.read_text(encoding="utf-8"))
    assert page.tags.count("img") == 2
    assert "3 consecutive frames" in text
    assert "score, 0.25 or less to 0.75 or more" in text
    assert "80 % of the tokens are reused" in text, "48 of 60"


def test_nothing_is_loaded_from_elsewhere(html: Path) -> None:
    check_self_contained(html)


@needs_browser
def test_a_browser_shows_the_page_within_its_width(html: Path, tmp_path: Path) -> None:
    dom = dump_dom(html, tmp_path)
    assert dom.count("<polyline") == 2 + 2 + 4 + 2
    assert re.search(r'<html[^>]*data-overflow="false"', dom), "the page is wider than 1280 pixels"


def test_without_a_target_lambda_is_not_shown(tmp_path: Path) -> None:
    _, text = shown(save(tmp_path / "run", WHOLE, config={**CONFIG, "target_ratio": 0.0}))
    assert "λ, steered" not in text


def test_a_fixed_ratio_has_no_predictor(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if "expected" not in key} for row in WHOLE]
    _, text = shown(save(tmp_path / "run", rows, config={**CONFIG, "fixed_ratio": 0.7}))
    assert "a selector at a fixed cache ratio of 70 %" in text
    assert "expected, held out -" in text
    assert "λ, steered" not in text


def test_the_predictors_own_steps_are_shown(tmp_path: Path) -> None:
    """Loss, what every candidate costs, and the share of each, by step."""
    costs = {f"held_out_costs_{name}": value for name, value in (("ratio", 0.88), ("divergence", 0.0012))}
    costs |= {f"held_out_costs_divergence_{name}": 1e-3 * k for k, name in enumerate(("best", "fixed", "at_0.8"), 1)}
    costs |= {"held_out_costs_divergence_at_0.9": 0.0075, "held_out_costs_divergence_at_0": 0.0}
    shares = {"held_out_share_0": 0.0, "held_out_share_0.8": 0.25, "held_out_share_0.9": 0.75}
    rows = [{"step": 60, "stage": 4, "seconds": 60.0, "loss": 0.61, "lam": 0.01, "gradient": 1.0}]
    rows += [{"step": 60, "stage": 4, "seconds": 60.0, **costs, **shares}]
    text = shown(save(tmp_path / "run", [*WHOLE, *rows], config={**CONFIG, "predictor_steps": 10}))[1].replace(" ", "")
    assert "Lossofthepredictor'sownsteps" in text
    assert "training0.61" in text
    assert "divergence0.0075plusλ·activetokens0.0085chosen0.0012inhindsight0.001" in text
    assert "80%25%90%75%" in text
    assert "Ratios chosen, held out" not in shown(save(tmp_path / "without", WHOLE))[1]


def test_a_resume_supersedes_what_it_replays(tmp_path: Path) -> None:
    killed = [*STAGE_1, joint(30), held_out(30, 0.5), joint(40, 9.0), joint(50, 9.0)]
    resumed = [joint(40, 0.3), held_out(40, 0.2)]
    run = TrainingRun.read(save(tmp_path / "run", [*killed, *resumed]))
    assert run.curve("task") == [(30, 0.4), (40, 0.3)]
    assert run.curve("held_out_task") == [(30, 0.5), (40, 0.2)]
    assert run.step == 40, "step 50 is to be done again"
    assert run.curve("loss", stage=1) == [(10, 0.2), (20, 0.1)]


def test_the_same_step_again_replaces_its_row(tmp_path: Path) -> None:
    run = TrainingRun.read(save(tmp_path / "run", [*STAGE_1, joint(30, 9.0), joint(30, 0.4), held_out(30)]))
    assert run.curve("task") == [(30, 0.4)]
    assert run.last("held_out_task") == 0.3


def test_a_line_without_its_end_is_not_counted(tmp_path: Path) -> None:
    run = save(tmp_path / "run", WHOLE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "sta')
    assert TrainingRun.read(run).step == 50


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"metrics\.jsonl, line 2"),
        ("[1, 2]", "line 2: no JSON object"),
        ('{"stage": 1, "loss": 0.1}', "line 2: no step"),
        ('{"step": 1, "stage": 5}', "line 2: no step, or no stage"),
        ('{"step": 1, "stage": 1, "loss": "low"}', "line 2: loss is 'low', no number"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(aligned(10)) + f"\n{line}\n" + json.dumps(aligned(20)) + "\n")
    with pytest.raises(InputError, match=message):
        read_metrics(path)


def test_what_is_not_finite_was_not_measured(tmp_path: Path) -> None:
    rows = [*STAGE_1, {**joint(30), "task": float("nan"), "gradient": float("inf"), "lam": None}]
    run = TrainingRun.read(save(tmp_path / "run", rows))
    assert run.curve("task") == []
    assert run.curve("gradient") == [(10, 0.5), (20, 0.5)]
    assert run.last("lam") is None


def test_a_run_in_stage_1_says_so(tmp_path: Path) -> None:
    _, text = shown(save(tmp_path / "run", STAGE_1))
    assert "Not finished: 20 of 50 steps" in text
    assert "Stage II has not begun" in text
    assert "Chosen ratio, held out - target 75 %" in text
    assert "nothing noted yet" in text


def test_a_run_that_has_just_begun_says_so(tmp_path: Path) -> None:
    page, text = shown(save(tmp_path / "run", [], finished=False))
    for part in ("metrics.jsonl is empty", "There is no saliency.npz yet", "no policy was saved yet", "0 of 50 steps"):
        assert part in text
    assert "svg" not in page.tags
    assert "img" not in page.tags
    assert "nan" not in text.lower().split()
    check_self_contained(tmp_path / "run" / "report.html")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = save(tmp_path / "run", WHOLE)
    whole = (run / "saliency.npz").read_bytes()
    (run / "saliency.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"saliency\.npz cannot be read"):
        TrainingRun.read(run)
    np.savez(run / "saliency.npz", image_front=np.zeros((2, 8, 8, 3), np.uint8), score_front=np.zeros((3, 2, 2)))
    with pytest.raises(InputError, match=r"saliency\.npz cannot be read"):
        TrainingRun.read(run)
    other = save(tmp_path / "other", WHOLE, config={"coarse_samples": 3}, finished=False)
    with pytest.raises(InputError, match="no settings of 'lac train'"):
        TrainingRun.read(other)
    (other / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        TrainingRun.read(other)


def test_the_terminal_shows_where_the_run_stands(tmp_path: Path) -> None:
    whole = training_table(TrainingRun.read(save(tmp_path / "run", WHOLE)))
    assert whole.rows == (("50/50", "0.0123", "71 %", "66 %", "0.8"),)
    new = training_table(TrainingRun.read(save(tmp_path / "new", [], finished=False)))
    assert new.rows == (("0/50", "-", "-", "-", "-"),)


def test_the_command_tells_runs_apart(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    main(["report", str(save(tmp_path / "run", WHOLE))])
    assert "training report" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    main(["report", str(run_dir), "--out", str(page)])
    assert "evaluation report" in page.read_text(encoding="utf-8")
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "empty")])
    error = capsys.readouterr().out
    assert "episodes.jsonl" in error
    assert "metrics.jsonl" in error


def test_training_ends_with_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save(tmp_path / "run", WHOLE)
    monkeypatch.setattr("lac_vla.training.train.train", lambda config, max_seconds: config.out / "policy")
    command = ["train", "--model", "mini", "--dataset", "demos", "--out", str(run)]
    monkeypatch.setenv("RANK", "1")
    main(command)
    assert not (run / "report.html").exists(), "under torchrun the first process writes it"
    monkeypatch.setenv("RANK", "0")
    main(command)
    assert (run / "report.html").exists()
    (run / "report.html").unlink()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    capsys.readouterr()
    main(command)
    assert 'optional dependencies "report"' in capsys.readouterr().out
    assert not (run / "report.html").exists()
