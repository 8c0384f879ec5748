"""LeRobot's checkpoint layout: ``config.json``, its processors' JSON, statistics, tokenizer. LeRobot is not needed.

``policy_preprocessor.json`` and ``policy_postprocessor.json`` name the files of their statistics (``state_file``);
checkpoints of before LeRobot 0.4 keep them among the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from lac_vla.checkpoint_files import damaged, read_json
from lac_vla.errors import CheckpointError
from lac_vla.files import write_object, write_whole
from lac_vla.hub import find_folder
from lac_vla.models.tokenizer import TOKENIZER, Encode, FileTokenizer, load_tokenizer
from lac_vla.models.weights import HUB_FILES as WEIGHT_FILES
from lac_vla.models.weights import WEIGHTS
from lac_vla.types import FloatArray

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
STATE, ACTION = "observation.state", "action"
IMAGES = "observation.images."
KINDS = {STATE: "STATE", ACTION: "ACTION"}
EMPTY = f"{IMAGES}empty_camera_"
TOKENIZER_FILES = ("tokenizer.json",)
HUB_FILES = (*WEIGHT_FILES, "policy_p*processor*.safetensors")
"""Weights, and the statistics of the processors."""
TOKENIZER_SLACK = 128
"""Ids by which a tokenizer and an embedding may differ: special tokens, and rows of padding."""
OPENPI_EPS = 1e-6

Statistics = Mapping[str, npt.NDArray[np.float32]]
"""Name (``mean``, ``std``, ``q01``, …) → vector."""

BOUNDS = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max")}
"""Normalisations → the statistics that −1 and 1 stand for."""


@dataclass(frozen=True, eq=False)
class Units:
    """Maps a vector in a robot's own units to a model's, and back; in float32, as LeRobot does. Nothing is clipped.

    Attributes:
        offset: Mean; or what −1 stands for, (dim,).
        divisor: What a difference from it is divided by, (dim,).
        factor: What it is multiplied by on the way back, (dim,).
        centred: Whether ``offset`` is a mean, mapped to 0.
    """

    offset: FloatArray
    divisor: FloatArray
    factor: FloatArray
    centred: bool

    @classmethod
    def of(cls, mode: str, statistics: Statistics, dim: int, what: str, eps: float = 1e-8) -> Units:
        """Make the units of a feature.

        Args:
            mode: ``MEAN_STD``, or one of :data:`BOUNDS`.
            statistics: Of the feature.
            dim: Its length.
            what: Its name, for error messages.
            eps: Added to a standard deviation, or in place of an empty interval; with :data:`OPENPI_EPS`, as openpi
                does, added to both, and on the way back, too.

        Raises:
            CheckpointError: If the mode is another one, or a statistic is missing, not finite or of another length.
        """
        if mode != "MEAN_STD" and mode not in BOUNDS:
            raise CheckpointError(f"'{what}' is normalised by {mode!r}; known are {['MEAN_STD', *BOUNDS]}")
        names = ("mean", "std") if mode == "MEAN_STD" else BOUNDS[mode]
        parts = []
        for name in names:
            if name not in statistics:
                raise CheckpointError(
                    f"the checkpoint holds no statistics '{name}' of '{what}', which {mode} needs: a base model "
                    "must be fine-tuned first, or given the statistics of its data set"
                )
            part = np.asarray(statistics[name], dtype=np.float32).reshape(-1)
            if part.shape != (dim,):
                raise CheckpointError(f"statistics '{name}' of '{what}' have {part.size} values, the feature {dim}")
            if not np.isfinite(part).all():
                raise CheckpointError(f"statistics '{name}' of '{what}' hold NaN or infinity: it was never normalised")
            parts.append(part)
        small = np.float32(eps)
        openpi = eps == OPENPI_EPS
        offset, second = parts
        if mode == "MEAN_STD":
            return cls(offset, second + small, second + small if openpi else second, True)
        span = second - offset
        span = span + small if openpi else np.where(span == 0, small, span).astype(np.float32)
        return cls(offset, span, span, False)

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return int(self.offset.size)

    def normalize(self, values: npt.ArrayLike) -> FloatArray:
        """Map the robot's units to the model's, (..., dim), float32."""
        scaled: FloatArray = (np.asarray(values, dtype=np.float32) - self.offset) / self.divisor
        return scaled if self.centred else np.float32(2.0) * scaled - np.float32(1.0)

    def unnormalize(self, values: npt.ArrayLike) -> FloatArray:
        """Map the model's units to the robot's, (..., dim), float32."""
        raw = np.asarray(values, dtype=np.float32)
        if self.centred:
            return raw * self.factor + self.offset
        out: FloatArray = (raw + np.float32(1.0)) * self.factor / np.float32(2.0) + self.offset
        return out


@dataclass(frozen=True, eq=False)
class Normalization:
    """Says how a checkpoint normalises state and action.

    Attributes:
        modes: Feature → ``MEAN_STD``, or one of :data:`BOUNDS`.
        statistics: Feature → its statistics.
        eps: See :meth:`Units.of`.
    """

    modes: Mapping[str, str]
    statistics: Mapping[str, Statistics]
    eps: float = 1e-8

    @classmethod
    def of(cls, mode: str, statistics: Mapping[str, Mapping[str, Any]]) -> Normalization:
        """Normalise all features in one way; statistics may be lists."""
        vectors = {
            feature: {name: np.asarray(value, dtype=np.float32) for name, value in parts.items()}
            for feature, parts in statistics.items()
        }
        return cls(dict.fromkeys(statistics, mode), vectors)

    def units(self, feature: str, dim: int) -> Units:
        """Make the units of a feature of ``dim`` values; see :meth:`Units.of` for errors."""
        return Units.of(self.modes.get(feature, "none"), self.statistics.get(feature, {}), dim, feature, self.eps)


@dataclass(frozen=True)
class Features:
    """Everything that a ``config.json`` says of a policy's inputs and outputs.

    Attributes:
        cameras: Name in the file (without ``observation.images.``) → name in ``Frame.images``, in the model's order;
            empty ones are left out: nothing attends to them.
        state_dim: Values of the state.
        action_dim: Values of an action.
    """

    cameras: Mapping[str, str]
    state_dim: int
    action_dim: int


def read_features(data: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Features:
    """Read the features of a ``config.json``; the order of the cameras is that of the file.

    Args:
        data: The file's contents.
        preprocessor: Those of ``policy_preprocessor.json``, which may rename cameras.

    Raises:
        CheckpointError: If there is no camera, state or action.
    """
    inputs, outputs = data.get("input_features"), data.get("output_features")
    if not isinstance(inputs, Mapping) or not isinstance(outputs, Mapping):
        raise CheckpointError("config.json holds no input_features and output_features: is this a LeRobot policy?")
    renamed = _step(preprocessor, "rename_observations_processor").get("rename_map") or {}
    given = {own: name for name, own in renamed.items()}
    images = [key for key, value in inputs.items() if value.get("type") == "VISUAL" and not key.startswith(EMPTY)]
    cameras = {_short(key): _short(given.get(key, key)) for key in images}
    if not cameras:
        raise CheckpointError("config.json names no camera (input_features of type VISUAL)")
    return Features(cameras, _length(inputs, STATE), _length(outputs, ACTION))


def read_processors(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Read the processors' JSON; ``None`` for what an old checkpoint does not have.

    Raises:
        CheckpointError: If one is damaged, or one alone is there.
    """
    files = [folder / PREPROCESSOR, folder / POSTPROCESSOR]
    there = [file.is_file() for file in files]
    if any(there) and not all(there):
        raise CheckpointError(f"{files[there.index(False)]} is missing: is the checkpoint's folder complete?")
    before, after = (read_json(file) if file.is_file() else None for file in files)
    for file, content in zip(files, (before, after), strict=True):
        steps = [] if content is None else content.get("steps")
        if not isinstance(steps, list) or not all(
            isinstance(step, dict) and isinstance(step.get("config") or {}, dict) for step in steps
        ):
            raise CheckpointError(f"{file} is damaged: steps must be a list of JSON objects, each with its config")
    return before, after


def read_normalization(folder: Path, data: Mapping[str, Any]) -> Normalization:
    """Read how state and action are normalised: from the processors, or from the weights of an old checkpoint.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    before, after = read_processors(folder)
    modes: dict[str, str] = {}
    statistics: dict[str, Statistics] = {}
    eps = 1e-8
    for feature, kind, processor, name, old in (
        (STATE, "STATE", before, "normalizer_processor", "normalize_inputs.buffer_observation_state."),
        (ACTION, "ACTION", after, "unnormalizer_processor", "unnormalize_outputs.buffer_action."),
    ):
        config, file = _step(processor, name), _state_file(processor, name)
        modes[feature] = str((config.get("norm_map") or data.get("normalization_mapping") or {}).get(kind))
        eps = float(config.get("eps", eps))
        if file is not None:
            statistics[feature] = _read(folder / file, f"{feature}.")
        elif processor is None and (folder / WEIGHTS).is_file():
            statistics[feature] = _read(folder / WEIGHTS, old)
    return Normalization(modes, statistics, eps)


def write_processors(folder: Path, normalization: Normalization, data: Mapping[str, Any], max_tokens: int) -> None:
    """Write the processors' JSON and statistics as far as this library reads them.

    Args:
        folder: The checkpoint's.
        normalization: Of state and action.
        data: Contents of ``config.json``.
        max_tokens: Longest prompt.
    """
    norm_map = {"VISUAL": "IDENTITY", **{kind: normalization.modes[name] for name, kind in KINDS.items()}}
    features = {**data["input_features"], **data["output_features"]}
    config = {"eps": normalization.eps, "features": features, "norm_map": norm_map}
    tensors = {
        f"{feature}.{name}": np.ascontiguousarray(value, dtype=np.float32)
        for feature, parts in normalization.statistics.items()
        for name, value in parts.items()
    }
    tokens = {"max_length": max_tokens, "padding_side": "right", "padding": "max_length", "truncation": True}
    before = [{"registry_name": "tokenizer_processor", "config": tokens}]
    for file, steps, name in ((PREPROCESSOR, before, "normalizer"), (POSTPROCESSOR, [], "unnormalizer")):
        state_file = f"{file.removesuffix('.json')}_step_{len(steps)}_{name}_processor.safetensors"
        steps = [*steps, {"registry_name": f"{name}_processor", "config": config, "state_file": state_file}]
        content = {"name": file.removesuffix(".json"), "steps": steps}
        write_object(folder / file, content)
        write_whole(folder / state_file, lambda partial: save_file(tensors, partial))


def tokenizer_length(preprocessor: Mapping[str, Any] | None, default: int) -> int:
    """Read the most tokens that a prompt may have."""
    return int(_step(preprocessor, "tokenizer_processor").get("max_length", default))


def relative_values(
    data: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, action_dim: int
) -> tuple[bool, ...]:
    """Read which values of an action are relative to the state's at the same place; empty for none.

    Args:
        data: Contents of ``config.json``.
        preprocessor: Those of ``policy_preprocessor.json``, which come first.
        action_dim: Values of an action.
    """
    step = _step(preprocessor, "relative_actions_processor") or {
        "enabled": data.get("use_relative_actions"),
        "exclude_joints": data.get("relative_exclude_joints"),
        "action_names": data.get("action_feature_names"),
    }
    if not step.get("enabled"):
        return ()
    excluded = [str(name).lower() for name in step.get("exclude_joints") or () if name]
    names = [str(name).lower() for name in step.get("action_names") or ()][:action_dim]
    relative = [not any(part in name for part in excluded) for name in names]
    return (*relative, *(True,) * (action_dim - len(relative)))


def find_tokenizer(
    folder: Path, other: str | Path | None, usual: str, vocab_size: int, what: str = TOKENIZER
) -> Encode:
    """Load the tokenizer, which a LeRobot checkpoint does not hold by itself.

    Args:
        folder: The checkpoint's.
        other: A second folder, or an id on the Hugging Face hub; ``None`` for the checkpoint's own folder.
        usual: Where it is usually had from, for the error message.
        vocab_size: Rows of the model's embedding.
        what: Name of the file.

    Raises:
        CheckpointError: If there is none, it is damaged, or it is of another vocabulary.
    """
    place = folder if other is None else find_folder(other, TOKENIZER_FILES)
    if not (place / what).is_file():
        raise CheckpointError(
            f"{place} holds no {what}: LeRobot's checkpoints do not; copy that of {usual} there, or pass "
            f"`tokenizer`, a folder or hub id that has it (--tokenizer), or `encode`"
        )
    encode = load_tokenizer(place)
    size = encode.tokenizer.get_vocab_size() if isinstance(encode, FileTokenizer) else vocab_size
    if abs(size - vocab_size) > TOKENIZER_SLACK:
        raise CheckpointError(
            f"{place / what} has a vocabulary of {size} tokens, the model one of {vocab_size}: take that of {usual}"
        )
    return encode


def _step(processor: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """Get the configuration of a processor's step; empty if there is none."""
    for step in (processor or {}).get("steps", ()):
        if step.get("registry_name") == name:
            config: Mapping[str, Any] = step.get("config") or {}
            return config
    return {}


def _state_file(processor: Mapping[str, Any] | None, name: str) -> str | None:
    for step in (processor or {}).get("steps", ()):
        if step.get("registry_name") == name:
            file = step.get("state_file")
            if file is not None and (not isinstance(file, str) or not file or Path(file).name != file):
                raise CheckpointError(f"state_file {file!r} of {name} must be the name of a file beside it")
            return file
    return None


def _read(file: Path, prefix: str) -> dict[str, npt.NDArray[np.float32]]:
    """Read the vectors whose names begin with ``prefix``."""
    try:
        with safe_open(file, framework="pt") as content:
            keys = [key for key in content.keys() if key.removeprefix("model.").startswith(prefix)]  # noqa: SIM118
            tensors = {key.removeprefix("model.").removeprefix(prefix): content.get_tensor(key) for key in keys}
    except Exception as error:  # the reader's own, the system's, or of a text that is none
        raise damaged(file, error) from error
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _length(features: Mapping[str, Any], key: str) -> int:
    shape = (features.get(key) or {}).get("shape")
    if not isinstance(shape, list) or len(shape) != 1:
        raise CheckpointError(f"config.json describes no vector '{key}'")
    return int(shape[0])


def _short(key: str) -> str:
    return key.removeprefix(IMAGES).removeprefix("observation.")
