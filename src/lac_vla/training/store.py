"""Stores the embeddings that the frozen tower and projector make of every frame: computed once, memory-mapped.

Training touches the decoder only. A store is a folder of ``.npy`` files and ``store.json``; it is filled episode by
episode under another name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap
from tqdm import tqdm

from lac_vla.datasets.lerobot import Episode, LeRobotDataset
from lac_vla.errors import InputError
from lac_vla.factory import CachedVLA
from lac_vla.flow import make_flow
from lac_vla.models import VLA
from lac_vla.policies.lac.inputs import flow_in_patches, resize
from lac_vla.types import FloatArray, Frame, IntArray, TokenLayout

META = "store.json"
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
        flow: Camera → flow from the preceding frame in token sides, float16, (F, H, W, 2); empty without flow.
        instructions: Of every episode.
        start: First frame of every episode, (E,).
        stop: One past its last frame, (E,).
        has_actions: Whether the targets are recorded actions, not the model's own answers.
        tower_pixels: Camera → what its tower sees, uint8, (F, H, W, 3), for those of which it was asked.
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
    tower_pixels: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.visual)

    @property
    def layout(self) -> TokenLayout:
        """Lay out a prompt without its suffix."""
        return TokenLayout.of(self.grids, len(self.prefix), 0)

    def windows(self, episodes: IntArray, length: int) -> tuple[IntArray, IntArray]:
        """List all windows of ``length`` consecutive frames within some episodes.

        Returns:
            First frame and episode of every window.

        Raises:
            InputError: If no episode is long enough.
        """
        firsts = [np.arange(self.start[e], self.stop[e] - length + 1) for e in episodes]
        first = np.concatenate([*firsts, np.zeros(0, dtype=np.int64)])
        if not first.size:
            longest = int((self.stop - self.start).max())
            raise InputError(
                f"no episode has {length} consecutive frames, the longest has {longest}: caching is learned between "
                "frames that follow one another; give another dataset or a smaller --window"
            )
        return first.astype(np.int64), np.repeat(episodes, [len(part) for part in firsts])

    @classmethod
    def build(
        cls,
        vla: VLA,
        dataset: Path,
        folder: Path,
        *,
        flow: str,
        patch_pixels: int,
        episodes: int = 0,
        labels: bool = False,
        tower_cameras: Sequence[str] = (),
    ) -> FrameStore:
        """Open the store in ``folder``; compute it first unless it is there already.

        Args:
            vla: The frozen model.
            dataset: LeRobot v3 dataset: demonstrations, or plain observation logs.
            folder: Of the store.
            flow: Estimator, see :data:`lac_vla.flow.FLOWS`.
            patch_pixels: Pixels per token side that the policy's networks see.
            episodes: How many episodes to use, evenly spread over the dataset; 0 for all.
            labels: Whether recorded actions are needed. Without, the model's own answers stand in where there are none.
            tower_cameras: Cameras of which the tower's pixels are needed, too.

        Raises:
            InputError: If the dataset does not fit the model, lacks what is needed, or the disk is too small; or if
                the folder holds a store of something else.
        """
        source = LeRobotDataset(dataset)
        if not len(source):
            raise InputError(f"{dataset} holds no episodes")
        count = len(source) if not episodes else min(episodes, len(source))
        chosen = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
        metadata = {
            "dataset": dataset.name,
            "frames": source.total_frames,
            "episodes": chosen,
            "model": fingerprint(vla),
            "flow": flow,
            "patch_pixels": patch_pixels,
            "tower_cameras": list(tower_cameras),
        }
        meta = folder / META
        builder = _Builder(vla, source, chosen, flow, patch_pixels, tower_cameras)
        if meta.is_file():
            found = json.loads(meta.read_text(encoding="utf-8"))["about"]
            unread = {"flow": flow == "none", "tower_cameras": not tower_cameras}  # whether it is there or not
            different = [key for key in metadata if not unread.get(key) and found.get(key) != metadata[key]]
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
            builder.write(folder, metadata)
        store = cls.open(folder)
        if labels and not store.has_actions:
            raise InputError(f"{dataset} records no actions, which --loss demo needs; use --loss distill")
        return store

    @classmethod
    def open(cls, folder: Path) -> FrameStore:
        """Map a finished store."""
        meta = json.loads((folder / META).read_text(encoding="utf-8"))

        def read(name: str) -> npt.NDArray[Any]:
            array: npt.NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            return array

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
            tower_pixels={
                name: read(f"tower_pixels_{index}")
                for index, name in enumerate(grids)
                if name in meta["about"].get("tower_cameras", [])
            },
        )


def fingerprint(vla: VLA) -> str:
    """Name a model by its answers: a checksum of what its last layer, and its head, make of fixed rows."""
    decoder = vla.decoder
    rows = torch.linspace(-1, 1, decoder.shape.width, device=vla.device, dtype=vla.dtype)[None]
    with torch.inference_mode():
        rotary = decoder.rotary(torch.zeros(1, dtype=torch.long, device=vla.device))
        answers = [part.float().cpu().numpy() for part in decoder.layers[-1].qkv(rows, rotary)]
    parts = [part.tobytes() for part in answers]
    return hashlib.sha256(b"".join([*parts, vla.head.fingerprint()])).hexdigest()[:16]


class _Builder:
    """Fills a store."""

    def __init__(
        self,
        vla: VLA,
        source: LeRobotDataset,
        chosen: list[int],
        flow: str,
        patch_pixels: int,
        tower_cameras: Sequence[str],
    ) -> None:
        self.vla, self.source, self.chosen = vla, source, chosen
        self.flow = make_flow(flow)
        self.patch_pixels, self.tower_cameras = patch_pixels, tower_cameras
        self.dense = CachedVLA(vla).session()

    @torch.inference_mode()
    def agrees(self, stored: npt.NDArray[np.float16]) -> bool:
        """Tell if the first frame's embeddings, (N, width), are this model's, but for rounding on other hardware.

        The fingerprint does not see the vision tower.
        """
        visual = self._visual(self._frame(self.source.episode(self.chosen[0]), 0))
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

    def write(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Compute everything, then give the folder its name."""
        vla, side = self.vla, self.patch_pixels
        first = self.source.episode(self.chosen[0])
        frame = self._frame(first, 0)
        layout, images = vla.processor.prompt(frame).layout, vla.processor.images(frame)
        lengths = [int(self.source.episodes[index]["length"]) for index in self.chosen]
        total, width = sum(lengths), vla.decoder.shape.width
        longest = max(self._longest_suffix(frame, self.source.episode(index)) for index in self.chosen)
        answer = self._targets(first, [frame])
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "visual": ((total, layout.n_visual, width), np.float16),
            "suffix": ((total, longest, width), np.float32),
            "suffix_length": ((total,), np.int64),
            "targets": ((total, answer.shape[1]), answer.dtype),
        }
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
        np.save(partial / "prefix.npy", self._text(frame)[0])
        start, labelled = 0, True
        with tqdm(total=total, desc="storing embeddings", unit="frame") as bar:
            for index in self.chosen:
                episode = self.source.episode(index)
                labelled &= episode.action.shape[1] > 0
                self._episode(episode, arrays, start, layout, bar)
                start += len(episode)
        for array in arrays.values():
            array.flush()
        stop = np.cumsum(lengths)
        meta = {
            "about": dict(metadata),
            "grids": {name: list(grid) for name, grid in layout.grids.items()},
            "instructions": [self.source.episode(index).instruction for index in self.chosen],
            "start": (stop - lengths).tolist(),
            "stop": stop.tolist(),
            "has_flow": self.flow is not None,
            "has_actions": labelled,
        }
        (partial / META).write_text(json.dumps(meta), encoding="utf-8")
        partial.replace(folder)

    @torch.inference_mode()
    def _episode(
        self, episode: Episode, arrays: Mapping[str, npt.NDArray[Any]], start: int, layout: TokenLayout, bar: Any
    ) -> None:
        step = np.diff(episode.columns["frame_index"]) if "frame_index" in episode.columns else np.ones(1)
        if (step != 1).any():
            raise InputError(
                f"episode {episode.index} skips frames: caching is learned between consecutive ones; split it there"
            )
        frames = self._frames(episode)
        arrays["targets"][start : start + len(frames)] = self._targets(episode, frames)
        previous: Mapping[str, Any] | None = None
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
                if self.flow is not None and previous is not None:
                    flow = self.flow(previous[camera.name], image)
                    arrays[f"flow_{number}"][at] = flow_in_patches(flow, *shape)
            previous = pixels
            bar.update()

    def _longest_suffix(self, frame: Frame, episode: Episode) -> int:
        """Count the tokens behind the visual ones in an episode's longest prompt, which may tell the state."""
        count = 1 if self.vla.processor.state_dim is None else len(episode)
        prompts = (
            self.vla.processor.prompt(
                replace(frame, instruction=episode.instruction, proprio=self._proprio(episode, at))
            )
            for at in range(count)
        )
        return max(prompt.layout.n_suffix for prompt in prompts)

    def _frame(self, episode: Episode, at: int) -> Frame:
        images = {camera: episode.images.window(camera, at, at + 1)[0] for camera in episode.images}
        return Frame(images, episode.instruction, self._proprio(episode, at))

    def _frames(self, episode: Episode) -> list[Frame]:
        return [
            Frame(
                {camera: episode.images[camera][at] for camera in episode.images},
                episode.instruction,
                self._proprio(episode, at),
            )
            for at in range(len(episode))
        ]

    def _proprio(self, episode: Episode, at: int) -> FloatArray | None:
        return episode.state[at] if episode.state.shape[1] else None

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
                f"the stored embeddings need {needed / 1e9:.1f} GB, {folder.name}'s disk has {free / 1e9:.1f} GB free: "
                "make room, give another --store, or use fewer --episodes"
            )
