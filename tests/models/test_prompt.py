"""Prompts and tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from lac_vla.errors import CheckpointError, InputError
from lac_vla.models.prismatic.presets import OPENVLA_7B
from lac_vla.models.prismatic.processor import prompt_ids
from lac_vla.models.tokenizer import TOKENIZER, Encode, FileTokenizer, WordHash, load_tokenizer, train_tokenizer

SENTENCES = ["pick up the black bowl and place it on the plate", "open the middle drawer of the cabinet"]


def prompt(encode: Encode, **changes: Any) -> Callable[[str], list[int]]:
    """OpenVLA's prompt over another tokenizer."""
    return partial(prompt_ids, replace(OPENVLA_7B, **{"llm_max_length": 64, **changes}), encode)


def test_text_is_the_lower_cased_template() -> None:
    seen: list[str] = []

    def remember(text: str) -> list[int]:
        seen.append(text)
        return [7]

    prompt(remember)("Pick up {the} BOWL")
    assert seen == ["In: What action should the robot take to pick up {the} bowl?\nOut:"]


@pytest.mark.parametrize("ids", [[5, 6], [1, 5, 6], [1, 5, 6, 29871], [5, 6, 29871]])
def test_start_and_end_are_added_once(ids: list[int]) -> None:
    assert prompt(lambda text: ids)("x") == [1, 5, 6, 29871]


def test_prompt_without_an_end() -> None:
    assert prompt(lambda text: [5], prompt_end_id=None)("x") == [1, 5]


def test_too_long_a_prompt() -> None:
    with pytest.raises(InputError, match="66 tokens, more than 64"):
        prompt(lambda text: [5] * 64)("x")


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(CheckpointError, match="40000"):
        prompt(lambda text: [40000])("x")


def test_trained_tokenizer_spells_any_text_and_survives_a_file(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, 320)
    assert tokenizer.get_vocab_size() <= 320
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<s>", "<out>")] == [0, 1, 2]
    for text in (*SENTENCES, "déjà vu 机器人 🙂"):
        ids = tokenizer.encode(text).ids
        assert min(ids) > 2
        assert tokenizer.decode(ids).strip() == text
    assert len(tokenizer.encode(SENTENCES[0]).ids) < len(SENTENCES[0]) / 2
    tokenizer.save(str(tmp_path / TOKENIZER))
    assert load_tokenizer(tmp_path)(SENTENCES[0]) == FileTokenizer(tokenizer)(SENTENCES[0])


def test_tokenizer_that_adds_bos_itself() -> None:
    tokenizer = train_tokenizer(SENTENCES, 320)
    plain = FileTokenizer(tokenizer)("open")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = prompt(FileTokenizer(tokenizer), prompt_template="{instruction}", prompt_end_id=2)
    assert made("open") == [1, *plain, 2]


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(InputError, match="259"):
        train_tokenizer(SENTENCES, 200)


def test_missing_and_damaged_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / TOKENIZER).write_text('{"version"')
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(tmp_path)


def test_stand_in_gives_prompts_of_realistic_length() -> None:
    encode = WordHash(1000)
    ids = prompt(encode)("put the wine bottle on the rack")
    assert 20 <= len(ids) <= 29
    assert ids == prompt(encode)("put the wine bottle on the rack")
    assert all(3 <= i < 1000 for i in ids[1:-1])


def test_padding_and_truncation_of_a_file_are_not_a_prompts(tmp_path: Path) -> None:
    """Whoever saved the file had used it so; a prompt has its own tokens, all of them, and no others."""
    tokenizer = train_tokenizer(SENTENCES, 300)
    expected = FileTokenizer(tokenizer)(SENTENCES[0])
    for change in (lambda: tokenizer.enable_truncation(2), lambda: tokenizer.enable_padding(length=90)):
        change()
        tokenizer.save(str(tmp_path / TOKENIZER))
        assert load_tokenizer(tmp_path)(SENTENCES[0]) == expected
        assert load_tokenizer(tmp_path)("") == []
