"""The base of all action heads: a head reads the decoder's states, answers with an action, and has a loss.

A head decodes as a generator: it yields rows that are to be appended to the sequence, and is sent their last hidden
states; or what its own networks are to compute, and is sent what they made of it. So one round of decoding advances all
sessions of an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from lac_vla.errors import InputError, NonFiniteError
from lac_vla.models.heads.distill import relative_error
from lac_vla.models.protocols import DecoderStack, KeysValues
from lac_vla.running_chunk import RealTimeChunk
from lac_vla.types import FloatArray, Frame, TokenLayout

NON_FINITE = (
    "the model computed NaN or infinity, so there is no action: stop the robot. The next frame is computed in full; if "
    "it fails as well, the weights do not suit this dtype (give bfloat16 or float32 for float16) or are broken"
)


@dataclass(eq=False, slots=True)
class AppendRows:
    """Rows to run behind the prompt.

    Attributes:
        embeddings: (n, width); in training (B, n, width). If they require a gradient, the rows' hidden states have it;
            what stands before the rows is constant.
        at: How many of the rows appended before stay; the new ones take the place of the others. ``None``: all.
        stack: Blocks to run them through, over the same keys and values; ``None`` for the decoder's own.
        cross: Layer → keys and values, each (kv_heads, prompt's length, head_dim), in training (B, …), that the rows
            attend to there in place of the sequence's. They are made once and serve every run of a frame.
    """

    embeddings: torch.Tensor
    at: int | None = None
    stack: DecoderStack | None = None
    cross: Mapping[int, KeysValues] | None = None


@dataclass(frozen=True, eq=False)
class RerunPrompt:
    """The prompt to run again with another suffix, over the same visual tokens; everything appended is gone.

    It is for heads whose rows stand within a prompt that sees them.

    Attributes:
        edit: Embedded suffix as the processor made it, (n_suffix, width) → the new one, of the same shape.
    """

    edit: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Together:
    """Asks for what the head's own networks compute at once, for all sessions that are there.

    Attributes:
        run: What every session gives → what each is sent. A method of the head: those of its sessions are equal.
        given: By this session.
    """

    run: Callable[[Sequence[Any]], Sequence[Any]]
    given: Any


T = TypeVar("T")
EditSuffix: TypeAlias = Callable[[int, torch.Tensor], torch.Tensor]
"""Number in the batch, embedded suffix → the new one."""
Decoding: TypeAlias = Generator[AppendRows | RerunPrompt | Together, Any, tuple[FloatArray, dict[str, Any]]]
"""Yields rows, is sent their normalised last hidden states (the suffix's of a prompt that is run again), or what was
computed together; returns the action and what is worth recording of it."""


def alone(
    decoding: Generator[AppendRows | RerunPrompt | Together, Any, T],
) -> Generator[AppendRows | RerunPrompt, torch.Tensor, T]:
    """Let a head decode as the only session there is: of what it yields, the rows are left."""
    sent: Any = None
    while True:
        try:
            asked = decoding.send(sent)
        except StopIteration as end:
            answer: T = end.value
            return answer
        if isinstance(asked, Together):
            [sent] = asked.run([asked.given])
        else:
            sent = yield asked


@dataclass(frozen=True, eq=False)
class HeadContext:
    """Everything that a head may read of one frame.

    Attributes:
        frame: The observation.
        layout: Where the prompt's tokens are.
        hidden: Normalised last hidden states of the suffix, and of the draft behind it, (n_suffix + draft, width);
            empty for a head that reads keys and values.
        keys: Layer → keys of the prompt, (kv_heads, length, head_dim).
        values: Layer → values, as ``keys``.
        rng: The session's generator for actions that are sampled: the only source of randomness.
        drafted: What the draft was made of, see :meth:`ActionHead.draft`; ``None`` if there is none. It never changes
            the action.
        rtc: The running chunk, to go on with in real time; ``None`` for a new beginning.
    """

    frame: Frame
    layout: TokenLayout
    hidden: torch.Tensor
    keys: Callable[[int], torch.Tensor]
    values: Callable[[int], torch.Tensor]
    rng: np.random.Generator
    drafted: Mapping[str, Any] | None = None
    rtc: RealTimeChunk | None = None


@dataclass(frozen=True, eq=False)
class LossContext:
    """Everything that a head's loss may read of a batch; a gradient flows through all of it to the mask.

    Attributes:
        layout: Where the prompt's tokens are, without a suffix.
        hidden: Normalised hidden states of the head's ``n_rows`` rows, (B, n_rows, width).
        keys: Layer → mixed keys, (B, kv_heads, length, head_dim); right-padded.
        values: Layer → values, as ``keys``.
        lengths: Of the prompts, int64, (B,): slots from there on are padding.
        run: Runs rows behind the prompts, as :class:`HeadContext`'s decoding does by yielding them.
        n_layers: Number of layers whose keys and values there are; 0 for a head that reads hidden states.
        rerun: Runs the prompts again with other suffixes, over the same mixture: number in the batch, embedded suffix
            (n_suffix, width) → the new one; gives the head's rows, (B, n_rows, width). What a frame leaves to the next
            are the slots of the first run.
    """

    layout: TokenLayout
    hidden: torch.Tensor
    keys: Callable[[int], torch.Tensor]
    values: Callable[[int], torch.Tensor]
    lengths: torch.Tensor
    run: Callable[[AppendRows], torch.Tensor]
    rerun: Callable[[EditSuffix], torch.Tensor] | None = None
    n_layers: int = 0


def finite(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return values that a head computed, unless one of them is not finite.

    The engine asks this of every action. A head that clips, rounds or compares what it computed asks it before.

    Raises:
        NonFiniteError: If one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise NonFiniteError(NON_FINITE)
    return values


class ActionHead(ABC):
    """Turns the decoder's states into actions. Only :meth:`decode` is needed to act, the rest to train beside it.

    Attributes:
        reads: ``"hidden"``: the suffix's last hidden states; ``"kv"``: the keys and values of every layer alone, so
            that the last layer computes no queries.
        max_new_tokens: Rows that it appends at most.
        guided: Whether it draws chunks from noise that a running chunk can guide (``HeadContext.rtc``); the answers of
            others are blended with it.
        horizon: Actions per answer.
        action_dim: Values of an action of a chunk.
        n_rows: Hidden states that its loss reads, in a row: the last prompt token's and every forced one's; or, with
            ``n_before``, those of the prompt itself.
        n_before: Rows from the first of them to the last prompt token.
    """

    reads: ClassVar[Literal["hidden", "kv"]] = "hidden"
    guided: ClassVar[bool] = False
    max_new_tokens: int = 0
    horizon: int = 1
    action_dim: int = 0
    n_rows: int = 1
    n_before: int = 0

    @property
    def n_forced(self) -> int:
        """Rows that are forced behind the prompt in training."""
        return max(0, self.n_rows - 1 - self.n_before)

    @abstractmethod
    def decode(self, context: HeadContext) -> Decoding:
        """Decode the action.

        Args:
            context: What may be read.

        Returns:
            The action in the robot's own units, float32, (action_dim,) or (horizon, action_dim); and what is worth
            recording about it (token ids, …).
        """

    def check_rtc(self, rtc: RealTimeChunk) -> None:
        """Check that the model can go on with a running chunk.

        Raises:
            InputError: If it is none of this model's, or the head cannot be guided as it is set.
        """
        rtc.check(self.horizon, self.action_dim)

    def draft(self, metadata: Mapping[str, Any]) -> torch.Tensor | None:
        """Guess the rows that :meth:`decode` will append, to ride along in a causal prefill.

        Args:
            metadata: What :meth:`decode` recorded about the preceding action.

        Returns:
            Embeddings, (n, width), n < ``max_new_tokens``; ``None`` for no guess.
        """
        return None

    def first_suffix(self, suffix: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Put what the first pass needs of the head into the embedded suffix, e.g. noise.

        Args:
            suffix: As the processor made it, (n_suffix, width).
            rng: In the state in which :meth:`decode` will find it; it must be left so (draw from a copy).

        Returns:
            As ``suffix``.
        """
        return suffix

    @property
    def has_loss(self) -> bool:
        """True for a head with a loss of its own on recorded actions; any other is distilled alone."""
        return type(self).loss is not ActionHead.loss

    def targets(self, actions: FloatArray) -> npt.NDArray[Any]:
        """Say what the head is to answer; nothing for a head without a loss of its own.

        Args:
            actions: An episode's recorded actions in the data set's units, (T, A); or what the model itself answered
                in every frame, (T, …).

        Returns:
            A row for every frame, (T, n), n ≥ 1.

        Raises:
            InputError: If the actions do not fit the model.
        """
        return np.zeros((len(actions), 1), dtype=np.float32)

    def with_states(self, targets: npt.NDArray[Any], states: FloatArray) -> npt.NDArray[Any]:
        """Add to the targets what the loss needs of the states, where the prompt does not tell them.

        Args:
            targets: See :meth:`targets`, (T, n).
            states: The same frames' proprioception in the data set's units, (T, S).

        Returns:
            A row for every frame, (T, m).

        Raises:
            InputError: If the states do not fit the model.
        """
        return targets

    def forced(self, targets: torch.Tensor) -> torch.Tensor | None:
        """Embed the rows that are forced behind the prompt: (B, n) → (B, n_forced, width); ``None`` for none."""
        return None

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        """Compute the model's own loss on the targets; or, given a teacher, the divergence from it.

        A head that brings none is distilled: its loss is the relative squared error of what it reads, hidden states
        or keys and values, from the dense pass.

        Args:
            context: What may be read.
            targets: See :meth:`targets`, (B, n).
            generator: Of all randomness.
            teacher: The same of the dense pass.

        Returns:
            (B,).

        Raises:
            InputError: If there is no teacher, and no loss of its own.
        """
        if teacher is None:
            raise InputError(
                f"{type(self).__name__} has no loss on recorded actions: train with --loss distill, or give it "
                "targets() and loss()"
            )
        if self.reads == "hidden":
            every = torch.ones(context.hidden.shape[:2], dtype=torch.bool, device=context.hidden.device)
            return relative_error([context.hidden], [teacher.hidden], every)
        states, dense = (
            [read(layer) for layer in range(context.n_layers) for read in (each.keys, each.values)]
            for each in (context, teacher)
        )
        real = torch.arange(states[0].shape[-2], device=states[0].device) < context.lengths[:, None]
        return relative_error(states, dense, real)

    def fingerprint(self) -> bytes:
        """Name what stored targets depend on, besides what the decoder's last layer tells."""
        return b""
