"""Tokenizers: text → token ids."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lac_vla.checkpoint_files import damaged
from lac_vla.errors import CheckpointError, InputError

Encode: TypeAlias = Callable[[str], list[int]]
"""Text → token ids, with or without the token that starts a sequence."""

TOKENIZER, SENTENCE_PIECE = "tokenizer.json", "tokenizer.model"
SPECIALS = ("<pad>", "<s>", "<out>")
"""Ids 0, 1, 2 of a tokenizer that we train: padding, start of the prompt, end of the prompt."""


@dataclass(frozen=True)
class FileTokenizer:
    """A ``tokenizer.json`` of Hugging Face ``tokenizers`` as an :data:`Encode`.

    Attributes:
        tokenizer: The tokenizer.
    """

    tokenizer: Tokenizer

    def __call__(self, text: str) -> list[int]:
        """Make the token ids of a text."""
        return list(self.tokenizer.encode(text).ids)


@dataclass(frozen=True)
class WordHash:
    """Stand-in for a tokenizer where there are no files: each word and sign gets an id by its checksum.

    Prompts have about the length that a trained tokenizer gives them.

    Attributes:
        vocab_size: Ids lie in 3 .. ``vocab_size`` − 1.
    """

    vocab_size: int

    def __call__(self, text: str) -> list[int]:
        """Make the token ids of a text."""
        words = re.findall(r"\w{1,8}|[^\w ]", text)
        first = len(SPECIALS)
        return [first + zlib.crc32(word.encode()) % (self.vocab_size - first) for word in words]


def load_tokenizer(folder: Path) -> Encode:
    """Load the tokenizer in a checkpoint's folder; nothing is fetched from the network.

    Raises:
        CheckpointError: If there is none, or it cannot be read.
    """
    file = folder / TOKENIZER
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give that of a checkpoint")
    if not file.is_file():
        convert = (
            f'; its {SENTENCE_PIECE} alone is not read, convert it with: python -c "from transformers import '
            f"AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
        found = convert if (folder / SENTENCE_PIECE).is_file() else ": copy it there, or pass `encode`"
        raise CheckpointError(f"{folder} holds no {TOKENIZER}{found}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises nothing more specific, and panics where its code is caught out
        raise damaged(file, error) from error
    tokenizer.no_padding()  # a file may keep what its last user set: a prompt is neither filled up nor cut
    tokenizer.no_truncation()
    return FileTokenizer(tokenizer)


def save_tokenizer(encode: Encode, folder: Path) -> None:
    """Write a tokenizer into a checkpoint's folder; one that is no file's, e.g. :class:`WordHash`, is left out."""
    if isinstance(encode, FileTokenizer):
        encode.tokenizer.save(str(folder / TOKENIZER))


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer: it can spell any text and needs no token for the unknown.

    Args:
        sentences: Instructions, as they will be given (they are lower-cased here as in prompts).
        vocab_size: Most ids to use, at least 259: 256 bytes and :data:`SPECIALS`.

    Raises:
        InputError: If ``vocab_size`` is too small.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise InputError(f"vocab_size {vocab_size} is less than {len(alphabet) + len(SPECIALS)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence.lower() for sentence in sentences), trainer)
    return tokenizer
