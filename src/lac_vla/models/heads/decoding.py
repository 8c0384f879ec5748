"""Action tokens by draft and verification: the same tokens, fewer passes.

A draft rides along behind the prompt. One pass tells what greedy decoding says behind every prefix of it, so the draft
is accepted up to the first token that greedy decoding would not have chosen. From there on the model's own answers are
the next draft, all remaining positions in one pass (Jacobi or fixed-point iteration: Song et al., arXiv 2002.03629;
Santilli et al., arXiv 2305.10427). A pass settles at least one more token, so that it ends, and what is settled is what
greedy decoding yields: every settled token was computed behind settled tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch

from lac_vla.errors import InputError, NonFiniteError
from lac_vla.models.heads.base import NON_FINITE, AppendRows


def best(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the token of the best score in every row, on the device that holds the scores.

    Args:
        scores: (n, vocabulary).

    Returns:
        The ids, int64, (n,); and the sum of the scores, float32, (): not finite as soon as one score is not, and the
        cheapest way to see. Both are for :func:`read`.
    """
    return scores.argmax(dim=-1), scores.sum(dtype=torch.float32)


def read(tokens: torch.Tensor, total: torch.Tensor) -> list[int]:
    """Wait for token ids, (n,), and for the sum of the scores that they were picked by, in one copy.

    Raises:
        NonFiniteError: If a score is NaN or infinite.
    """
    *ids, finite = torch.cat([tokens, total.isfinite().to(tokens.dtype).view(1)]).tolist()
    if not finite:
        raise NonFiniteError(NON_FINITE)
    return ids


def decode_tokens(
    embed: Callable[[torch.Tensor], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    n_tokens: int,
    draft: Sequence[int] = (),
) -> Generator[AppendRows, torch.Tensor, list[int]]:
    """Decode ``n_tokens`` tokens greedily.

    Without a draft nothing waits before the last token: what is decoded is embedded where it is. A draft has to be
    compared, so that every pass is waited for.

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
    if not draft:
        return (yield from _one_by_one(embed, logits, hidden[-1:], n_tokens))
    tokens: list[int] = []
    guess, rows = list(draft), hidden[-1 - len(draft) :]
    while True:
        chosen, total = best(logits(rows))  # each behind the tokens and the guesses before it
        greedy = read(chosen, total)
        agreed = next((i for i, (a, b) in enumerate(zip(guess, greedy, strict=False)) if a != b), len(guess))
        tokens += greedy[: agreed + 1]
        if len(tokens) >= n_tokens:
            return tokens
        guess = greedy[agreed + 1 :]
        settled = min(agreed, len(greedy) - 1)
        appended = chosen[settled : settled + max(1, len(guess))]  # the last settled token, and all guesses but one
        rows = yield AppendRows(embed(appended), len(tokens) - 1)


def _one_by_one(
    embed: Callable[[torch.Tensor], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    n_tokens: int,
) -> Generator[AppendRows, torch.Tensor, list[int]]:
    """Decode token by token on the device; see :func:`decode_tokens`."""
    token, total = best(logits(rows))
    tokens = [token]
    while len(tokens) < n_tokens:
        rows = yield AppendRows(embed(token), len(tokens) - 1)
        token, more = best(logits(rows))
        total = total + more
        tokens.append(token)
    return read(torch.cat(tokens), total)
