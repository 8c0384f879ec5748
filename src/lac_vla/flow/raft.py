"""RAFT-small: the flow of LAC's paper.

The modules carry torchvision's parameter names, so that its published weights fit. torchvision itself is no dependency:
its wheels work with the one build of torch that they were compiled for, and break ``transformers`` beside any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lac_vla.checkpoint_files import check_finite_weights, check_tensors, read_safetensors, read_torch
from lac_vla.errors import CheckpointError, InputError
from lac_vla.types import FloatArray, UInt8Image

URL = "https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth"
"""torchvision's ``Raft_Small_Weights.C_T_V2``: trained on FlyingChairs and FlyingThings3D."""
STRIDE = 8
SMALLEST = 128
"""Pixels of the shorter side, at least: the coarsest level of the correlation pyramid needs two features."""
LEVELS, RADIUS = 4, 3
CHANNELS, HIDDEN = 128, 96


@dataclass(frozen=True)
class RAFTFlow:
    """RAFT-small (Teed & Deng, ECCV 2020, arXiv 2003.12039), in float32.

    Attributes:
        weights: Safetensors file, or file of ``torch.save``, with torchvision's parameter names; ``None`` downloads
            torchvision's own, once.
        iterations: Refinements.
        device: Where it runs; ``None`` for a GPU if there is one.

    Raises:
        InputError: If there are no iterations.
        CheckpointError: If the weights cannot be had or are of another model.
    """

    weights: str | Path | None = None
    iterations: int = 12
    device: str | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"iterations is {self.iterations}; give at least 1")
        _ = self._model  # a fault of the weights shows now, not in mid-episode
        macs_per_place(self.iterations)  # and no frame of an episode has to wait for the count

    @cached_property
    def _model(self) -> RAFTSmall:
        with torch.device("meta"):
            model = RAFTSmall()
        try:
            model.load_state_dict(_read(self.weights), assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{self.weights or URL} does not hold the weights of RAFT-small: {error}") from error
        check_finite_weights(self.weights or URL, model)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device, torch.float32).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, previous: UInt8Image, current: UInt8Image) -> FloatArray:
        """See :class:`lac_vla.flow.Flow`."""
        height, width = previous.shape[:2]
        size = _seen_size(height, width)
        pair = np.stack([cv2.resize(image, size) for image in (previous, current)])
        images = torch.from_numpy(pair).to(next(self._model.parameters()).device)
        flow = self._model(images.permute(0, 3, 1, 2).float() / 127.5 - 1, self.iterations)
        back = cv2.resize(flow.permute(1, 2, 0).cpu().numpy(), (width, height))
        return np.asarray(back * (width / size[0], height / size[1]), dtype=np.float32)

    def macs(self, height: int, width: int) -> int:
        """See :class:`lac_vla.flow.Flow`: of the network at the size that it sees, by torch's own counter."""
        across, down = _seen_size(height, width)
        places = (across // STRIDE) * (down // STRIDE)
        return places * (macs_per_place(self.iterations) + CHANNELS * places)


def _seen_size(height: int, width: int) -> tuple[int, int]:
    """Compute width and height at which the network sees an image."""
    scale = max(1.0, SMALLEST / min(height, width))
    across, down = (int(np.ceil(side * scale / STRIDE)) * STRIDE for side in (width, height))
    return across, down


@cache
def macs_per_place(iterations: int) -> int:
    """Count the network's MACs per place of its feature maps, an eighth of the image's sides; once.

    What is left out is the correlation of all pairs of places, the one part that grows with their square.
    """
    places = (SMALLEST // STRIDE) ** 2
    with torch.random.fork_rng(devices=[]):  # weights of any content, and nobody else's generator drawn from
        model = RAFTSmall().eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(2, 3, SMALLEST, SMALLEST), iterations)
    return int(counter.get_total_flops()) // 2 // places - CHANNELS * places


def downloaded() -> Path:
    """Tell where torchvision's weights are kept once they were downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]


def _read(file: str | Path | None) -> dict[str, torch.Tensor]:
    """Read weights by name. Nothing but tensors is unpickled."""
    source = downloaded() if file is None else Path(file).expanduser()
    if file is None and not source.is_file():
        try:
            source.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(source), hash_prefix="01064c6d", progress=False)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot download RAFT-small's weights {URL} ({error}): download them elsewhere and give them as "
                "raft_small:FILE"
            ) from error
    read = read_safetensors if source.suffix == ".safetensors" else read_torch
    return check_tensors(source, read(source))


class RAFTSmall(nn.Module):
    """The network: features of both images, the correlation of all their pairs, and a recurrent refinement."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_encoder = Encoder(CHANNELS, norm=True)
        self.context_encoder = Encoder(HIDDEN + 64, norm=False)
        self.update_block = Update(LEVELS * (2 * RADIUS + 1) ** 2, 64)

    def forward(self, images: torch.Tensor, iterations: int) -> torch.Tensor:
        """Estimate the flow from the first to the second of two images.

        Args:
            images: (2, 3, H, W) in [-1, 1]; H and W multiples of 8, at least 128.
            iterations: Refinements.

        Returns:
            Pixels, (2, H, W): x, y.
        """
        first, second = self.feature_encoder(images)
        pyramid = correlate(first, second)
        hidden, context = self.context_encoder(images[:1]).split([HIDDEN, 64], dim=1)
        hidden, context = hidden.tanh(), context.relu()
        rows, cols = (torch.arange(n, device=images.device, dtype=images.dtype) for n in first.shape[1:])
        start = torch.stack(torch.meshgrid(cols, rows, indexing="xy"))[None]
        flow = torch.zeros_like(start)
        for _ in range(iterations):
            hidden, change = self.update_block(hidden, context, look_up(pyramid, start + flow), flow)
            flow = flow + change
        whole = F.interpolate(flow, size=images.shape[2:], mode="bilinear", align_corners=True)
        return STRIDE * whole[0]


def correlate(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    """Multiply all pairs of features, (channels, h, w) each; from level to level the second image is halved.

    Returns:
        Per level (h·w, 1, h / 2^level, w / 2^level).
    """
    channels, height, width = first.shape
    volume = first.flatten(1).T @ second.flatten(1) / channels**0.5
    pyramid = [volume.view(height * width, 1, height, width)]
    while len(pyramid) < LEVELS:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def look_up(pyramid: list[torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """Sample the correlations within the radius of a place in the second image.

    Args:
        pyramid: As :func:`correlate` returns it.
        where: Place of every feature of the first image, (1, 2, h, w): x, y.

    Returns:
        (1, levels · (2 · radius + 1)², h, w).
    """
    height, width = where.shape[2:]
    steps = torch.arange(-RADIUS, RADIUS + 1, device=where.device, dtype=where.dtype)
    # The published weights were trained with x along the first axis of the neighbourhood.
    around = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)
    centre = where[0].flatten(1).T[:, None, None]
    found = []
    for level, volume in enumerate(pyramid):
        size = torch.tensor([volume.shape[3], volume.shape[2]], device=where.device)
        grid = 2 * (centre / 2**level + around) / (size - 1) - 1
        found.append(F.grid_sample(volume, grid, align_corners=True).flatten(1))
    return torch.cat(found, dim=1).T.reshape(1, -1, height, width)


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, norm: bool = False, relu: bool = True
) -> nn.Module:
    """Make a convolution that keeps the size (stride 1), instance normalisation if wanted, rectifier."""
    parts: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)]
    if norm:
        parts.append(nn.InstanceNorm2d(outputs))
    if relu:
        parts.append(nn.ReLU())
    return nn.Sequential(*parts)


class Bottleneck(nn.Module):
    """Residual block whose 3×3 convolution has a quarter of the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, norm: bool) -> None:
        super().__init__()
        self.convnormrelu1 = conv(inputs, outputs // 4, 1, norm=norm)
        self.convnormrelu2 = conv(outputs // 4, outputs // 4, 3, stride, norm=norm)
        self.convnormrelu3 = conv(outputs // 4, outputs, 1, norm=norm)
        self.downsample = nn.Identity() if stride == 1 else conv(inputs, outputs, 1, stride, norm=norm, relu=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        inner = self.convnormrelu3(self.convnormrelu2(self.convnormrelu1(x)))
        out: torch.Tensor = self.downsample(x) + inner
        return out.relu()


class Encoder(nn.Module):
    """An image's features at an eighth of its size."""

    def __init__(self, outputs: int, *, norm: bool) -> None:
        super().__init__()
        self.convnormrelu = conv(3, 32, 7, 2, norm=norm)
        self.layer1 = nn.Sequential(Bottleneck(32, 32, 1, norm=norm), Bottleneck(32, 32, 1, norm=norm))
        self.layer2 = nn.Sequential(Bottleneck(32, 64, 2, norm=norm), Bottleneck(64, 64, 1, norm=norm))
        self.layer3 = nn.Sequential(Bottleneck(64, 96, 2, norm=norm), Bottleneck(96, 96, 1, norm=norm))
        self.conv = nn.Conv2d(96, outputs, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (B, 3, H, W) → (B, outputs, H / 8, W / 8)."""
        features: torch.Tensor = self.conv(self.layer3(self.layer2(self.layer1(self.convnormrelu(images)))))
        return features


class Update(nn.Module):
    """One refinement of the flow."""

    def __init__(self, correlations: int, context: int) -> None:
        super().__init__()
        self.motion_encoder = Motion(correlations)
        self.recurrent_block = nn.ModuleDict({"convgru1": ConvGRU(HIDDEN, context + Motion.outputs)})
        self.flow_head = nn.ModuleDict(
            {"conv1": nn.Conv2d(HIDDEN, 128, 3, padding=1), "conv2": nn.Conv2d(128, 2, 3, padding=1)}
        )

    def forward(
        self, hidden: torch.Tensor, context: torch.Tensor, correlation: torch.Tensor, flow: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the new hidden state, and the change of the flow, (1, 2, h, w)."""
        inputs = torch.cat([context, self.motion_encoder(flow, correlation)], dim=1)
        hidden = self.recurrent_block["convgru1"](hidden, inputs)
        return hidden, self.flow_head["conv2"](self.flow_head["conv1"](hidden).relu())


class Motion(nn.Module):
    """Features of the correlation and of the flow so far; the flow itself is among them."""

    outputs = 82

    def __init__(self, correlations: int) -> None:
        super().__init__()
        self.convcorr1 = conv(correlations, 96, 1)
        self.convflow1, self.convflow2 = conv(2, 64, 7), conv(64, 32, 3)
        self.conv = conv(96 + 32, self.outputs - 2, 3)

    def forward(self, flow: torch.Tensor, correlation: torch.Tensor) -> torch.Tensor:
        """Map (1, 2, h, w) and (1, correlations, h, w) → (1, 82, h, w)."""
        both = torch.cat([self.convcorr1(correlation), self.convflow2(self.convflow1(flow))], dim=1)
        return torch.cat([self.conv(both), flow], dim=1)


class ConvGRU(nn.Module):
    """Gated recurrent unit on maps."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        self.convz, self.convr, self.convq = (nn.Conv2d(hidden + inputs, hidden, 3, padding=1) for _ in range(3))

    def forward(self, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Map (1, hidden, h, w) and (1, inputs, h, w) → (1, hidden, h, w)."""
        both = torch.cat([hidden, x], dim=1)
        update, reset = self.convz(both).sigmoid(), self.convr(both).sigmoid()
        new = self.convq(torch.cat([reset * hidden, x], dim=1)).tanh()
        mixed: torch.Tensor = (1 - update) * hidden + update * new
        return mixed
