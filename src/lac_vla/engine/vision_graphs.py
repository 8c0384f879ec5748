"""The vision encoder of one robot's frame as CUDA graphs: stem, transformers that reuse, projector.

The stem is one graph. The projector is one for every number of rows, rounded up; and so are transformers that reuse
(the option ``vision_kv_reuse``), once for all cameras and sessions: keys and values lie in the graphs' own buffers
while they run, fetched from the session's cache and put back, all of them in one copy. Which features are gathered from
a whole frame, and a convolution's last layer, depend on the decision in a way that has no few shapes: these few kernels
are launched one by one. So are the stems of several robots: hundreds of rows in one pass keep the GPU busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lac_vla.engine.cuda_graphs import CUDAGraphRunner
from lac_vla.engine.graphs import ROW_MULTIPLE
from lac_vla.models.protocols import StaticVision, VisionEncoder, VisionKVCache
from lac_vla.models.transformer import Encode, FrameKVCache, ImageKVCache
from lac_vla.types import BoolArray, Frame, UInt8Image


class GraphedVision(VisionEncoder):
    """Runs a vision encoder over static buffers.

    Args:
        vision: The encoder; its caches, if it has any, are :class:`FrameKVCache`.
        graphs: The engine's.
        tokens: Visual tokens of every camera.
    """

    def __init__(self, vision: StaticVision, graphs: CUDAGraphRunner, tokens: Sequence[int]) -> None:
        self._vision, self._graphs, self._tokens = vision, graphs, tokens
        self._buffers: dict[Encode, ImageKVCache] = {}

    def kv_cache(self) -> VisionKVCache | None:
        """See :meth:`VisionEncoder.kv_cache`."""
        return self._vision.kv_cache()

    def encode_stem(self, frame: Frame, images: Mapping[str, UInt8Image], kv_cache: Any = None) -> Any:
        """See :meth:`VisionEncoder.encode_stem`."""
        whole, inputs = kv_cache is None, self._vision.inputs([frame], [images])
        return self._graphs.function(("stem", whole), partial(self._vision.stem, whole=whole), *inputs)

    def encode_stems(self, frames: Sequence[Frame], images: Sequence[Mapping[str, UInt8Image]]) -> Sequence[Any]:
        """See :meth:`VisionEncoder.encode_stems`; no graph."""
        return self._vision.encode_stems(frames, images)

    def encode_tokens(self, stem: Any, token_mask: BoolArray | None = None, kv_cache: Any = None) -> torch.Tensor:
        """See :meth:`VisionEncoder.encode_tokens`."""
        cache = None if kv_cache is None else _FrameOnGraphs(self, kv_cache)
        return self._vision.encode_tokens(stem, token_mask, cache)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """See :meth:`VisionEncoder.project`."""
        n = len(features)
        if not n:
            return self._vision.project(features)
        rows: torch.Tensor = self._graphs.function("project", self._vision.project, _filled(features, ROW_MULTIPLE))
        return rows[:n]

    def run(
        self,
        cache: ImageKVCache,
        camera: int,
        encode: Encode,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        *conditions: torch.Tensor,
    ) -> torch.Tensor:
        """Run a transformer's blocks for one image; see :meth:`ImageKVCache.run`."""
        if encode not in self._buffers:  # the first image of all: what its keys and values are like is not known yet
            first = encode(x, cache, rows, *conditions)
            self._buffers[encode] = ImageKVCache(_like(cache))
            return first
        buffers = self._buffers[encode]
        if not cache.blocks:
            cache.blocks = _like(buffers)
            rows = None
        if rows is None:
            rows = torch.arange(x.shape[1], device=x.device)
        n = len(rows)
        if not n:
            return encode(x, cache, rows, *conditions)
        # some patches are computed twice, to the same end
        every = _filled(rows, ROW_MULTIPLE * (x.shape[1] // self._tokens[camera]))
        _copy(buffers, cache)
        work = partial(_encode_over, encode, buffers)
        features: torch.Tensor = self._graphs.function(encode, work, x, every, *conditions)
        _copy(cache, buffers)
        return features.narrow(1, 0, features.shape[1] + n - len(every))


@dataclass
class _FrameOnGraphs:
    """Stands for a session's cache in the encoder's hands; see :class:`FrameKVCache`."""

    vision: GraphedVision
    cache: FrameKVCache

    def of(self, tower: int, camera: int) -> _ImageOnGraphs:
        return _ImageOnGraphs(self.vision, self.cache.of(tower, camera), camera)


@dataclass
class _ImageOnGraphs:
    """Stands for one image's part of it; see :class:`ImageKVCache`."""

    vision: GraphedVision
    cache: ImageKVCache
    camera: int

    def run(
        self, encode: Encode, x: torch.Tensor, rows: torch.Tensor | None, *conditions: torch.Tensor
    ) -> torch.Tensor:
        return self.vision.run(self.cache, self.camera, encode, x, rows, *conditions)


def _encode_over(
    encode: Encode, cache: ImageKVCache, x: torch.Tensor, rows: torch.Tensor, *conditions: torch.Tensor
) -> torch.Tensor:
    return encode(x, cache, rows, *conditions)


def _filled(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Repeat the first row until their number is a multiple."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows


def _like(cache: ImageKVCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros_like(keys), torch.zeros_like(values)) for keys, values in cache.blocks]


def _copy(target: ImageKVCache, source: ImageKVCache) -> None:
    there, here = ([part for block in cache.blocks for part in block] for cache in (target, source))
    torch._foreach_copy_(there, here)
