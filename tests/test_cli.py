"""The command line: every verb explains itself, and errors say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from rich.table import Table

from lac_vla import cli
from lac_vla.cli import main
from lac_vla.errors import InputError, MissingExtraError

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
    "serve": ("--model", "--policy", "--host", "--port", "--warmup"),
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


TEXTS = ["[red]box", "run[/b]", "[/bold]x", '"lac-vla[ray]"', ":warning: [link=x]y", "[", "a\\[b]"]


@pytest.mark.parametrize("text", TEXTS)
def test_errors_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def fail(suite: str | None) -> None:
        raise InputError(f"there is no {text}")

    monkeypatch.setattr(cli, "_verbs", fail)
    assert run(capsys, "report") == (2, f"error: there is no {text}\n")


def test_verbs_that_need_no_extra_run_without_one(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('pyarrow', 'av', 'jinja2', 'msgpack', 'websockets', 'simplejpeg'): sys.modules[name] = None\n"
        "from lac_vla.cli import main\n"
        f"main('bench --random-weights tiny --sections roofline --roofline h100 --out {tmp_path}'.split())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert (tmp_path / "bench.json").is_file()


@pytest.mark.parametrize("extra", ["ray", "serve", "data"])
def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    def fail(suite: str | None) -> None:
        raise MissingExtraError(extra, "This")

    monkeypatch.setattr(cli, "_verbs", fail)
    assert f'pip install "lac-vla[{extra}]"' in run(capsys, "report")[1]


@pytest.mark.parametrize("text", ["[red]box", "x[/b]", "[/bold]x"])
@pytest.mark.parametrize(
    "verb", [("report",), ("eval", "--out", "o", "--model"), ("train", "--model", "mini", "--out", "o", "--dataset")]
)
def test_words_of_the_user_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    verb: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed = run(capsys, *verb, text)
    assert code == 2
    assert text in printed


@pytest.mark.parametrize("text", TEXTS)
def test_tables_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], text: str) -> None:
    table = Table("method", title=text)
    table.add_row(text)
    cli.console.print(table)
    assert capsys.readouterr().out.count(text) == 2


def test_no_words_at_all_are_no_crash(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys)
    assert code == 2
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "words", [("report", "~/run"), ("report", "x", "--out=~/run"), ("report", "x", "--out", "~/run")]
)
def test_a_home_that_the_shell_left_is_written_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given: list[Path | None] = []

    def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
        given.extend((*runs, out))

    monkeypatch.setattr(cli, "_verbs", lambda suite: {"report": report, "other": report})
    main(list(words))
    assert tmp_path / "run" in given


@pytest.mark.parametrize("verb", ["train", "eval", "bench", "serve"])
def test_help_in_a_terminal_of_plain_ascii(verb: str) -> None:
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    code = f"from lac_vla.cli import main; main(['{verb}', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert b"--" in done.stdout


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
        (("serve", "--model", "mini", "--policy", "dense", "--device", "gpu"), "unknown device 'gpu'"),
        (("serve", "--model", "mini", "--policy", "dense", "--max-age", "1000000000"), "max_age is 1000000000"),
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
