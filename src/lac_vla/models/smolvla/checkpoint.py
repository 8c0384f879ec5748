"""SmolVLA checkpoints in LeRobot's layout.

A folder holds neither the tokenizer nor the language model's configuration. Sizes are read from the weights' shapes;
what these do not tell, the width of a head, is that of the published models, or what ``vlm_config.json`` says, the
``config.json`` of a language model of one's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.heads.flow_matching import FlowConfig
from lac_vla.models.lerobot_layout import (
    find_tokenizer,
    read_features,
    read_processors,
    read_units,
    tokenizer_length,
)
from lac_vla.models.siglip import SiglipConfig
from lac_vla.models.smolvla.build import build_smolvla
from lac_vla.models.smolvla.config import SmolVLAConfig, TextConfig
from lac_vla.models.smolvla.model import SmolVLAModel
from lac_vla.models.tokenizer import Encode, WordHash
from lac_vla.models.vla import VLA
from lac_vla.models.weights import file_shapes, load_weights, randomise, read_json

VLM_CONFIG = "vlm_config.json"
VLM = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
HEAD_DIM = 64
"""Width of a head in every published model: of its tower, its language model and its expert."""
UNUSED = re.compile(
    r"model\.vlm_with_expert\.vlm\.lm_head\.weight|.*\.rotary_emb\.inv_freq|(un)?normalize_(in|out|tar)\w*\..*|"
    r"model\.(un)?normalize_(in|out|tar)\w*\..*"
)
"""Weights that no action depends on, and the statistics of old checkpoints."""
TEXT, EXPERT, SIGLIP = (
    f"model.vlm_with_expert.{part}." for part in ("vlm.model.text_model", "lm_expert", "vlm.model.vision_model")
)
CONNECTOR = "model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight"
