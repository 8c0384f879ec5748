"""The prompt of a Prismatic VLA: instruction → token ids."""

from __future__ import annotations

from dataclasses import dataclass

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.prismatic.config import PrismaticConfig
from lac_vla.models.tokenizer import Encode


@dataclass(frozen=True)
class Prompt:
    """Wraps an instruction in the model's template and makes token ids of it.

    Attributes:
        template: Holds ``{instruction}``.
        encode: The tokenizer.
        start: Id that the prompt begins with.
        end: Id that the prompt ends with; ``None`` for none.
        max_length: Most tokens that a prompt may have.
        vocab_size: Size of the vocabulary that the model knows.
    """

    template: str
    encode: Encode
    start: int
    end: int | None
    max_length: int
    vocab_size: int

    @classmethod
    def of(cls, config: PrismaticConfig, encode: Encode) -> Prompt:
        """Make the prompt that a configuration describes."""
        return cls(
            config.prompt_template,
            encode,
            config.bos_id,
            config.prompt_end_id,
            config.llm_max_length,
            config.vocab_size,
        )

    def ids(self, instruction: str) -> list[int]:
        """Make the token ids of a whole prompt; the instruction is lower-cased.

        Raises:
            InputError: If the prompt is too long.
            CheckpointError: If the tokenizer is not the model's.
        """
        ids = self.encode(self.template.replace("{instruction}", instruction.lower()))
        if ids[:1] != [self.start]:
            ids = [self.start, *ids]
        if self.end is not None and ids[-1] != self.end:
            ids = [*ids, self.end]
        if len(ids) > self.max_length:
            raise InputError(f"the instruction makes a prompt of {len(ids)} tokens, more than {self.max_length}")
        if max(ids) >= self.vocab_size:
            raise CheckpointError(f"token {max(ids)} is not in the model's vocabulary of {self.vocab_size}")
        return ids
