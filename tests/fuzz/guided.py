"""Fuzzing that is guided by what the code does: ``python -m tests.fuzz.guided TARGET [libFuzzer's options]``.

It needs atheris, and goes on until something other than the project's error comes out, or libFuzzer's limits are met.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tests.fuzz.mutations import mutate

CORPUS = Path(__file__).with_name("corpus")
"""A folder of inputs for each target, beside the whole one that a run begins with."""
TARGETS = {
    "message": ("", "request"),
    "dataset": ("dataset's descriptions", "data/meta/info.json"),
    "table": ("dataset's tables", "data/meta/tasks.parquet"),
    "video": ("dataset's videos", "data/videos/observation.images.front/chunk-000/file-000.mp4"),
    "log": ("evaluation's log", "episodes.jsonl"),
    "training": ("training", "metrics.jsonl"),
    "recording": ("recorded episode", "1.frames"),
    "staged": ("staged episode", ""),
    "state": ("training's state", "state.pt"),
    "policy": ("policy", "policy/config.json"),
    "weights": ("policy", "policy/policy.safetensors"),
    "model": ("openvla's descriptions", "config.json"),
}
"""What is fuzzed → its kind in :data:`tests.fuzz.kinds.KINDS`, and the file; by default the only one."""


def prepare(target: str, folder: Path) -> tuple[bytes, str, Callable[[bytes], object]]:
    """Make what a target reads in a folder; return a whole input, its file's name, and how an input is read."""
    kind_name, name = TARGETS[target]
    if not kind_name:
        from lac_vla.client.wire import pack, unpack
        from tests.fuzz.test_messages import KEYS, REQUEST

        return pack(REQUEST), name, lambda data: KEYS.frame(unpack(data, wanted=KEYS.wanted))
    from tests.fuzz.kinds import KINDS

    kind = KINDS[kind_name]
    folder.mkdir(exist_ok=True)
    kind.make(folder)
    file = folder / name if name else next(folder.iterdir())

    def read(data: bytes) -> None:
        file.write_bytes(data)
        kind.read(folder)

    return file.read_bytes(), file.name, read


def accepts(read: Callable[[bytes], object], data: bytes) -> bool:
    """Tell whether an input is read, or refused by the project's error; every other error comes out."""
    from lac_vla import LacError

    try:
        read(data)
        return True
    except LacError as error:
        message = str(error)
    assert len(message) < 4000
    return False


def main(target: str, options: list[str]) -> None:
    """Fuzz one target; never returns."""
    import atheris

    with TemporaryDirectory() as folder:
        with atheris.instrument_imports(include=["lac_vla"], enable_loader_override=False):
            whole, name, read = prepare(target, Path(folder))
            accepts(read, whole)  # what it imports is seen as well

        def damaged(data: bytes, most: int, seed: int) -> bytes:
            rng: Any = np.random.default_rng(seed)
            try:
                return mutate(data or whole, name, rng)[:most] if rng.random() < 0.5 else atheris.Mutate(data, most)
            except ValueError:  # JSON that is none any more
                return bytes(atheris.Mutate(data, most))

        atheris.Setup([sys.argv[0], *options], lambda data: accepts(read, data) and None, custom_mutator=damaged)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
