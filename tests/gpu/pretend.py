"""A GPU that is not there: tensors on a device of their own, so that on a CPU every copy and every wait is seen.

Their numbers lie in ordinary tensors, which the operations compute on; what they say of themselves is another device.
So the library takes the ways that it takes for a GPU, and what would wait for one is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lac_vla.models import VLA

DEVICE = torch.device("cuda:0")
aten: Any = torch.ops.aten
SHAPED_BY_VALUES = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive}
"""Their results' shapes depend on numbers: a GPU is waited for."""

_T = torch.Tensor
READS = {_T.tolist, _T.item, _T.__bool__, _T.__int__, _T.__float__, _T.__index__}
"""Methods that give the host numbers."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    data_here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.data_here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor on the pretended device, outside of it")

    __torch_function__ = torch._C._disabled_torch_function_impl


def _here(part: Any) -> Any:
    return part.data_here if isinstance(part, OnDevice) else part


class PretendedGPU(TorchDispatchMode):
    """Runs what is asked of the device, and lists what would have waited for it.

    Attributes:
        reads: Copies to the host, one for every time that it waits.
        waits: Everything else that waits: copies from memory that is not pinned, shapes that depend on numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.waits: list[str] = []
        self._pinned: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        packet, flat = func.overloadpacket, tree_flatten((args, kwargs))[0]
        on_device = any(isinstance(part, OnDevice) for part in flat)
        target = kwargs.get("device")
        if packet in (aten.pin_memory, aten._pin_memory):
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if packet is aten.is_pinned:
            return any(args[0] is pinned for pinned in self._pinned)
        if packet is aten._fused_sdp_choice:
            return 0  # the one that is made of plain operations
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # of its parts, every one is looked at
                return func.decompose(*args, **kwargs)
        if packet is aten._local_scalar_dense and on_device:
            self.reads.append(str(func))
        elif packet is aten._to_copy and target is not None:
            self._copied(str(func), args[0], torch.device(target), bool(kwargs.get("non_blocking")))
        elif packet is aten.copy_ and len(args) > 1 and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            self._copied(str(func), args[1], args[0].device, len(args) > 2 and bool(args[2]))
        elif on_device:
            self._check(func, flat)
        to_device = on_device if target is None else torch.device(target).type == DEVICE.type
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if not to_device:
            return out
        again = {id(part.data_here): part for part in flat if isinstance(part, OnDevice)}  # what is changed in place
        there: Callable[[Any], Any] = lambda part: again.get(id(part), OnDevice(part))  # noqa: E731
        return tree_map(lambda part: there(part) if isinstance(part, torch.Tensor) else part, out)

    def _copied(self, what: str, source: torch.Tensor, target: torch.device, unwaited: bool) -> None:
        if isinstance(source, OnDevice):
            if target.type == "cpu":
                self.reads.append(what)
        elif target.type == DEVICE.type and not (unwaited and any(source is pinned for pinned in self._pinned)):
            self.waits.append(f"{what} from memory that is not pinned, {tuple(source.shape)}")

    def indexed(self, parts: list[Any], written: Sequence[Any]) -> None:
        """See what a tensor is indexed by, and what is written into it."""
        if any(isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.ndim for part in parts):
            self.waits.append("a mask as an index: the shape depends on numbers")
        for part in (*parts, *written):
            if isinstance(part, torch.Tensor) and part.ndim and not isinstance(part, OnDevice):
                self.waits.append(f"an index or numbers of the host's, {tuple(part.shape)}")

    def _check(self, func: Any, flat: list[Any]) -> None:
        if func.overloadpacket in SHAPED_BY_VALUES or func is aten.repeat_interleave.Tensor:
            self.waits.append(f"{func}: its shape depends on numbers")
        tensors = [part for part in flat if isinstance(part, torch.Tensor)]
        for part in tensors:
            if not isinstance(part, OnDevice) and part.ndim:
                self.waits.append(f"{func} with a tensor of the host's, {tuple(part.shape)}")


class _Methods(TorchFunctionMode):
    """Does what torch's own methods would ask the device itself for."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and isinstance(args[0], OnDevice):
            self._gpu.reads.append(func.__name__)
            return func(args[0].data_here)
        if func is torch.Tensor.nonzero and isinstance(args[0], OnDevice):
            self._gpu.waits.append("nonzero: its shape depends on numbers")
            return OnDevice(func(args[0].data_here))
        if func is torch.Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is torch.Tensor.contiguous and isinstance(args[0], OnDevice):
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.tensor and torch.device((kwargs or {}).get("device") or "cpu").type == DEVICE.type:
            self._gpu.waits.append("torch.tensor with the device's memory as a target")
            return OnDevice(func(*args, **{**kwargs, "device": "cpu"}))
        if func not in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) or not isinstance(args[0], OnDevice):
            return func(*args, **(kwargs or {}))
        self._gpu.indexed(tree_flatten(args[1])[0], args[2:])
        found = func(*tree_map(_here, args))
        return None if found is None else OnDevice(found)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Run the block on the pretended device, in no_grad: tensors like these cannot be in inference mode."""
    if torch.version.cuda is not None and not torch.cuda.is_available():
        pytest.skip("torch is built for CUDA, and asks for a driver that is not here")
    mode, grad, cuda = torch.inference_mode, torch.no_grad(), torch.cuda._lazy_init
    before = mode.__enter__, mode.__exit__
    torch.cuda._lazy_init = lambda: None  # there is none to start
    mode.__enter__, mode.__exit__ = (lambda _: None), (lambda *_: None)
    try:
        with grad, PretendedGPU() as gpu, _Methods(gpu):
            yield gpu
    finally:
        mode.__enter__, mode.__exit__ = before
        torch.cuda._lazy_init = cuda


def to_pretended_gpu(model: VLA) -> VLA:
    """Move a model's weights to the pretended device, in place."""
    for module in model.module.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(OnDevice(weight.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return replace(model)
