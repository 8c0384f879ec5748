"""Reads a LeRobotDataset v3.0: many episodes in few files, and tables that say what is where."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lac_vla.dataset_keys import DatasetKeys
from lac_vla.datasets import layout
from lac_vla.datasets.hub import HubDataset
from lac_vla.datasets.layout import AGAIN, DatasetError
from lac_vla.datasets.statistics import FeatureStats, from_lists, merge
from lac_vla.datasets.tables import Table, read_episodes, read_pictures, read_tasks
from lac_vla.datasets.video import read_frames
from lac_vla.errors import InputError
from lac_vla.files import parse_json, reading
from lac_vla.types import FloatArray, UInt8Image

Clip: TypeAlias = Callable[[int, int], UInt8Image]
"""Reads the frames from the first to before the second number, uint8, (n, H, W, 3)."""


class EpisodeImages(Mapping[str, UInt8Image]):
    """The images of an episode by camera, uint8, (T, H, W, 3), RGB; decoded when asked for, then kept."""

    def __init__(self, clips: Mapping[str, Clip], length: int) -> None:
        self._clips, self._length = dict(clips), length
        self._decoded: dict[str, UInt8Image] = {}

    def __getitem__(self, camera: str) -> UInt8Image:
        """Return all images of a camera, uint8, (T, H, W, 3)."""
        if camera not in self._decoded:
            self._decoded[camera] = self.window(camera, 0, self._length)
        return self._decoded[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self._clips)

    def __len__(self) -> int:
        return len(self._clips)

    def window(self, camera: str, start: int, stop: int) -> UInt8Image:
        """Decode frames ``start`` to ``stop`` (exclusive), little more than them, and keep nothing.

        Raises:
            KeyError: If there is no such camera.
            DatasetError: If the episode has no such frames, or the file is missing or damaged.
        """
        if not 0 <= start < stop <= self._length:
            raise DatasetError(f"frames {start}..{stop} do not lie within the episode's {self._length}")
        return self._clips[camera](start, stop)


@dataclass(frozen=True, eq=False)
class Episode:
    """An episode of a dataset.

    Attributes:
        index: Its place in the dataset.
        instruction: The task, in words.
        images: Camera → uint8, (T, H, W, 3), decoded on access.
        state: float32, (T, S), finite; S is 0 if the dataset has none.
        action: float32, (T, A), finite; A is 0 if the dataset has none (plain observation logs).
        columns: All other columns that hold a number, a text or equally many numbers in every row, (T,) or (T, n).
        metadata: The writer's metadata of the episode.
    """

    index: int
    instruction: str
    images: EpisodeImages
    state: FloatArray
    action: FloatArray
    columns: Mapping[str, npt.NDArray[Any]]
    metadata: Mapping[str, Any]

    def __len__(self) -> int:
        """Return the number of frames T."""
        return len(self.action)


class LeRobotDataset:
    """A dataset on disk. All that is read of it is checked once, against what is used.

    Args:
        root: Its folder, the one that holds ``meta``, ``data`` and ``videos``; or ``owner/name`` on the Hugging Face
            hub, of which what is needed is downloaded once.
        cameras: Cameras that are needed → the dataset's names of them; no other one is looked at. ``None`` for all.
        keys: Names of state and actions.

    Attributes:
        info: ``meta/info.json``.
        fps: Frames per second.
        features: Feature → dtype, shape, names.
        cameras: Names of the cameras (without ``observation.images.``), or those that were asked for.
        tasks: Task index → instruction.
        episodes: The episode table, one mapping per episode that has frames, without statistics.
        provenance: Origin of the data, if the dataset names it.

    Raises:
        DatasetError: If the folder is no complete dataset of version 3.x.
        InputError: If it has no such camera, state or action.
    """

    def __init__(
        self, root: str | Path, cameras: Mapping[str, str] | None = None, keys: DatasetKeys | None = None
    ) -> None:
        self.root, self.keys = Path(root), keys or DatasetKeys()
        hub = HubDataset.find(self.root)
        if hub is not None:
            self.root = hub.fetch(["meta/*"])
        self.info = layout.read_info(self.root)
        self.fps: float = self.info["fps"]
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self._images = self._choose(cameras)
        self.cameras = tuple(self._images)
        self._check_columns()
        self.tasks = read_tasks(self.root)
        # An episode counts once info.json does: what an interrupted append left behind is none.
        videos = [key for key in self._images.values() if self._is_video(key)]
        rows = read_episodes(self.root, videos)[: self.info["total_episodes"]]
        if len(rows) != self.info["total_episodes"]:
            raise DatasetError(
                f"{self.root}: info.json speaks of {self.info['total_episodes']} episodes, the episode table "
                f"of {len(rows)}; {AGAIN}, all of it"
            )
        self.episodes = [row for row in rows if row["length"]]
        provenance = self.root / layout.PROVENANCE
        self.provenance: dict[str, Any] = layout.read_json(provenance) if provenance.exists() else {}
        self._tables: dict[Path, Table] = {}
        wanted = {self._path(row) for row in self.episodes}
        wanted |= {
            self._path(row, key) for row in self.episodes for key in self._images.values() if self._is_video(key)
        }
        if hub is not None:
            hub.fetch(sorted(path.relative_to(self.root).as_posix() for path in wanted))
        if missing := sorted(str(path) for path in wanted if not os.path.exists(path)):
            raise DatasetError(f"{missing[0]} is missing, {len(missing)} files in all: {AGAIN}, all of it")

    def __len__(self) -> int:
        """Return the number of episodes."""
        return len(self.episodes)

    def __iter__(self) -> Iterator[Episode]:
        """Iterate over the episodes in order."""
        return (self.episode(index) for index in range(len(self)))

    @property
    def total_frames(self) -> int:
        """Frames of all episodes together."""
        return sum(row["length"] for row in self.episodes)

    @cached_property
    def stats(self) -> dict[str, FeatureStats]:
        """Feature → ``min``, ``max``, ``mean``, ``std``, ``count``, ``q01``, ``q10``, ``q50``, ``q90``, ``q99``.

        As far as the dataset has them. Images' are scaled to [0, 1], (3, 1, 1). Where the file counts other frames than
        the episodes have, as an interrupted append leaves it, those of the episodes are merged.
        """
        path = self.root / layout.STATS
        if not path.exists():
            return {}
        content = layout.read_json(path)
        with reading(path, AGAIN, DatasetError):
            stats = from_lists(content)
            if stats.get("timestamp", {}).get("count", [self.total_frames])[0] == self.total_frames:
                return stats
        rows = read_episodes(self.root, (), stats=True)[: self.info["total_episodes"]]
        with reading(path, AGAIN, DatasetError):
            parts = [
                {key: {name: row[f"stats/{key}/{name}"] for name in entry} for key, entry in content.items()}
                for row in rows
                if row["length"]
            ]
            if not parts or any(value is None for entry in parts[0].values() for value in entry.values()):
                return stats
            each = [from_lists(part) for part in parts]
            return {key: reduce(merge, (part[key] for part in each)) for key in stats}

    def episode(self, index: int) -> Episode:
        """Read an episode's numbers; its images are decoded when they are asked for.

        Raises:
            IndexError: If there is no such episode.
            DatasetError: If a file is missing or damaged, or a state or an action is not finite.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of a dataset of {len(self)}")
        row = self.episodes[index]
        path, number = self._path(row), row["episode_index"]
        if path not in self._tables:
            left = [key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")]
            self._tables[path] = Table.read(path, left)
        rows = self._tables[path].episode(number, row["length"])
        for key in (self.keys.state_key, self.keys.action_key):
            if key in self.features and key not in rows.names:
                raise DatasetError(f"{path} lacks the column '{key}': {AGAIN}, or repair the table")
        state, action = (rows.numbers(key) for key in (self.keys.state_key, self.keys.action_key))
        times = rows.times()
        task = rows.task()
        if task not in self.tasks:
            raise DatasetError(f"{path}: episode {number} has an unknown task, {task}; {AGAIN}")
        columns = {}
        for name in rows.names:
            if name not in (self.keys.state_key, self.keys.action_key):
                with suppress(DatasetError):
                    columns[name] = rows.column(name)
        clips: dict[str, Clip] = {}
        for camera, key in self._images.items():
            if self._is_video(key):
                clips[camera] = partial(_decode, self._path(row, key), self._shown(row, key, times), self.fps, number)
            else:
                clips[camera] = partial(read_pictures, path, key, rows.first, number)
        with reading(self.root / "meta" / "episodes", AGAIN, DatasetError):
            metadata = dict(parse_json(row.get(layout.METADATA) or "{}"))
        return Episode(index, self.tasks[task], EpisodeImages(clips, len(times)), state, action, columns, metadata)

    def _is_video(self, key: str) -> bool:
        return bool(self.features[key]["dtype"] == "video")

    def _shown(self, row: Mapping[str, Any], key: str, times: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the seconds within the video of the feature ``key`` that show an episode's ``times``, (T,)."""
        begin, end = float(row[f"videos/{key}/from_timestamp"]), row.get(f"videos/{key}/to_timestamp")
        lasts = end - begin if isinstance(end, int | float) and end > begin else math.inf
        if not -0.5 / self.fps < times[0] < lasts:
            raise DatasetError(
                f"{self._path(row)}: episode {row['episode_index']} begins at {times[0]:.3f} s of a video of "
                f"{lasts:.3f} s: timestamps count from the episode's own beginning; repair the table"
            )
        return begin + times

    def _path(self, row: Mapping[str, Any], key: str | None = None) -> Path:
        """Return the file of an episode's numbers, or of its images of the feature ``key``."""
        name, place = ("data_path", "data") if key is None else ("video_path", f"videos/{key}")
        chunk, file = row[f"{place}/chunk_index"], row[f"{place}/file_index"]
        path = Path(str(self.info[name]).format(video_key=key, chunk_index=chunk, file_index=file))
        if path.is_absolute() or ".." in path.parts:
            raise DatasetError(f"{self.root / layout.INFO}: {name} leads out of the dataset, to {path}; {AGAIN}")
        return self.root / path

    def _choose(self, cameras: Mapping[str, str] | None) -> dict[str, str]:
        """Camera → feature."""
        has = {
            key.removeprefix(layout.IMAGE_PREFIX): key
            for key, feature in self.features.items()
            if feature["dtype"] in ("image", "video")
        }
        if cameras is None:
            return has
        if missing := [camera for camera, name in cameras.items() if name not in has]:
            raise InputError(
                f"the model needs the cameras {list(cameras)}, and {[cameras[name] for name in missing]} are missing "
                f"from {self.root}, which has {list(has)}: say which are meant, --camera {missing[0]}=KEY"
            )
        return {camera: has[name] for camera, name in cameras.items()}

    def _check_columns(self) -> None:
        """Refuse a state or an action that was named and is not there."""
        usual = DatasetKeys()
        for option, key, default in (
            ("--state-key", self.keys.state_key, usual.state_key),
            ("--action-key", self.keys.action_key, usual.action_key),
        ):
            if key != default and key not in self.features:
                raise InputError(f"{self.root} has no column '{key}'; {option} takes one of {self.number_columns}")

    @property
    def number_columns(self) -> list[str]:
        """List the features that hold numbers of the robot."""
        return [
            key
            for key, feature in self.features.items()
            if feature["dtype"] not in ("image", "video", "string") and key not in layout.BOOKKEEPING
        ]


def _decode(path: Path, times: npt.NDArray[np.float64], fps: float, episode: int, start: int, stop: int) -> UInt8Image:
    return read_frames(path, times[start:stop], fps, episode=episode, first=start)
