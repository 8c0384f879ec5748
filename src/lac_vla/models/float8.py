"""Weights in float8: half of bfloat16's memory, and of what a GPU has to read for a robot."""

from __future__ import annotations

from torch import nn

from lac_vla.errors import MissingExtraError
from lac_vla.models.vla import VLA


def store_in_float8(vla: VLA) -> None:
    """Keep the matrices of all decoder layers, an action expert's too, in float8, one scale per row, in place.

    They are multiplied in the model's own type, by torchao (https://github.com/pytorch/ao, ``Float8WeightOnlyConfig``).
    Embeddings, vision encoder, projector and head stay as they are.

    Args:
        vla: A model that will not be trained or saved.

    Raises:
        MissingExtraError: If torchao is not installed.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingExtraError("float8", "Storing weights in float8") from error
    for module in vla.module.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            quantize_(module, Float8WeightOnlyConfig(), filter_fn=lambda part, _: isinstance(part, nn.Linear))
