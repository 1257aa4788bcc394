"""From documents to batches of token ids.

Legend: N documents, K documents of a batch, T tokens of a document, or of the longest one of a batch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slora_dist.data.instructions import Span
from slora_dist.data.permutation import permutation
from slora_dist.data.source import Documents
from slora_dist.errors import RunError

CHUNK = 1024  # documents tokenised in one call: Python lists of ids are heavy, so they do not live long
IGNORED = -100  # label of a token that is not learned; it is transformers' and torch's own number
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Encoded:
    """Documents as token ids: ``ids`` holds one int32 array per document, without padding; ``labels_N`` is int64.

    Documents of a causal language model have ``answers``, which say token by token whether it is learned.
    """

    ids: list[NDArray[np.int32]]
    labels_N: Tensor
    answers: list[NDArray[np.bool_]] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def encode(documents: Documents, tokenizer: Any, max_length: int) -> Encoded:
    """Tokenise with special tokens, and cut every document at ``max_length`` tokens; one with answers keeps room for the first of them."""
    if documents.answers is not None:
        return _with_answers(documents, documents.answers, tokenizer, max_length)
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


def _with_answers(documents: Documents, answers: Sequence[Sequence[Span]], tokenizer: Any, max_length: int) -> Encoded:
    options = {"add_special_tokens": not documents.complete, "return_offsets_mapping": True, "return_attention_mask": False}
    end = None if documents.complete else tokenizer.eos_token_id
    rows = list[tuple[NDArray[np.int32], NDArray[np.bool_]]]()
    for start in range(0, len(documents), CHUNK):
        found = tokenizer(documents.texts[start : start + CHUNK], return_token_type_ids=False, **options)
        spans = answers[start : start + CHUNK]
        rows += [
            _cut(*_marked(*row, end), max_length, tokenizer.bos_token_id)
            for row in zip(found["input_ids"], found["offset_mapping"], spans, strict=True)
        ]
    for at, (_, answer_T) in enumerate(rows):
        if not answer_T[1:].any():
            raise RunError(f"no token of the document {documents.texts[at][:60]!r} can be learned: longer texts, or another tokenizer?")
    return Encoded([ids_T for ids_T, _ in rows], torch.tensor(documents.labels, dtype=torch.int64), [answer_T for _, answer_T in rows])


def _marked(ids: list[int], places: list[Span], spans: Sequence[Span], end: int | None) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return a document's tokens, and which of them have a character in a span; the token ``end`` that closes it is learned, too.

    One may begin before the span: many vocabularies take a space to the word behind it, and the prompt may end in one.
    """
    if end is not None and ids[-1:] != [end]:
        ids, places = [*ids, end], [*places, (0, 0)]
    begin_T, behind_T = np.asarray(places, dtype=np.int64).reshape(-1, 2).T
    answer_T = np.zeros(len(ids), dtype=np.bool_)
    for first, behind in spans:
        answer_T |= (behind_T > first) & (begin_T < behind) & (behind_T > begin_T)
    answer_T[-1:] |= end is not None
    return np.asarray(ids, dtype=np.int32), answer_T


def _cut(
    ids_T: NDArray[np.int32], answer_T: NDArray[np.bool_], length: int, opening: int | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Leave out the end, and as much of the beginning as the first answer needs to have half of the length; but no token ``opening``."""
    start = max(0, min(len(ids_T) - length, int(answer_T.argmax()) - length // 2))
    kept = np.arange(start, min(start + length, len(ids_T)))
    if start and ids_T[0] == opening:
        kept[0] = 0
    return ids_T[kept], answer_T[kept]


def batches(encoded: Encoded, batch_size: int, pad: int, order_N: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield ``input_ids`` (K, T), ``attention_mask`` (K, T) and ``labels`` (K), all int64, in the order given (default: as loaded).

    With answers ``labels`` are (K, T): the tokens that are learned, and ``IGNORED`` for all others.
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
    return {"input_ids": ids_KT, "attention_mask": mask_KT, "labels": _labels(encoded, order_K, ids_KT)}


def _labels(encoded: Encoded, order_K: Tensor, ids_KT: Tensor) -> Tensor:
    if encoded.answers is None:
        return encoded.labels_N[order_K]
    labels_KT = torch.full_like(ids_KT, IGNORED)
    for at, index in enumerate(order_K.tolist()):
        answer_T = torch.from_numpy(encoded.answers[index])
        labels_KT[at, : len(answer_T)] = torch.where(answer_T, ids_KT[at, : len(answer_T)], IGNORED)
    return labels_KT


def predicted(labels: Tensor) -> int:
    """Return how many predictions a batch is judged by: its documents, or with answers the learned tokens that have one before them."""
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != IGNORED).sum())


def order(count: int, seed: int) -> Tensor:
    """Return a random order_N of ``count`` documents (int64), the same bits on every machine for one ``seed`` (from ``derive``)."""
    return torch.from_numpy(permutation(count, seed))


def by_length(encoded: Encoded) -> Tensor:
    """Return the order_N (int64) from the shortest to the longest document: evaluation then pads least."""
    lengths_N = np.array([len(row) for row in encoded.ids], dtype=np.int64)
    return torch.from_numpy(np.argsort(lengths_N, kind="stable"))


def word_tokenizer(texts: list[str], size: int = 8192) -> Any:
    """Return a transformers fast tokenizer whose vocabulary is the ``size`` most frequent lower-cased words of ``texts``.

    It serves a model with random weights, that has no tokenizer of its own. Ids 0 to 3 are [PAD] [UNK] [CLS] [SEP]; the last two also
    begin and end a text.
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
    names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
