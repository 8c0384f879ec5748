"""An independent Llama or Gemma decoder with mixed keys and values, written from the definition: slow, plain, dense.

It shares no code with the engine. Every row is computed in every layer; a token that the decision does not compute in
a layer has its key and value there replaced by the remembered ones (reuse) or hidden from everyone (prune).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla.types import Decision, SkippedTokens


class ReferenceDecoder:
    """Runs prompts one after the other and remembers the keys and values of all their slots.

    Args:
        weights: State dict of a Hugging Face Llama (names as there).
        heads: Query heads.
        kv_heads: Key/value heads.
        theta: Rotary base.
        eps: Of the RMS norms.
        gain: Added to the weights of the RMS norms.
        activate: Activation of the feed-forward networks.
        sees: Length of a prompt → which slots its rows see, bool, (length, length); by default causal.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        heads: int,
        kv_heads: int,
        theta: float = 10000.0,
        eps: float = 1e-6,
        gain: float = 0.0,
        activate: Callable[[torch.Tensor], torch.Tensor] = F.silu,
        sees: Callable[[int], torch.Tensor] = lambda length: torch.ones(length, length).tril().bool(),
    ) -> None:
        self.w = {name: value.double() for name, value in weights.items()}
        self.heads, self.kv_heads, self.theta, self.eps = heads, kv_heads, theta, eps
        self.gain, self.activate, self.sees = gain, activate, sees
        self.n_layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
        self.old: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._angles: dict[tuple[int, int], torch.Tensor] = {}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return (self.gain + self.w[name]) * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        length, half = x.shape[1], x.shape[2] // 2
        if (length, half) not in self._angles:
            angles = [[position * self.theta ** (-i / half) for i in range(half)] for position in range(length)]
            self._angles[length, half] = torch.tensor(angles, dtype=torch.float64)
        cos, sin = self._angles[length, half].cos(), self._angles[length, half].sin()
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def run(self, embeddings: torch.Tensor, start: int, decision: Decision) -> torch.Tensor:
        """Last hidden states (after the final norm) of all rows of ``[prefix | visual | rest]``, (length, width).

        Args:
            embeddings: Of all tokens, appended ones included, (length, width).
            start: Slot of the first visual token.
            decision: What was computed for the visual tokens.
        """
        x = embeddings.double()
        length = x.shape[0]
        depth = torch.full((length,), self.n_layers)
        depth[start : start + len(decision.exit_layer)] = torch.from_numpy(decision.exit_layer)
        remembered = []
        for index in range(self.n_layers):
            p = f"model.layers.{index}."
            y = self.norm(x, p + "input_layernorm.weight")
            split = {
                part: (y @ self.w[f"{p}self_attn.{part}_proj.weight"].T).view(length, n, -1).transpose(0, 1)
                for part, n in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads))
            }
            q, k, v = self.rotate(split["q"]), self.rotate(split["k"]), split["v"].clone()
            hidden_slots = torch.zeros(length, dtype=torch.bool)
            for slot in range(length):
                if depth[slot] <= index:
                    if decision.skipped is SkippedTokens.PRUNE:
                        hidden_slots[slot] = True
                    else:
                        k[:, slot], v[:, slot] = self.old[index][0][:, slot], self.old[index][1][:, slot]
            remembered.append((k, v))
            attended = []
            for head in range(self.heads):
                group = head // (self.heads // self.kv_heads)
                scores = q[head] @ k[group].T / math.sqrt(q.shape[-1])
                scores = scores.masked_fill(~self.sees(length) | hidden_slots, -torch.inf)
                # A hidden slot's own row may see nothing; nobody looks at it.
                attended.append(torch.nan_to_num(scores.softmax(-1)) @ v[group])
            x = x + torch.cat(attended, -1) @ self.w[p + "self_attn.o_proj.weight"].T
            y = self.norm(x, p + "post_attention_layernorm.weight")
            gate, up = (y @ self.w[f"{p}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (self.activate(gate) * up) @ self.w[p + "mlp.down_proj.weight"].T
        self.old = remembered
        return self.norm(x, "model.norm.weight")


class ReferenceTower:
    """A vision transformer that keeps the keys and values of patches that are not computed: of one camera's pictures.

    Written from the definition, too: every row is computed in every block, and what was not to be computed is thrown
    away; its key and value are the remembered ones.

    Args:
        weights: State dict of a transformer (timm's names).
        heads: Attention heads.
        depth: Blocks that are run.
        extra: Class and register tokens, which stand first and are always computed.
    """

    def __init__(self, weights: dict[str, torch.Tensor], heads: int, depth: int, extra: int) -> None:
        self.w = {name: value.double() for name, value in weights.items()}
        self.heads, self.depth, self.extra = heads, depth, extra
        self.old: list[torch.Tensor] = []

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def run(self, embedded: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
        """Features of all patches, (patches, width); those of patches that are not ``computed`` mean nothing.

        Args:
            embedded: Input of the first block, (extra + patches, width).
            computed: Which patches are, bool, (patches,).
        """
        x = embedded.double()
        kept = torch.cat([torch.zeros(self.extra, dtype=torch.bool), ~computed])
        remembered = []
        for index in range(self.depth):
            p = f"blocks.{index}."
            qkv = self.linear(self.norm(x, p + "norm1"), p + "attn.qkv").unflatten(-1, (3, self.heads, -1))
            q, new = qkv[:, 0].transpose(0, 1), qkv[:, 1:].permute(1, 2, 0, 3).clone()
            if kept.any():
                new[:, :, kept] = self.old[index][:, :, kept]
            remembered.append(new)
            scores = q @ new[0].transpose(1, 2) / math.sqrt(q.shape[-1])
            attended = (scores.softmax(-1) @ new[1]).transpose(0, 1).flatten(1)
            x = x + self.w.get(p + "ls1.scale_factor", 1.0) * self.linear(attended, p + "attn.proj")
            y = F.gelu(self.linear(self.norm(x, p + "norm2"), p + "mlp.fc1"))
            x = x + self.w.get(p + "ls2.scale_factor", 1.0) * self.linear(y, p + "mlp.fc2")
        self.old = remembered
        return x[self.extra :]
