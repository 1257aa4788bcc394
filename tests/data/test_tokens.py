from typing import Any

import pytest
import torch

from slora_dist.data.source import Documents
from slora_dist.data.tokens import Encoded, batches, by_length, encode, order, word_tokenizer
from slora_dist.data.toy import toy
from slora_dist.seeding import derive

TEXTS = ["b b a.", "A c", "b", "c c c c c c c c"]


@pytest.fixture(name="tokenizer")
def _tokenizer() -> Any:
    return word_tokenizer(TEXTS)


@pytest.fixture(name="encoded")
def _encoded(tokenizer: Any) -> Encoded:
    return encode(Documents(TEXTS, [3, 1, 0, 2]), tokenizer, max_length=6)


def test_words_are_numbered_by_count_then_name(tokenizer: Any) -> None:
    assert tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "c": 4, "b": 5, "a": 6, ".": 7}
    assert tokenizer.pad_token_id == 0


def test_the_vocabulary_is_limited_in_size() -> None:
    assert word_tokenizer(TEXTS, size=5)("B c a")["input_ids"] == [2, 1, 4, 1, 3]


def test_word_tokenizer_survives_saving(tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("b A, c")["input_ids"] == tokenizer("b A, c")["input_ids"]


def test_encode_adds_special_tokens_and_truncates(encoded: Encoded) -> None:
    assert [ids.tolist() for ids in encoded.ids] == [[2, 5, 5, 6, 7, 3], [2, 6, 4, 3], [2, 5, 3], [2, 4, 4, 4, 4, 3]]
    assert encoded.labels_N.tolist() == [3, 1, 0, 2] and len(encoded) == 4


def test_many_documents_keep_their_order(tokenizer: Any) -> None:
    texts = ["b " * (1 + at % 3) for at in range(2500)]
    encoded = encode(Documents(texts, [0] * 2500), tokenizer, 128)
    assert [len(ids) for ids in encoded.ids] == [3 + at % 3 for at in range(2500)]


def test_batches_pad_to_their_own_longest(encoded: Encoded) -> None:
    first, second = batches(encoded, 3, pad=9, order_N=torch.tensor([2, 1, 0, 3]))
    assert first["input_ids"].tolist() == [[2, 5, 3, 9, 9, 9], [2, 6, 4, 3, 9, 9], [2, 5, 5, 6, 7, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1] * 6]
    assert first["labels"].tolist() == [0, 1, 3] and second["labels"].tolist() == [2]
    assert all(value.dtype == torch.int64 for value in first.values())


def test_batches_without_order_are_as_loaded(encoded: Encoded) -> None:
    assert torch.cat([batch["labels"] for batch in batches(encoded, 3, pad=0)]).tolist() == [3, 1, 0, 2]


def test_no_documents_make_no_batches(tokenizer: Any) -> None:
    assert list(batches(encode(Documents([], []), tokenizer, 8), 4, pad=0)) == []


def test_by_length_wastes_no_padding(encoded: Encoded) -> None:
    assert by_length(encoded).tolist() == [2, 1, 0, 3]


def test_order_is_a_permutation_of_the_seed() -> None:
    one, two = order(100, derive(0, "client", 1, 0)), order(100, derive(0, "client", 1, 1))
    assert sorted(one.tolist()) == sorted(two.tolist()) == list(range(100))
    assert torch.equal(one, order(100, derive(0, "client", 1, 0))) and not torch.equal(one, two)


def test_the_toy_vocabulary_has_no_unknown_words_in_the_test_split() -> None:
    tokenizer = word_tokenizer(toy()["train"]["text"])
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(toy()["test"]["text"])["input_ids"])
