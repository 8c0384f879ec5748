"""The command line: every verb explains itself, and errors say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from lac_vla.cli import main

OPTIONS = {
    "demo": ("--out", "--tasks", "--episodes", "--policies", "--workers"),
    "eval": (
        *("--model", "--out", "--policies", "--suite", "--rendering", "--convention", "--tasks", "--init-states"),
        *("--stress", "--ensemble", "--actions-per-call", "--videos", "--server", "--workers", "--ray"),
        *("--device", "--options", "--image-pipeline", "--flow", "--max-age", "--seed", "--threads"),
    ),
    "reproduce": ("--out", "--suites", "--curve", "--stresses", "--ablations", "--device", "--threads", "--seed"),
    "check": ("--suite", "--tasks"),
    "bench": ("--sections", "--replay", "--camera", "--state-key"),
    "report": ("--out",),
    "collect": ("--suite", "--init-states", "--out", "--dataset"),
    "train": ("--dataset", "--out", "--loss", "--minutes", "--camera", "--state-key", "--action-key"),
    "pretrain": ("--dataset", "--out", "--minutes"),
    "serve": ("--model", "--policy", "--host", "--port"),
    "view": (),
}
"""Verb → options that README and documents use."""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out + captured.err


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "--help")
    assert code == 0
    assert all(verb in text for verb in OPTIONS)


@pytest.mark.parametrize("verb", OPTIONS)
def test_every_verb_explains_its_options(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, text = run(capsys, verb, "--help")
    assert code == 0
    explained = {word.strip(",") for word in text.split() if word.startswith("--")}
    assert set(OPTIONS[verb]) <= explained


def test_the_suite_decides_which_options_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    _, libero = run(capsys, "eval", "--help")
    for suite in (("--suite", "simpler-vm"), ("--suite=simpler-widowx",)):
        code, text = run(capsys, "eval", *suite, "--help")
        assert code == 0
        for option in ("--backend", "--python", "--assets", "--ray-tracing", "--timeout-s", "--retries"):
            assert option in text
            assert option not in libero
        assert "--rendering" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "nowhere"),
        (("eval", "--model", "nowhere", "--out", "run", "--policies", "quick"), "unknown policy 'quick'"),
        (("eval", "--model", "nowhere", "--out", "run", "--suite", "libero_100"), "unknown suite"),
        (("eval", "--model", "nowhere", "--out", "run", "--stress", "rain"), "choose one of shake, lighting"),
        (("eval", "--model", "nowhere", "--out", "run", "--flow", "raft"), "error: unknown flow 'raft'"),
        (("eval", "--model", "x", "--out", "run", "--suite", "simpler-vm", "--retries", "-1"), "error: retries must"),
        (("check", "--tasks", "10"), "libero_spatial has tasks 0..9"),
        (("simpler", "--check"), "simpler is called eval --suite simpler-vm"),
        (("eval", "--setup", "vm"), "--setup is called --suite now"),
        (("eval", "--vla=x"), "--vla is called --model now"),
        (("reproduce", "libero", "--policies", "quick"), "unknown policy 'quick'"),
        (("serve", "--model", "nowhere", "--policy", "dense", "--host", "0.0.0.0"), "reachable from other machines"),
        (("serve", "--model", "nowhere", "--policy", "dense"), "nowhere"),
        (("serve", "--model", "nowhere", "--port", "99999"), "0..65535"),
        (("view", "ws://127.0.0.1:1"), "start one with: lac serve"),
        (("view", "ftp://127.0.0.1:8000"), "ws://HOST:PORT"),
        (("bench", "--random-weights", "llama", "--sections", "frame"), "llama"),
    ],
)
def test_errors_are_sentences(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run(capsys, *arguments)
    assert code == 2
    assert message in text
    assert "Traceback" not in text
