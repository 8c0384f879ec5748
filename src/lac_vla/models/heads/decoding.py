"""Action tokens by draft and verification: the same tokens, fewer passes.

A draft rides along behind the prompt. One pass tells what greedy decoding says behind every prefix of it, so the draft
is accepted up to the first token that greedy decoding would not have chosen. From there on the model's own answers are
the next draft, all remaining positions in one pass (Jacobi or fixed-point iteration: Song et al., arXiv 2002.03629;
Santilli et al., arXiv 2305.10427). A pass settles at least one more token, so that it ends, and what is settled is what
greedy decoding yields: every settled token was computed behind settled tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence

import torch

from lac_vla.errors import InputError, NonFiniteError
from lac_vla.models.heads.base import NON_FINITE, AppendRows


def best(scores: torch.Tensor) -> list[int]:
    """Pick the token of the best score in every row, (n, vocabulary) → n ids.

    Raises:
        NonFiniteError: If a score is NaN or infinite.
    """
    total = scores.sum(dtype=torch.float32)  # not finite as soon as one score is not, and the cheapest way to see
    tokens: list[int] = scores.argmax(dim=-1).tolist()
    if not math.isfinite(total):
        raise NonFiniteError(NON_FINITE)
    return tokens


def decode_tokens(
    embed: Callable[[torch.Tensor], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    n_tokens: int,
    draft: Sequence[int] = (),
) -> Generator[AppendRows, torch.Tensor, list[int]]:
    """Decode ``n_tokens`` tokens greedily.

    Args:
        embed: Token ids (n,) → embeddings (n, width).
        logits: Last hidden states (n, width) → scores (n, vocabulary).
        hidden: Last hidden states, (..., width), the last of which are the prompt's last row and the draft's.
        n_tokens: How many.
        draft: A guess at the first tokens, already behind the prompt; empty to decode one by one.

    Returns:
        The token ids: the same with any draft, but for ties within the rounding of a pass over several rows.

    Raises:
        InputError: If the draft is longer than what is asked for without its last token.
        NonFiniteError: If a score is NaN or infinite.
    """
    if len(draft) >= n_tokens:
        raise InputError(f"a draft of {len(draft)} tokens for {n_tokens}: the last one is never read, leave it out")
    tokens: list[int] = []
    guess, rows = list(draft), hidden[-1 - len(draft) :]
    while True:
        greedy = best(logits(rows))  # each behind the tokens and the guesses before it
        agreed = next((i for i, (a, b) in enumerate(zip(guess, greedy, strict=False)) if a != b), len(guess))
        tokens += greedy[: agreed + 1]
        if len(tokens) >= n_tokens:
            return tokens
        guess = greedy[agreed + 1 :]
        appended = torch.tensor([tokens[-1], *guess[:-1]], device=hidden.device)
        rows = yield AppendRows(embed(appended), len(tokens) - 1)
