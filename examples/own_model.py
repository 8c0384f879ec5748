"""A VLA of one's own: a toy on Qwen2 with random weights, in the four parts that the engine runs.

In this folder, as for any model of yours:

    lac bench --model own_model:load --quick --policies motion:ratio=0.5
    lac train --model own_model:load --dataset DATASET --camera front=KEY --out outputs/toy-lac
    lac serve --model own_model:load --policy lac:path=outputs/toy-lac --camera front=observation/image
"""

import numpy as np
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lac_vla import VLA, InputError, TokenLayout
from lac_vla.models.heads.base import ActionHead
from lac_vla.models.images import resize_naive
from lac_vla.models.llama import LlamaDecoder
from lac_vla.models.protocols import Processor, PromptInputs, VisionEncoder

GRIDS, PATCH, WIDTH, ACTION_DIM = {"front": (8, 8)}, 8, 64, 7  # camera → rows and columns of its visual tokens
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": 257, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 4, **HEADS}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.language_model = Qwen2ForCausalLM(Qwen2Config(**SIZES))  # under this name, timed against stock as well
        self.action = nn.Linear(WIDTH, ACTION_DIM)


class ToyProcessor(Processor):
    grids = GRIDS

    def __init__(self, embed):
        self.embed_ids = embed

    def images(self, frame):
        if missing := [name for name in GRIDS if name not in frame.images]:
            raise InputError(f"the frame lacks the cameras {missing}")
        return {name: resize_naive(frame.images[name], rows * PATCH) for name, (rows, _) in GRIDS.items()}

    def prompt(self, frame):
        ids = [256, *frame.instruction.encode()]  # one token that stands before the picture, then bytes
        return PromptInputs(ids, None, TokenLayout.of(GRIDS, n_prefix=1, n_suffix=len(ids) - 1))

    def embed(self, prompt):
        rows = self.embed_ids(prompt.ids)
        return rows[:1], rows[1:]


class ToyVision(VisionEncoder):
    def __init__(self, patches):
        self.patches = patches

    def encode_tokens(self, stem, token_mask=None, kv_cache=None):
        weight = self.patches.weight
        pixels = torch.from_numpy(stem["front"]).to(weight.device, weight.dtype) / 127.5 - 1
        tokens = self.patches(pixels.permute(2, 0, 1)[None])[0].flatten(1).T
        return tokens if token_mask is None else tokens[torch.from_numpy(token_mask)]


class ToyHead(ActionHead):
    def __init__(self, linear):
        self.linear = linear

    def decode(self, context):
        action = self.linear(context.hidden[-1]).float().cpu().numpy().astype(np.float32)
        return action, {"normalized": action.tolist()}
        yield  # a generator, although it appends no rows


def load(*, device: torch.device, dtype: torch.dtype, seed: int = 0) -> VLA:
    torch.manual_seed(seed)
    toy = Toy().to(device, dtype)  # here one's own weights are loaded
    decoder = LlamaDecoder(toy.language_model)
    parts = ToyProcessor(decoder.embed), ToyVision(toy.patches), decoder, ToyHead(toy.action)
    return VLA("toy", "toy", None, toy, *parts)
