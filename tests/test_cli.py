"""The command line: every verb explains itself, and errors say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from lac_vla.cli import main

VERBS = ("demo", "eval", "reproduce", "simpler", "bench", "report", "collect", "train", "pretrain", "serve", "view")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out + captured.err


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "--help")
    assert code == 0
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, text = run(capsys, verb, "--help")
    assert code == 0
    assert "--" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "nowhere"),
        (("eval", "--model", "nowhere", "--out", "run", "--policies", "quick"), "unknown policy 'quick'"),
        (("eval", "--model", "nowhere", "--out", "run", "--suite", "libero_100"), "unknown suite"),
        (("eval", "--model", "nowhere", "--out", "run", "--stress", "rain"), "choose one of shake, lighting"),
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
