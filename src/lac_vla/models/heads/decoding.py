"""Action tokens by draft and verification: the same tokens, fewer passes.

A draft rides along behind the prompt. One pass tells what greedy decoding says behind every prefix of it, so the draft
is accepted up to the first token that greedy decoding would not have chosen. From there on the model's own answers are
the next draft, all remaining positions in one pass (Jacobi or fixed-point iteration: Song et al., arXiv 2002.03629;
Santilli et al., arXiv 2305.10427). A pass settles at least one more token, so that it ends, and what is settled is what
greedy decoding yields: every settled token was computed behind settled tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from lac_vla.errors import InputError, NonFiniteError
from lac_vla.models.heads.base import NON_FINITE, AppendRows, Together


class Picked(NamedTuple):
    """Holds what was picked in some rows, on the device that has their scores.

    Attributes:
        ids: Tokens, int64, (n,).
        embedded: Their embeddings, (n, width).
        totals: Sums of the scores, float32, (n,): not finite as soon as one score is not.
    """

    ids: torch.Tensor
    embedded: torch.Tensor
    totals: torch.Tensor


Pick: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[Picked]]
"""Last hidden states of several sequences, each (n, width) → what is picked in each; see :func:`pick`."""


def pick(
    embed: Callable[[torch.Tensor], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    rows: Sequence[torch.Tensor],
) -> list[Picked]:
    """Pick the token of the best score in every row of several sequences, at once for all of them.

    Args:
        embed: Token ids (n,) → embeddings (n, width).
        logits: Last hidden states (n, width) → scores (n, vocabulary).
        rows: Last hidden states of every sequence, each (n, width).
    """
    scores = logits(rows[0] if len(rows) == 1 else torch.cat(list(rows)))
    ids, counts = scores.argmax(dim=-1), [len(own) for own in rows]
    parts = (torch.split(part, counts) for part in (ids, embed(ids), scores.sum(dim=-1, dtype=torch.float32)))
    return [Picked(*own) for own in zip(*parts, strict=True)]


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
    pick: Pick,
    hidden: torch.Tensor,
    n_tokens: int,
    draft: Sequence[int] = (),
) -> Generator[AppendRows | Together, Any, list[int]]:
    """Decode ``n_tokens`` tokens greedily; what is picked is picked together with other sessions.

    Without a draft nothing waits before the last token: what is decoded is embedded where it is. A draft has to be
    compared, so that every pass is waited for.

    Args:
        pick: Picks tokens: :func:`pick` with the model's embedding and scores.
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
        return (yield from _one_by_one(pick, hidden[-1:], n_tokens))
    tokens: list[int] = []
    guess, rows = list(draft), hidden[-1 - len(draft) :]
    while True:
        chosen: Picked = yield Together(pick, rows)  # each behind the tokens and the guesses before it
        greedy = read(chosen.ids, chosen.totals.sum())
        agreed = next((i for i, (a, b) in enumerate(zip(guess, greedy, strict=False)) if a != b), len(guess))
        tokens += greedy[: agreed + 1]
        if len(tokens) >= n_tokens:
            return tokens
        guess = greedy[agreed + 1 :]
        settled = min(agreed, len(greedy) - 1)
        appended = slice(settled, settled + max(1, len(guess)))  # the last settled token, and all guesses but one
        rows = yield AppendRows(chosen.embedded[appended], len(tokens) - 1)


def _one_by_one(pick: Pick, rows: torch.Tensor, n_tokens: int) -> Generator[AppendRows | Together, Any, list[int]]:
    """Decode token by token on the device; see :func:`decode_tokens`."""
    chosen: Picked = yield Together(pick, rows)
    tokens, total = [chosen.ids], chosen.totals
    while len(tokens) < n_tokens:
        rows = yield AppendRows(chosen.embedded, len(tokens) - 1)
        chosen = yield Together(pick, rows)
        total = total + chosen.totals
        tokens.append(chosen.ids)
    return read(torch.cat(tokens), total)
