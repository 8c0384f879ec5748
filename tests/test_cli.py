"""The command line: every verb explains itself, and errors say what to do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from rich.console import Console
from rich.table import Table

import lac_vla
from lac_vla import cli, plugins
from lac_vla.bundled import BUNDLED
from lac_vla.cli import main
from lac_vla.cli.help import options_of
from lac_vla.cli.output import folded
from lac_vla.cli.verbs import VERBS, function_of
from lac_vla.datasets.writer import DatasetWriter
from lac_vla.errors import InputError, MissingExtraError
from lac_vla.models import FAMILIES
from lac_vla.policies import POLICIES
from lac_vla.sims.libero.benchmark import Libero

OPTIONS = {
    "demo": ("--out", "--tasks", "--episodes", "--policies", "--workers"),
    "eval": (
        *("--model", "--out", "--policies", "--suite", "--rendering", "--convention", "--tasks", "--init-states"),
        *("--stress", "--ensemble", "--actions-per-call", "--videos", "--server", "--workers", "--ray"),
        *("--device", "--options", "--image-pipeline", "--flow", "--max-age", "--seed", "--threads"),
    ),
    "reproduce": ("--out", "--suites", "--curve", "--stresses", "--ablations", "--device", "--threads", "--seed"),
    "check": ("--suite", "--tasks"),
    "replay": ("--dataset", "--policies", "--baseline", "--store", "--held-out"),
    "bench": ("--sections", "--replay", "--camera", "--state-key"),
    "report": ("--out",),
    "collect": ("--suite", "--init-states", "--out", "--dataset"),
    "train": ("--dataset", "--out", "--loss", "--minutes", "--camera", "--state-key", "--action-key"),
    "pretrain": ("--dataset", "--out", "--minutes"),
    "serve": ("--model", "--policy", "--host", "--port", "--warmup"),
    "view": (),
    "policies": (),
    "models": (),
}
"""Verb → options that README and documents use."""


LONG = 300 * "x"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out + captured.err


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "--help")
    assert code == 0
    assert all(verb in text for verb in OPTIONS)


def test_help_is_there_at_once_and_without_torch() -> None:
    code = (
        "import sys, time; from lac_vla.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, time.process_time())"
    )
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    last = [run.stdout.splitlines()[-1].split() for run in done]
    assert {torch for torch, _ in last} == {"False"}
    assert min(float(seconds) for _, seconds in last) <= 0.7


def test_a_module_that_can_be_run_tells_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "lac_vla", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lac-vla {lac_vla.__version__}\n"


def test_all_names_of_the_package_are_found_when_they_are_used() -> None:
    assert all(getattr(lac_vla, name).__module__.startswith("lac_vla.") for name in lac_vla.__all__)
    assert set(lac_vla.__all__) <= set(dir(lac_vla))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lac_vla.nothing


@pytest.mark.parametrize("verb", VERBS)
def test_help_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """An example whose options there are, first what most need, every option explained, plain text of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    _, text = run(capsys, verb, "--help")
    example = text.split("example:\n")[1].split("\n")[0].strip()
    assert example == VERBS[verb].example
    assert example.split()[:2] == ["lac", verb]
    options = options_of(function_of(verb, [])[0])
    flags = {flag for option in options for flag in (option.flag, f"--no-{option.flag[2:]}")}
    assert {word for word in example.split() if word.startswith("--")} <= flags
    assert {*VERBS[verb].basic} <= {option.name for option in options}
    assert not [option.name for option in options if not option.text]
    assert max(map(len, text.splitlines())) <= 80
    assert "``" not in text
    assert ":mod:" not in text
    assert "(default: )" not in text
    if "advanced options:" in text:
        basic = text.split("\noptions:\n")[1].split("advanced options:")[0]
        assert all(option.flag in basic for option in options if option.required or option.name in VERBS[verb].basic)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evla",), "there is no 'lac evla' (did you mean 'eval'?)"),
        (("train", "--modle", "mini"), "lac train has no --modle (did you mean '--model'?)"),
        (("eval", "--modle", "mini"), "lac eval has no --modle (did you mean '--model'?)"),
        (("bench", "--camera=a=b", "--round=3"), "lac bench has no --round (did you mean '--rounds'?)"),
        (("policies", "mtion"), "unknown policy 'mtion' (did you mean 'motion'?)"),
    ],
)
def test_typing_errors_are_answered_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, text = run(capsys, *words)
    assert code == 2
    assert message in text


def test_the_lists_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    main(["policies"])
    text = capsys.readouterr().out
    for name in POLICIES:
        assert all(f"\n           {option}" in text for option in plugins.options_of(POLICIES[name]))
        assert f"{name} " in text
    main(["policies", "motion"])
    assert "ratio=0.5" in capsys.readouterr().out
    main(["models"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*BUNDLED, *FAMILIES))


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
    "words",
    [["report", LONG], ["bench", "--model", "mini", "--replay", LONG], ["eval", "--model", "mini", "--out", LONG]],
)
def test_names_that_the_system_refuses(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    code, text = run(capsys, *words)
    assert code == 2
    assert "File name too long" in text
    assert len(text) < 1000


TEXTS = ["[red]box", "run[/b]", "[/bold]x", '"lac-vla[ray]"', ":warning: [link=x]y", "[", "a\\[b]"]


@pytest.mark.parametrize("text", TEXTS)
def test_errors_are_printed_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def fail(verb: str, words: list[str]) -> None:
        raise InputError(f"there is no {text}")

    monkeypatch.setattr(cli, "function_of", fail)
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
    def fail(verb: str, words: list[str]) -> None:
        raise MissingExtraError(extra, "This")

    monkeypatch.setattr(cli, "function_of", fail)
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


@pytest.mark.parametrize("width", [40, 70, 200])
def test_a_table_that_is_too_wide_is_divided_and_no_cell_is_cut(width: int) -> None:
    headings, cells = ("method", "decoder prefill", "faster than stock", "than dense so equipped"), "1.36× [1.10, 1.34]"
    table = Table(*headings, title="times", caption="of a frame")
    for method in ("dense stock", "lac +default"):
        table.add_row(method, *[cells] * 3)
    printer = Console(width=width, file=io.StringIO())
    parts = list(folded(table, width))
    for part in parts:
        printer.print(part)
    text = printer.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count(cells) == 6
    assert text.count("lac +default") == len(parts) == {40: 3, 70: 2, 200: 1}[width]
    assert text.count("times") == text.count("of a frame") == 1


TRAIN = "train --model mini --dataset logs --camera agentview=front wrist=front --out run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{TRAIN} --start nowhere", "there is no policy at nowhere"),
        (f"{TRAIN} --window 90", "no episode has 90 consecutive frames"),
        ("pretrain --dataset logs --camera agentview=front wrist=front --start nowhere --out run", "no folder nowhere"),
        ("bench --lerobot --quick --out deep/run", "leave out --lerobot"),
        ("eval --model mini --policies dense --tasks 0 --out deep/block", 'lac-vla[libero]"'),
    ],
)
def test_what_is_refused_leaves_no_files_and_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, message: str
) -> None:
    """Nothing of a data set is read or stored, and no simulator is waited for, before all is known to fit."""

    def absent(benchmark: Libero, task: int) -> None:
        raise MissingExtraError("libero", "LIBERO")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Libero, "make_env", absent)
    with DatasetWriter(Path("logs"), 10) as logs:
        for _ in range(2):
            images = {"front": np.zeros((8, 32, 32, 3), np.uint8)}
            logs.add_episode(images, np.zeros((8, 8), np.float32), np.zeros((8, 7), np.float32), "pick it up")
    before = sorted(tmp_path.rglob("*"))
    code, text = run(capsys, *words.split())
    assert code == 2
    assert message in text
    assert "%|" not in text
    assert sorted(tmp_path.rglob("*")) == before


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

    monkeypatch.setattr(cli, "function_of", lambda verb, words: (report, words))
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
