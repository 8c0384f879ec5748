"""Stores the embeddings that the frozen tower and projector make of every frame: computed once, memory-mapped.

Training touches the decoder only. A store is a folder of ``.npy`` files and ``store.json``; it is filled episode by
episode under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap
from tqdm import tqdm

from lac_vla.dataset_keys import DatasetKeys
from lac_vla.datasets.lerobot import Episode, LeRobotDataset
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.files import locked, read_object, reading, write_object
from lac_vla.flow import Flow, make_flow
from lac_vla.models import VLA
from lac_vla.policies.lac.inputs import flow_in_patches, resize
from lac_vla.training.noise import PixelNoise
from lac_vla.types import FloatArray, Frame, IntArray, TokenLayout

META = "store.json"
DAMAGED = "delete the folder, and it is stored again"
SAME = 0.05
"""Relative distance of two models' embeddings of a frame from which on they are not one model's."""


@dataclass(frozen=True, eq=False)
class FrameStore:
    """Holds a dataset's frames for training. F frames, N visual tokens, width D, S the longest suffix.

    Attributes:
        grids: Camera → (rows, cols).
        visual: Projected visual tokens, float16, (F, N, D).
        prefix: Embeddings before them, float32, (n_prefix, D).
        suffix: Embeddings behind them, right-padded, float32, (F, S, D).
        suffix_length: (F,).
        targets: What the action head is to answer, (F, n); see :meth:`lac_vla.models.heads.base.ActionHead.targets`.
        images: Camera → uint8, (F, H, W, 3), at the resolution of the policy's networks.
        flow: Camera → flow from the frame ``stride`` before in token sides, float16, (F, H, W, 2); empty without flow.
        instructions: Of every episode.
        start: First frame of every episode, (E,).
        stop: One past its last frame, (E,).
        has_actions: Whether the targets are recorded actions, not the model's own answers.
        numbers: Of the episodes in their dataset, (E,).
        tower_pixels: Camera → what its tower sees, uint8, (F, H, W, 3), for those of which it was asked.
        stride: Frames from one call of the model to the next: as many as actions are executed per call.
        state: Proprioception in the robot's units, float32, (F, S); S is 0 if the model takes none, and in stores of
            before it was kept.
    """

    grids: Mapping[str, tuple[int, int]]
    visual: npt.NDArray[np.float16]
    prefix: FloatArray
    suffix: FloatArray
    suffix_length: IntArray
    targets: npt.NDArray[Any]
    images: Mapping[str, npt.NDArray[np.uint8]]
    flow: Mapping[str, npt.NDArray[np.float16]]
    instructions: Sequence[str]
    start: IntArray
    stop: IntArray
    has_actions: bool
    numbers: Sequence[int] = ()
    tower_pixels: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    stride: int = 1
    state: FloatArray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def __len__(self) -> int:
        return len(self.visual)

    @property
    def layout(self) -> TokenLayout:
        """Lay out a prompt without its suffix."""
        return TokenLayout.of(self.grids, len(self.prefix), 0)

    @property
    def patch_pixels(self) -> int:
        """Pixels per token side of the pictures."""
        camera = self.layout.cameras[0]
        return self.images[camera.name].shape[1] // camera.rows

    def windows(self, episodes: IntArray, length: int) -> IntArray:
        """List all windows of ``length`` frames, ``stride`` apart, within some episodes, see :func:`windows`."""
        return windows(self.start, self.stop, episodes, length, self.stride)

    @classmethod
    def build(
        cls,
        vla: VLA,
        dataset: Path,
        folder: Path,
        *,
        flow: str,
        patch_pixels: int,
        episodes: int | Sequence[int] = 0,
        labels: bool = False,
        tower_cameras: Sequence[str] = (),
        stride: int = 1,
        keys: DatasetKeys | None = None,
        noise: PixelNoise | None = None,
        check: Callable[[IntArray, IntArray], object] | None = None,
    ) -> FrameStore:
        """Open the store in ``folder``; compute it first unless it is there already.

        Args:
            vla: The frozen model.
            dataset: LeRobot v3 dataset: demonstrations, or plain observation logs.
            folder: Of the store.
            flow: Estimator, see :data:`lac_vla.flow.FLOWS`.
            patch_pixels: Pixels per token side that the policy's networks see.
            episodes: How many episodes to use, evenly spread over the dataset; 0 for all. Or their numbers.
            labels: Whether recorded actions are needed; else the model's own answers stand in where there are none.
            tower_cameras: Cameras of which the tower's pixels are needed, too.
            stride: Frames from one call of the model to the next.
            keys: Names of what is read of the dataset.
            noise: Added to the pictures before anything looks at them.
            check: Given the episodes' first frames and those behind their last ones, refuses what cannot be trained on;
                nothing has been stored then.

        Raises:
            InputError: If the dataset does not fit the model, lacks what is needed, or the disk is too small; or if the
                folder holds a store of something else.
        """
        keys = keys or DatasetKeys()
        source = LeRobotDataset(dataset, keys.cameras(vla.grids), keys)
        if not len(source):
            raise InputError(f"{dataset} holds no episodes")
        wants_state = vla.processor.state_dim is not None
        for option, key, needed, why in (
            ("--state-key", keys.state_key, wants_state, "the model reads"),
            ("--action-key", keys.action_key, labels, "--loss demo needs; use --loss distill, or name it"),
        ):
            if needed and key not in source.features:
                what = f"records no actions ('{key}'), which" if key == keys.action_key else f"has no '{key}', which"
                raise InputError(f"{dataset} {what} {why}: {option} takes one of {source.number_columns}")
        chosen = spread(len(source), episodes) if isinstance(episodes, int) else list(episodes)
        metadata = {
            "dataset": dataset.name,
            "frames": source.total_frames,
            "episodes": chosen,
            "model": fingerprint(vla),
            "flow": flow,
            "patch_pixels": patch_pixels,
            "tower_cameras": list(tower_cameras),
        }
        if stride != 1:
            metadata["stride"] = stride
        noise = noise or PixelNoise()
        if noise.sigma:
            metadata["noise"] = [noise.sigma, noise.seed]
        if keys != DatasetKeys():
            metadata["keys"] = {**asdict(keys), "camera": list(keys.camera)}
        meta = folder / META
        builder = _Builder(vla, source, chosen, make_flow(flow), patch_pixels, tower_cameras, stride, noise)
        if meta.is_file():
            found = read_object(meta, DAMAGED).get("about", {})
            unread = {"flow": flow == "none", "tower_cameras": not tower_cameras}  # whether it is there or not
            different = [
                key for key in {**found, **metadata} if not unread.get(key) and found.get(key) != metadata.get(key)
            ]
            if different == ["tower_cameras"]:
                raise InputError(
                    f"{folder} holds no pixels of the cameras {list(tower_cameras)}, which --vision-kv-reuse needs: "
                    "give another --store, and they are stored with the embeddings"
                )
            if different:
                raise InputError(f"{folder} holds stored embeddings of other {different}; give another --store")
            if not builder.agrees(cls.open(folder).visual[0]):
                raise InputError(f"{folder} holds stored embeddings of another vision tower; give another --store")
        else:
            # The lock lies beside the folder, which gets its name only when it is whole.
            lock = folder.resolve().with_name(f"{folder.resolve().name}.lock")
            with locked(lock, f"another process fills {folder}: wait for it, or give another --store"):
                if not meta.is_file():
                    builder.write(folder, metadata, check, labels=labels)
        store = cls.open(folder)
        if labels:
            _check_labelled(dataset, store.has_actions)
        return store

    @classmethod
    def open(cls, folder: Path) -> FrameStore:
        """Map a finished store.

        Raises:
            InputError: If a file is missing or damaged.
        """
        meta = read_object(folder / META, DAMAGED)

        def read(name: str) -> npt.NDArray[Any]:
            with reading(folder / f"{name}.npy", DAMAGED):
                array: npt.NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                return array

        with reading(folder / META, DAMAGED):
            return cls._map(meta, read)

    @classmethod
    def _map(cls, meta: Mapping[str, Any], read: Callable[[str], npt.NDArray[Any]]) -> FrameStore:
        grids = {name: (int(rows), int(cols)) for name, (rows, cols) in meta["grids"].items()}
        return cls(
            grids=grids,
            visual=read("visual"),
            prefix=np.array(read("prefix")),
            suffix=read("suffix"),
            suffix_length=np.array(read("suffix_length")),
            targets=np.array(read("targets")),
            images={name: read(f"image_{index}") for index, name in enumerate(grids)},
            flow={name: read(f"flow_{index}") for index, name in enumerate(grids)} if meta["has_flow"] else {},
            instructions=meta["instructions"],
            start=np.asarray(meta["start"], dtype=np.int64),
            stop=np.asarray(meta["stop"], dtype=np.int64),
            has_actions=meta["has_actions"],
            numbers=meta["about"]["episodes"],
            tower_pixels={
                name: read(f"tower_pixels_{index}")
                for index, name in enumerate(grids)
                if name in meta["about"].get("tower_cameras", [])
            },
            stride=int(meta["about"].get("stride", 1)),
            **({"state": np.array(read("state"))} if meta.get("has_state") else {}),
        )


def windows(start: IntArray, stop: IntArray, episodes: IntArray, length: int, stride: int = 1) -> IntArray:
    """List all windows of ``length`` frames, ``stride`` apart, within some episodes by their first frames.

    Raises:
        InputError: If no episode is long enough.
    """
    span = (length - 1) * stride + 1
    firsts = [np.arange(start[e], stop[e] - span + 1) for e in episodes]
    first: IntArray = np.concatenate([*firsts, np.zeros(0, dtype=np.int64)])
    if not first.size:
        longest = int((stop - start)[episodes].max(initial=0))
        raise InputError(
            f"no episode has {span} consecutive frames, the longest has {longest}: caching is learned between "
            "frames that follow one another; give another dataset or a smaller --window or --stride"
        )
    return first


def spread(count: int, wanted: int) -> list[int]:
    """Number ``wanted`` of ``count`` episodes, evenly spread; 0 for all."""
    numbers: list[int] = np.linspace(0, count - 1, min(wanted, count) if wanted else count).round().astype(int).tolist()
    return numbers


def _check_labelled(dataset: object, labelled: bool) -> None:
    if not labelled:
        raise InputError(f"{dataset} records no actions, which --loss demo needs; use --loss distill")


def fingerprint(vla: VLA) -> str:
    """Name a model by its answers: a checksum of what its last layer, and its head, make of fixed rows."""
    decoder = vla.decoder
    rows = torch.linspace(-1, 1, decoder.shape.width, device=vla.device, dtype=vla.dtype)[None]
    with torch.inference_mode():
        rotary = decoder.rotary(torch.zeros(1, dtype=torch.long, device=vla.device))
        answers = [part.float().cpu().numpy() for part in decoder.layers[-1].qkv(rows, rotary)]
    parts = [part.tobytes() for part in answers]
    return hashlib.sha256(b"".join([*parts, vla.head.fingerprint()])).hexdigest()[:16]


@dataclass
class _Builder:
    """Fills a store."""

    vla: VLA
    source: LeRobotDataset
    chosen: list[int]
    flow: Flow | None
    patch_pixels: int
    tower_cameras: Sequence[str]
    stride: int
    noise: PixelNoise

    def __post_init__(self) -> None:
        self.dense = CachedVLA(self.vla).session()

    @torch.inference_mode()
    def agrees(self, stored: npt.NDArray[np.float16]) -> bool:
        """Tell if the first frame's embeddings, (N, width), are this model's, but for rounding on other hardware.

        The fingerprint does not see the vision tower.
        """
        visual = self._visual(self._frames(self.source.episode(self.chosen[0]), 1)[0])
        difference = np.linalg.norm(visual.astype(np.float32) - stored)
        return bool(difference <= SAME * np.linalg.norm(visual.astype(np.float32)))

    def _visual(self, frame: Frame) -> npt.NDArray[np.float16]:
        return self.vla.encode_image(frame).float().cpu().numpy().astype(np.float16)

    @torch.inference_mode()
    def _text(self, frame: Frame) -> tuple[FloatArray, FloatArray]:
        """Embed what stands before and behind the visual tokens."""
        processor = self.vla.processor
        prefix, suffix = processor.embed(processor.prompt(frame))
        return prefix.float().cpu().numpy(), suffix.float().cpu().numpy()

    def _check(self, images: Mapping[str, Any]) -> bool:
        """Read the numbers of all episodes before anything is stored, and refuse what cannot be learned from.

        Returns:
            Whether all episodes have actions.
        """
        labelled = True
        for index in self.chosen:
            episode = self.source.episode(index)
            step = np.diff(episode.columns["frame_index"]) if "frame_index" in episode.columns else np.ones(1)
            if (step != 1).any():
                raise InputError(
                    f"episode {index} skips frames: caching is learned between consecutive ones; split it there"
                )
            try:
                state = episode.state[0] if episode.state.shape[1] else None
                self.vla.processor.prompt(Frame(images, episode.instruction, state))
                if episode.action.shape[1]:
                    self.vla.head.targets(episode.action)
            except InputError as error:
                raise InputError(f"{self.source.root}, episode {index}: {error}") from error
            labelled &= episode.action.shape[1] > 0
        return labelled

    def write(
        self,
        folder: Path,
        metadata: Mapping[str, Any],
        check: Callable[[IntArray, IntArray], object] | None,
        *,
        labels: bool = False,
    ) -> None:
        """Compute everything, then give the folder its name."""
        vla, side = self.vla, self.patch_pixels
        lengths = np.array([int(self.source.episodes[index]["length"]) for index in self.chosen])
        stop = np.cumsum(lengths)
        if check is not None:
            check(stop - lengths, stop)
        first = self.source.episode(self.chosen[0])
        [frame] = self._frames(first, 1)
        labelled = self._check(frame.images)
        if labels:
            _check_labelled(self.source.root, labelled)
        layout, images = vla.processor.prompt(frame).layout, vla.processor.images(frame)
        total, width = int(stop[-1]), vla.decoder.shape.width
        longest = max(self._longest_suffix(frame, self.source.episode(index)) for index in self.chosen)
        answer = self._targets(first, [frame])
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "visual": ((total, layout.n_visual, width), np.float16),
            "suffix": ((total, longest, width), np.float32),
            "suffix_length": ((total,), np.int64),
            "targets": ((total, answer.shape[1]), answer.dtype),
        }
        if vla.processor.state_dim is not None:
            shapes["state"] = ((total, first.state.shape[1]), np.float32)
        for index, camera in enumerate(layout.cameras):
            size = (total, camera.rows * side, camera.cols * side)
            shapes[f"image_{index}"] = ((*size, 3), np.uint8)
            if self.flow is not None:
                shapes[f"flow_{index}"] = ((*size, 2), np.float16)
            if camera.name in self.tower_cameras:
                shapes[f"tower_pixels_{index}"] = ((total, *images[camera.name].shape), np.uint8)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} holds something else than stored embeddings; give another --store")
        partial = folder.with_name(f"{folder.name}.incomplete")
        self._check_disk(folder, shapes)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        arrays = {
            name: open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]
            for name, (shape, dtype) in shapes.items()
        }
        for name in shapes:
            _reserve(partial / f"{name}.npy")
        np.save(partial / "prefix.npy", self._text(frame)[0])
        start = 0
        with tqdm(total=total, desc="storing embeddings", unit="frame") as bar:
            for index in self.chosen:
                episode = self.source.episode(index)
                self._episode(episode, arrays, start, layout, bar)
                start += len(episode)
        for array in arrays.values():
            array.flush()
        meta = {
            "about": dict(metadata),
            "grids": {name: list(grid) for name, grid in layout.grids.items()},
            "instructions": [self.source.episode(index).instruction for index in self.chosen],
            "start": (stop - lengths).tolist(),
            "stop": stop.tolist(),
            "has_flow": self.flow is not None,
            "has_actions": labelled,
            "has_state": "state" in shapes,
        }
        write_object(partial / META, meta)
        os.replace(partial, folder)

    @torch.inference_mode()
    def _episode(
        self, episode: Episode, arrays: Mapping[str, npt.NDArray[Any]], start: int, layout: TokenLayout, bar: Any
    ) -> None:
        frames = self._frames(episode, len(episode))
        arrays["targets"][start : start + len(frames)] = self._targets(episode, frames)
        if "state" in arrays:
            arrays["state"][start : start + len(frames)] = episode.state
        recent: deque[Mapping[str, Any]] = deque(maxlen=self.stride)
        for at, frame in enumerate(frames, start):
            pixels = self.vla.processor.images(frame)
            visual = self._visual(frame)
            if not np.isfinite(visual).all():
                raise InputError(f"episode {episode.index}: embeddings are not finite in half precision")
            _, suffix = self._text(frame)
            arrays["visual"][at] = visual
            arrays["suffix"][at, : len(suffix)] = suffix
            arrays["suffix_length"][at] = len(suffix)
            for number, camera in enumerate(layout.cameras):
                shape = (camera.rows, camera.cols, self.patch_pixels)
                image = pixels[camera.name]
                arrays[f"image_{number}"][at] = resize(image, *shape)
                if camera.name in self.tower_cameras:
                    arrays[f"tower_pixels_{number}"][at] = image
                if self.flow is not None and len(recent) == self.stride:
                    flow = self.flow(recent[0][camera.name], image)
                    arrays[f"flow_{number}"][at] = flow_in_patches(flow, *shape)
            recent.append(pixels)
            bar.update()

    def _longest_suffix(self, frame: Frame, episode: Episode) -> int:
        """Count the tokens behind the visual ones in an episode's longest prompt, which may tell the state."""
        frame = replace(frame, instruction=episode.instruction)
        states = [frame.proprio] if self.vla.processor.state_dim is None else list(episode.state)
        prompts = (self.vla.processor.prompt(replace(frame, proprio=state)) for state in states)
        return max(prompt.layout.n_suffix for prompt in prompts)

    def _frames(self, episode: Episode, count: int) -> list[Frame]:
        """Read the first frames of an episode."""
        clips = {camera: episode.images.window(camera, 0, count) for camera in episode.images}
        states = episode.state if episode.state.shape[1] else [None] * count
        rng = self.noise.generator(episode.index)
        return [
            Frame(
                self.noise.add({camera: clip[at] for camera, clip in clips.items()}, rng),
                episode.instruction,
                states[at],
            )
            for at in range(count)
        ]

    def _targets(self, episode: Episode, frames: list[Frame]) -> npt.NDArray[Any]:
        """Turn recorded actions into the head's answers; without any, those of the dense model itself."""
        actions, head = episode.action[: len(frames)], self.vla.head
        if not actions.shape[1]:
            self.dense.reset()
            actions = np.stack([self.dense.act(frame) for frame in frames])
        return head.with_states(head.targets(actions), episode.state[: len(frames)])

    def _check_disk(self, folder: Path, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        needed = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise InputError(
                f"the stored embeddings need {_size(needed)}, {folder.name}'s disk has {_size(free)} free: "
                "make room, give another --store, or use fewer --episodes"
            )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _reserve(path: Path) -> None:
    """Take the file's blocks now: where the disk is full, writing to mapped memory ends the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
