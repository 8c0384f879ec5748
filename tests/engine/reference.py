"""An independent Llama decoder with mixed keys and values, written from the definition: slow, plain, dense.

It shares no code with the engine. Every row is computed in every layer; a token that the decision does not compute in
a layer has its key and value there replaced by the remembered ones (reuse) or hidden from everyone (prune).
"""

from __future__ import annotations

import math

import torch

from lac_vla.types import Decision, SkippedTokens


class ReferenceDecoder:
    """Runs prompts one after the other and remembers the keys and values of all their slots.

    Args:
        weights: State dict of a Hugging Face Llama (names as there).
        heads: Query heads.
        kv_heads: Key/value heads.
        theta: Rotary base.
        eps: Of the RMS norms.
        causal: Whether a row sees what is before it alone, or everything.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        heads: int,
        kv_heads: int,
        theta: float = 10000.0,
        eps: float = 1e-6,
        *,
        causal: bool = True,
    ) -> None:
        self.w = {name: value.double() for name, value in weights.items()}
        self.heads, self.kv_heads, self.theta, self.eps = heads, kv_heads, theta, eps
        self.causal = causal
        self.n_layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
        self.old: list[tuple[torch.Tensor, torch.Tensor]] = []

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.w[name] * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        length, half = x.shape[1], x.shape[2] // 2
        out = torch.empty_like(x)
        for position in range(length):
            for i in range(half):
                angle = position * self.theta ** (-i / half)
                a, b = x[:, position, i], x[:, position, i + half]
                out[:, position, i] = a * math.cos(angle) - b * math.sin(angle)
                out[:, position, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

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
                later = torch.ones(length, length).triu(1).bool() & self.causal
                scores = scores.masked_fill(later | hidden_slots, -torch.inf)
                # A hidden slot's own row may see nothing; nobody looks at it.
                attended.append(torch.nan_to_num(scores.softmax(-1)) @ v[group])
            x = x + torch.cat(attended, -1) @ self.w[p + "self_attn.o_proj.weight"].T
            y = self.norm(x, p + "post_attention_layernorm.weight")
            gate, up = (y @ self.w[f"{p}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (gate * torch.sigmoid(gate) * up) @ self.w[p + "mlp.down_proj.weight"].T
        self.old = remembered
        return self.norm(x, "model.norm.weight")
