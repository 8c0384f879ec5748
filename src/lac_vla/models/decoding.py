"""Greedy decoding of a fixed number of tokens, one by one or by draft and verification: the same tokens, fewer passes.

A draft rides along behind the prompt. One pass tells what greedy decoding says behind every prefix of it, so the draft
stands up to the first token that greedy decoding would not have chosen. From there on the model's own answers are the
next draft, all remaining positions in one pass (Jacobi or fixed-point iteration: Song et al., arXiv 2002.03629;
Santilli et al., arXiv 2305.10427). A pass settles at least one more token, so that it ends, and what is settled is what
greedy decoding yields: every settled token was computed behind settled tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lac_vla.errors import InputError
from lac_vla.models.base import Extend


def decode(
    embed: Callable[[torch.Tensor], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    extend: Extend,
    n_tokens: int,
    draft: Sequence[int] = (),
) -> list[int]:
    """Decode ``n_tokens`` tokens greedily.

    Args:
        embed: Token ids (n,) → embeddings (n, width).
        logits: Last hidden states (n, width) → scores (n, vocabulary).
        hidden: Last hidden states of the prompt and of the draft behind it, (..., width): the prompt's last row and
            those of the draft are read.
        extend: Appends tokens to the sequence, or over those of a guess that do not stand.
        n_tokens: How many.
        draft: A guess at the first tokens, already behind the prompt; empty to decode one by one.

    Returns:
        The token ids: the same with any draft, but for ties within the rounding of a pass over several rows.

    Raises:
        InputError: If the draft is longer than what is asked for without its last token.
    """
    if len(draft) >= n_tokens:
        raise InputError(f"a draft of {len(draft)} tokens for {n_tokens}: the last one is never read, leave it out")
    tokens: list[int] = []
    guess, rows = list(draft), hidden[-1 - len(draft) :]
    while True:
        said: list[int] = logits(rows).argmax(dim=-1).tolist()  # each behind the tokens and the guesses before it
        agreed = next((i for i, (a, b) in enumerate(zip(guess, said, strict=False)) if a != b), len(guess))
        tokens += said[: agreed + 1]
        if len(tokens) >= n_tokens:
            return tokens
        guess = said[agreed + 1 :]
        rows = extend(embed(torch.tensor([tokens[-1], *guess[:-1]], device=hidden.device)), len(tokens) - 1)
