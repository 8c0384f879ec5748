"""The original's process: the real server file and the real client around a fake simulator, well and badly behaved."""

from __future__ import annotations

import dataclasses
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.sims import fakes

from lac_vla.errors import InputError
from lac_vla.sims.base import SimulatorError
from lac_vla.sims.simpler import ms2_server
from lac_vla.sims.simpler.actions import GoogleActions, WidowXActions
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.episode import Layout
from lac_vla.sims.simpler.ms2 import Ms2Backend
from lac_vla.sims.simpler.protocol import episodes, tasks

STILL = np.zeros(7)
APPLE = len(tasks("vm")) - 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = fakes.install(tmp_path / "fake")
    monkeypatch.setenv("PYTHONPATH", str(found))
    return found


@pytest.fixture
def backend(folder: Path) -> Iterator[Ms2Backend]:
    made = fakes.backend(folder, timeout_s=4.0)
    yield made
    made.close()


def test_messages_come_back_as_they_were() -> None:
    def reader(data: bytes) -> Any:
        parts = iter([data])
        rest = [next(parts)]

        def read(n: int) -> bytes:
            got, rest[0] = rest[0][:n], rest[0][n:]
            if len(got) < n:
                raise EOFError
            return got

        return read

    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-1]  # not contiguous
    message, array = ms2_server.unpack(reader(ms2_server.pack({"text": "Ä"}, image)))
    assert message == {"text": "Ä"}
    np.testing.assert_array_equal(array, image)
    assert ms2_server.unpack(reader(ms2_server.pack({}))) == ({}, None)
    with pytest.raises(EOFError):
        ms2_server.unpack(reader(ms2_server.pack({}, image)[:-1]))
    for wrong in (b"a line that a library printed", struct.pack("<4sII", b"LACS", 1 << 30, 0)):
        with pytest.raises(ValueError, match="something else"):
            ms2_server.unpack(reader(wrong))


def test_nothing_is_pickled() -> None:
    with pytest.raises(ValueError, match="only uint8 and float64"):
        ms2_server.pack({}, np.array([{}], dtype=object))
    text = b'{"array": ["O8", [1]]}'
    evil = struct.pack("<4sII", b"LACS", len(text), 8) + text + bytes(8)
    position = iter((evil[:12], evil[12 : 12 + len(text)], evil[12 + len(text) :]))
    with pytest.raises(ValueError, match="arrays of O8 are not taken"):
        ms2_server.unpack(lambda n: next(position))
    for path in Path(ms2_server.__file__).parent.glob("*.py"):
        assert "import pickle" not in path.read_text(encoding="utf-8")
        assert "allow_pickle" not in path.read_text(encoding="utf-8")


def framed(text: str, data: bytes = b"") -> bytes:
    return struct.pack("<4sII", b"LACS", len(text), len(data)) + text.encode() + data


def tells(tmp_path: Path, answer: bytes) -> Ms2Backend:
    """A backend whose process says just this, whatever it is asked."""
    program = f"import sys, time; sys.stdout.buffer.write({answer!r}); sys.stdout.flush(); time.sleep(60)"
    return Ms2Backend((sys.executable, "-S", "-c", program), tmp_path, timeout_s=60.0)


SHOWN = '"grasped": true, "array": ["u1", [1, 1, 3]]}'


@pytest.mark.parametrize(
    ("text", "data", "said"),
    [
        ('"a string"', b"", "unintelligible"),
        ("5", b"", "unintelligible"),
        ("[" * 100_000, b"", "unintelligible"),
        ('{"ok": true}', b"", "unintelligible"),
        ('{"ok": true, "array": 7}', b"", "unintelligible"),
        ('{"ok": true, "array": ["u1", 3]}', b"abc", "unintelligible"),
        ('{"ok": true, "array": ["u1", [3, "x"]]}', b"abc", "unintelligible"),
        ('{"ok": true, "array": ["u1", [0, 1' + "0" * 30 + "]]}", b"", "unintelligible"),
        ('{"ok": true, "array": ["u1", [9]]}', b"abc", "unintelligible"),
        ('{"ok": true, "array": null}', b"", "without a picture"),
        ('{"ok": true, "success": true, ' + SHOWN, b"abc", "without 'instruction', str"),
        ('{"ok": true, "instruction": "go", "success": 1, ' + SHOWN, b"abc", "without 'success'"),
        ('{"ok": false, "array": null}', b"", "failed on 'reset'"),
        ('{"ok": false, "error": "ErrorExtensionNotPresent", "array": null}', b"", "make sim-simpler-original"),
    ],
)
def test_a_malformed_answer_is_the_simulators_failure(tmp_path: Path, text: str, data: bytes, said: str) -> None:
    backend = tells(tmp_path, framed(text, data))
    with pytest.raises(SimulatorError, match=said):
        backend.reset(episodes("widowx")[0])
    assert backend._process is None


def test_versions_that_are_none(tmp_path: Path) -> None:
    for versions in ('"versions": 5, ', ""):
        backend = tells(tmp_path, framed('{"ok": true, ' + versions + '"array": null}'))
        with pytest.raises(SimulatorError, match="without its versions"):
            backend.metadata()
        assert backend._process is None


def test_an_episode_through_the_pipe(backend: Ms2Backend, folder: Path) -> None:
    versions = backend.metadata()
    assert (versions["backend"], versions["sapien"]) == ("ms2", "2.2.2")
    first = backend.reset(episodes("vm")[0])  # the fake prints on standard output all the while
    assert first.image.shape == (8, 10, 3)
    assert first.image[1, 1, 0] == 100
    assert not first.success
    assert first.instruction == "open top drawer"
    second = backend.step(np.array([0.25, 0.5, 0, 0, 0, 0, 1]))
    assert (first.opening, second.opening) == (1.0, pytest.approx(0.9))
    assert second.image[0, 0].tolist() == [25, 50, 0]
    assert not second.grasped
    assert backend.step(STILL).grasped
    backend.reset(episodes("vm")[1])  # an environment of its own, in the same process
    with pytest.raises(InputError, match="of a WidowX's alone, not of 'coke can horizontal'"):
        backend.scene()
    assert len((folder / "made").read_text().splitlines()) == 2


def test_success_counts_at_the_last_step_and_instructions_change(backend: Ms2Backend) -> None:
    convert = GoogleActions(repeat=4)
    env = SimplerEnv("vm", APPLE, backend, convert)
    assert env.instruction == "apple in drawer"
    for horizon, solved in ((5, True), (6, False)):  # the fake's goal holds at steps 4 and 5
        env.horizon = horizon
        frame = env.reset(3)
        assert frame.timestamp == 0
        ends, words, grips = [], [frame.instruction], []
        for k in range(horizon):
            frame, success = env.step([0, 0, 0, 0, 0, 0, float(k == 0)])
            ends.append(success)
            words.append(frame.instruction)
            grips.append(convert._left)
        assert ends == [False] * (horizon - 1) + [solved]
        assert words[:4] == ["open top drawer"] * 3 + ["place apple into top drawer"]
        assert grips[:3] == [0, 3, 0]  # a command was given, and forgotten with its instruction
        assert frame.timestamp == pytest.approx(horizon / 3)
        assert env.instruction == "open top drawer"
        with pytest.raises(InputError, match="over"):
            env.step(STILL)
        assert env.outcome() == {
            "variant": "arm: plain",
            "success_any": True,
            "grasped": True,
            "ray_traced": True,
            "backend": "ms2",
            "stand_ins": [],
            "instructions": [[0, "open top drawer"], [3, "place apple into top drawer"]],
        }


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("crash", "died on 'step'; its last words: .*segmentation fault"),
        ("hang", "did not answer 'step' within 4 s"),
        ("raise", "failed on 'step': RuntimeError: the physics exploded"),
        ("scribble", "unintelligible"),
    ],
)
def test_after_a_failure_in_mid_episode_the_next_reset_starts_a_new_process(
    backend: Ms2Backend, folder: Path, order: str, said: str
) -> None:
    env = SimplerEnv("widowx", 0, backend, WidowXActions())
    env.reset(0)
    (folder / order).touch()
    env.step(STILL)
    env.step(STILL)
    process = backend._process
    assert process is not None
    started = time.monotonic()
    with pytest.raises(SimulatorError, match=f"(?s){said}"):
        env.step(STILL)
    assert time.monotonic() - started < 20
    assert process.poll() is not None  # nothing is left behind
    with pytest.raises(InputError, match="reset"):
        env.step(STILL)
    with pytest.raises(InputError, match="reset"):
        backend.step(STILL)
    env.reset(0)
    for _ in range(3):
        env.step(STILL)
    assert env.outcome()["grasped"]
    assert backend._process is not None
    assert backend._process.pid != process.pid


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("fall", r"begins with can at -18\.00 m, not on the table"),
        ("mutter", r"noted an error: .*failed to load stage\.glb"),
    ],
)
def test_an_episode_that_begins_wrong_is_none(backend: Ms2Backend, folder: Path, order: str, said: str) -> None:
    (folder / order).touch()
    with pytest.raises(SimulatorError, match=said):
        backend.reset(episodes("vm")[0])
    with pytest.raises(InputError, match="reset"):
        backend.step(STILL)
    backend.reset(episodes("vm")[0])
    backend.step(STILL)


def test_a_server_with_other_assets_is_refused(folder: Path, tmp_path: Path) -> None:
    with (folder / "mani_skill2_real2sim" / "__init__.py").open("a") as module:
        module.write('ASSET_DIR = "/elsewhere"\n')
    with pytest.raises(SimulatorError, match=r"uses the assets in /elsewhere, not those in .*data"):
        fakes.backend(folder).metadata()


def test_layouts_of_ours_are_for_the_port(backend: Ms2Backend) -> None:
    layout = Layout(((0.0, 0.0, 0.9),) * 2, ((1.0, 0.0, 0.0, 0.0),) * 2)
    with pytest.raises(InputError, match="--backend ms3"):
        backend.reset(dataclasses.replace(episodes("widowx")[0], place=layout))


def test_an_interpreter_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SimulatorError, match="interpreter"):
        Ms2Backend((str(tmp_path / "python"),), tmp_path).reset(episodes("vm")[0])
    monkeypatch.setenv("PYTHONPATH", "")
    with (
        pytest.raises(SimulatorError, match=r"ModuleNotFoundError.*mani_skill2_real2sim"),
    ):
        fakes.backend(tmp_path).metadata()


def test_a_step_before_a_reset(backend: Ms2Backend) -> None:
    with pytest.raises(InputError, match="reset"):
        backend.step(STILL)
    assert backend._process is None
