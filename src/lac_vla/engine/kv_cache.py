"""The key/value cache: one pooled buffer for all sessions of an engine, and an indexed write.

A session owns a region of it: ``[prefix | visual tokens | suffix | appended tokens]`` per layer. What stands in it
outlives a frame; whether it may be reused is the session's own affair (:mod:`lac_vla.engine.frame_memory`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lac_vla.engine.layers import Segment
from lac_vla.errors import InputError
from lac_vla.models.protocols import KeysValues
from lac_vla.transfer import upload
from lac_vla.types import IntArray


@dataclass(eq=False)
class Region:
    """A session's part of the pool.

    Attributes:
        start: Its first slot.
        size: Its slots; 0 until the first frame.
    """

    start: int = 0
    size: int = 0


class SlotCache:
    """Implements :class:`lac_vla.engine.layers.PackedKVStore` for inference: new rows are written into their slots.

    Args:
        n_layers: Of the decoder.
        kv_heads: Key/value heads of a layer.
        head_dim: Width of a head.
        dtype: Of keys and values.
        device: Where they lie.

    Attributes:
        keys: (layers, kv_heads, slots, head_dim).
        values: As ``keys``.
        abandoned: Regions of sessions that are gone, to be released; garbage collection may append at any moment.
    """

    def __init__(self, n_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(n_layers, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self._by_layer = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        self.abandoned: deque[Region] = deque()
        self._free: list[Region] = []
        self._fixed = False

    @property
    def n_slots(self) -> int:
        """Slots of all regions."""
        return self.keys.shape[2]

    @property
    def bytes_per_slot(self) -> int:
        """Memory of one slot over all layers, bytes."""
        layers, heads, _, width = self.keys.shape
        return 2 * layers * heads * width * self.keys.element_size()

    def limit(self, slots: int) -> None:
        """Let the pool have so many slots and no more; all of its memory is taken now, before any region is.

        Raises:
            InputError: If it has regions.
        """
        self._reclaim()
        if sum(free.size for free in self._free) < self.keys.shape[2]:
            raise InputError("the memory of keys and values is limited before the first frame: make a new engine")
        self._free = []
        for name in ("keys", "values"):  # one is freed before the other is made
            old = getattr(self, name)
            setattr(self, name, old[:, :, :0].clone())
        self._grow(slots)
        self._fixed = True
        self.release(Region(0, slots))

    def fits(self, region: Region, size: int) -> bool:
        """Tell whether a region can be made ``size`` slots large as things stand."""
        self._reclaim()
        return not self._fixed or size <= region.size or any(free.size >= size for free in self._free)

    def reserve(self, region: Region, size: int) -> None:
        """Make a region at least ``size`` slots large; what it holds moves along, and is lost only to others.

        Args:
            region: Of a session; changed in place.
            size: Slots that it needs.

        Raises:
            InputError: If the pool is limited and has no such room; nothing has changed then.
        """
        self._reclaim()
        if size <= region.size:
            return
        end, old = self.keys.shape[2], Region(region.start, region.size)
        if not self._fixed and old.size and old.start + old.size == end:  # it lies at the end: nothing has to move
            self._grow(old.start + size)
            region.size = size
            return
        place = next((free for free in self._free if free.size >= size), None)
        if place is None:
            if self._fixed:
                raise InputError(f"no room for {size} slots among the {end} of the limited memory: give it more")
            self._grow(end + size)
            place = Region(end, size)
        else:
            self._free.remove(place)
            self.release(Region(place.start + size, place.size - size))
        for pool in (self.keys, self.values):
            pool[:, :, place.start : place.start + old.size] = pool[:, :, old.start : old.start + old.size]
            # zeros, not leftovers: a masked slot of NaN would still poison the attention's weighted sum
            pool[:, :, place.start + old.size : place.start + size] = 0
        region.start, region.size = place.start, size
        self.release(old)

    def add(self, region: Region, slots: IntArray, deltas: torch.Tensor) -> None:
        """Add to the keys and values of some of a region's slots: ``deltas``, (2, layers, heads, slots, head_dim)."""
        at = upload(region.start + slots, self.keys.device)
        for pool, added in zip((self.keys, self.values), deltas, strict=True):
            pool.index_add_(2, at, upload(added.to(pool.dtype), pool.device))

    def clear(self, region: Region) -> None:
        """Fill a region with zeros: a slot of NaN would poison the attention even where a mask hides it."""
        for pool in (self.keys, self.values):
            pool[:, :, region.start : region.start + region.size] = 0

    def release(self, region: Region) -> None:
        """Give a region back; neighbouring free ones become one."""
        if not region.size:
            return
        merged: list[Region] = []
        for free in sorted([*self._free, Region(region.start, region.size)], key=lambda free: free.start):
            if merged and merged[-1].start + merged[-1].size == free.start:
                merged[-1].size += free.size
            else:
                merged.append(free)
        self._free = merged

    def update(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows into their slots, and return the sequence's; see :meth:`KVStore.update`."""
        positions = segment.positions
        for pool, rows in zip(self._by_layer[layer], (keys, values), strict=True):
            if isinstance(positions, torch.Tensor):
                pool.index_copy_(1, positions, rows)
            else:
                pool[:, positions : positions + segment.n_rows] = rows
        return self._seen(layer, segment)

    def update_packed(
        self, layer: int, segments: Sequence[Segment], positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> list[KeysValues]:
        """Write the rows of all segments at once; see :meth:`lac_vla.engine.layers.PackedKVStore.update_packed`."""
        for pool, rows in zip(self._by_layer[layer], (keys, values), strict=True):
            pool.index_copy_(1, positions, rows)
        return [self._seen(layer, segment) for segment in segments]

    def _seen(self, layer: int, segment: Segment) -> KeysValues:
        keys, values = (pool[:, segment.start : segment.start + segment.length] for pool in self._by_layer[layer])
        return (keys, values) if segment.slots is None else (keys[:, segment.slots], values[:, segment.slots])

    def _reclaim(self) -> None:
        while self.abandoned:
            self.release(self.abandoned.popleft())

    def _grow(self, size: int) -> None:
        keys, values = (pool.new_zeros(*pool.shape[:2], size, pool.shape[3]) for pool in (self.keys, self.values))
        keys[:, :, : self.n_slots], values[:, :, : self.n_slots] = self.keys, self.values
        self.keys, self.values = keys, values  # both or none: the memory may not be enough
        self._by_layer = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))


@dataclass(frozen=True, eq=False)
class GradientKV:
    """Implements :class:`lac_vla.engine.layers.KVStore` for appended rows with a gradient: what is before is constant.

    Attributes:
        store: Where the rows are written, without their gradient.
    """

    store: SlotCache

    def update(
        self, layer: int, segment: Segment, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows into their slots, and return the sequence's; see :meth:`KVStore.update`."""
        with torch.inference_mode():
            stored = self.store.update(layer, segment, keys.detach(), values.detach())
        parts = zip(stored, (keys, values), strict=True)
        seen = [torch.cat([slots[:, : -segment.n_rows].clone(), rows], dim=1) for slots, rows in parts]
        return seen[0], seen[1]
