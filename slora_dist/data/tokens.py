"""From documents to batches of token ids.

Legend: N documents, K documents of a batch, T tokens of its longest document.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_dist.data.permutation import permutation
from slora_dist.data.source import Documents

CHUNK = 1024  # documents tokenised in one call: Python lists of ids are heavy, so they do not live long
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Encoded:
    """Documents as token ids: ``ids`` holds one int32 array per document, without padding; ``labels_N`` is int64."""

    ids: list[NDArray[np.int32]]
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def encode(documents: Documents, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenise with special tokens, and cut every document at ``max_length`` tokens."""
    chunks = (documents.texts[start : start + CHUNK] for start in range(0, len(documents.texts), CHUNK))
    options = {
        "truncation": True,
        "max_length": max_length,
        "padding": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
    }
    ids = [np.asarray(row, dtype=np.int32) for chunk in chunks for row in tokenizer(chunk, **options)["input_ids"]]
    return Encoded(ids, torch.tensor(documents.labels, dtype=torch.int64))


def batches(encoded: Encoded, batch_size: int, pad: int, order_N: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield ``input_ids`` (K, T), ``attention_mask`` (K, T) and ``labels`` (K), all int64, in the order given (default: as loaded).

    Each batch is padded with the token ``pad`` to its own longest document; the last one may be smaller.
    """
    order_N = torch.arange(len(encoded)) if order_N is None else order_N
    for start in range(0, len(order_N), batch_size):
        yield _batch(encoded, order_N[start : start + batch_size], pad)


def _batch(encoded: Encoded, order_K: Tensor, pad: int) -> dict[str, Tensor]:
    rows = [torch.from_numpy(encoded.ids[index]) for index in order_K.tolist()]
    shape = (len(rows), max(len(row) for row in rows))
    ids_KT, mask_KT = torch.full(shape, pad, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for at, row in enumerate(rows):
        ids_KT[at, : len(row)] = row
        mask_KT[at, : len(row)] = 1
    return {"input_ids": ids_KT, "attention_mask": mask_KT, "labels": encoded.labels_N[order_K]}


def order(count: int, seed: int) -> Tensor:
    """Return a random order_N of ``count`` documents (int64), the same bits on every machine for one ``seed`` (from ``derive``)."""
    return torch.from_numpy(permutation(count, seed))


def by_length(encoded: Encoded) -> Tensor:
    """Return the order_N (int64) from the shortest to the longest document: evaluation then pads least."""
    lengths_N = np.array([len(row) for row in encoded.ids], dtype=np.int64)
    return torch.from_numpy(np.argsort(lengths_N, kind="stable"))


def word_tokenizer(texts: list[str], size: int = 8192) -> Any:
    """Return a transformers fast tokenizer whose vocabulary is the ``size`` most frequent lower-cased words of ``texts``.

    It serves a model with random weights, that has no tokenizer of its own. Ids 0 to 3 are [PAD] [UNK] [CLS] [SEP].
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted(counts, key=lambda word: (-counts[word], word))[: size - len(SPECIAL)]
    vocabulary = {word: at for at, word in enumerate((*SPECIAL, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
