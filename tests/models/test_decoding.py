"""Draft and verification: the tokens of greedy decoding, whatever the draft, in fewer passes the better it is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lac_vla import InputError
from lac_vla.models.heads.base import AppendRows, alone
from lac_vla.models.heads.decoding import Picked, decode_tokens, pick

VOCABULARY, N = 5, 7


class Chain:
    """A model whose next token is a random function of all tokens before it; a hidden state holds the sequence."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.sequence: list[int] = []
        self.passes: list[tuple[int, int]] = []

    def next(self, tokens: Sequence[int]) -> int:
        generator = torch.Generator().manual_seed(hash((self.seed, *tokens)) % 2**31)
        return int(torch.randint(VOCABULARY, (1,), generator=generator))

    def greedy(self) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < N:
            tokens.append(self.next(tokens))
        return tokens

    def hidden(self, start: int) -> torch.Tensor:
        """Rows behind the first ``start``, start + 1, … appended tokens, each with the answer there."""
        return torch.tensor([[self.next(self.sequence[:i])] for i in range(start, len(self.sequence) + 1)])

    def extend(self, rows: AppendRows) -> torch.Tensor:
        kept = len(self.sequence) if rows.at is None else rows.at
        assert kept <= len(self.sequence)
        assert rows.stack is None
        self.sequence = self.sequence[:kept] + rows.embeddings[:, 0].tolist()
        self.passes.append((kept, len(self.sequence)))
        return self.hidden(kept + 1)

    def decode(self, draft: Sequence[int]) -> list[int]:
        self.sequence = list(draft)
        decoding = alone(decode_tokens(pick_tokens, self.hidden(0), N, draft))
        try:
            rows = next(decoding)
            while True:
                rows = decoding.send(self.extend(rows))
        except StopIteration as answer:
            tokens: list[int] = answer.value
            return tokens


def pick_tokens(rows: Sequence[torch.Tensor]) -> list[Picked]:
    return pick(lambda ids: ids[:, None], lambda hidden: torch.eye(VOCABULARY)[hidden[:, 0]], rows)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, VOCABULARY - 1), max_size=N - 1))
def test_any_draft_yields_the_greedy_tokens(seed: int, draft: list[int]) -> None:
    model = Chain(seed)
    tokens = model.decode(draft)
    assert tokens == model.greedy()
    assert model.sequence == tokens[:-1]  # what is in the cache is what was said
    assert len(model.passes) <= N - 1


@pytest.mark.parametrize("accepted", range(N))
def test_a_draft_is_accepted_up_to_its_first_mistake(accepted: int) -> None:
    model = Chain(3)
    greedy = model.greedy()
    draft = [*greedy[:accepted], *((token + 1) % VOCABULARY for token in greedy[accepted : N - 1])]
    assert model.decode(draft) == greedy
    assert (model.passes[0][0] if model.passes else N - 1) == accepted
    assert (len(model.passes) == 0) == (accepted == N - 1)


def test_without_a_draft_it_is_one_by_one() -> None:
    model = Chain(1)
    assert model.decode([]) == model.greedy()
    assert model.passes == [(i, i + 1) for i in range(N - 1)]


def test_where_tokens_do_not_depend_on_each_other_one_pass_is_enough() -> None:
    class Independent(Chain):
        def next(self, tokens: Sequence[int]) -> int:
            return super().next([len(tokens)])

    model = Independent(2)
    wrong = [(token + 1) % VOCABULARY for token in model.greedy()[:-1]]
    assert model.decode(wrong) == model.greedy()
    assert len(model.passes) == 1


def test_a_draft_of_everything_is_refused() -> None:
    with pytest.raises(InputError, match="leave it out"):
        Chain(0).decode([0] * N)
