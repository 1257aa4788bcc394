"""Who has which documents. In one world every rank reads the one source and computes the same split; in the other each client has a
file that only the rank that plays it opens.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from slora_dist.config import Config
from slora_dist.data import source
from slora_dist.data.instructions import Instructions
from slora_dist.data.partition import held_out, hold_out, split
from slora_dist.data.source import Documents
from slora_dist.data.tokens import Encoded, encode, word_tokenizer
from slora_dist.errors import ConfigError

MOST_WORDS = 8192  # of a word tokenizer, when the model does not say how many tokens it knows


def class_names(config: Config) -> list[str]:
    """Return the names of the classes; reads the source only when ``data.labels`` does not give them. Causal models have none."""
    if config.model.task == "causal_lm":
        return source.UNLABELLED
    if config.data.labels is not None:
        names = source.class_names(config.data.labels)
        source.require_several(names, "data.labels")
        return names
    return source.load_train(config.data, config.run.seed)[1]


class Federation:
    """The clients' documents, tokenised when first asked for, and the names of the classes."""

    _TRAIN, _HELD_OUT = range(2)

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self._config, self._encoded = config, dict[tuple[int, int], Encoded]()
        self._read = Instructions(config.data, tokenizer).read if config.model.task == "causal_lm" else None
        self._source: Documents | None = None
        self.vocabulary: int | None = None  # tokens that the model knows, once that is known
        self.sizes: list[int] | None = None  # documents that each client trains on, where every rank can know them
        if config.client_files:
            self.names = class_names(config)
        else:
            self._source, self.names = source.load_train(config.data, config.run.seed, self._read)
            self._parts = split(self._source, config.data, config.clients.count, config.run.seed)
            self.sizes = [len(part) - held_out(len(part), config.clients.holdout) for part in self._parts]
        self.tokenizer = tokenizer or self._words()

    def digest(self) -> str:
        """Return a digest of the classes, of the split, and of the documents that all ranks read: not of a client's own file."""
        whole = hashlib.sha256(repr((self.names, self.sizes)).encode())
        for text, label in zip(self._source.texts, self._source.labels, strict=True) if self._source else ():
            whole.update(repr((label, text)).encode())
        return whole.hexdigest()

    def trains_on(self, client: int) -> int:
        """Return how many documents a client trains on; 0 where other ranks cannot know."""
        return self.sizes[client] if self.sizes else 0

    def open(self, clients: Sequence[int]) -> None:
        """Read and tokenise these clients' own files now, so that a bad one is found before training; one shared source waits."""
        if self._config.client_files:
            for client in clients:
                self.client(client), self.held_out(client)

    def client(self, client: int) -> Encoded:
        """Return the documents that one client trains on."""
        return self._part(client, self._TRAIN)

    def held_out(self, client: int) -> Encoded:
        """Return the documents that one client holds out; it may have none."""
        return self._part(client, self._HELD_OUT)

    def _part(self, client: int, which: int) -> Encoded:
        if (client, which) not in self._encoded:
            documents, config = self._documents(client), self._config
            chosen = hold_out(len(documents), config.clients.holdout, config.run.seed, client)[which]
            self._encoded[client, which] = self._encode(documents.take(chosen))
        return self._encoded[client, which]

    def test(self) -> Encoded:
        """Return the held-out documents that rank 0 reads."""
        documents = source.load_test(self._config.data, self.names, self._config.run.seed, self._read)
        return self._encode(documents)

    def _encode(self, documents: Documents) -> Encoded:
        encoded = encode(documents, self.tokenizer, self._config.data.max_length)
        if self.vocabulary is None or len(self.tokenizer) <= self.vocabulary:
            return encoded
        for ids_T, text in zip(encoded.ids, documents.texts, strict=True):
            if ids_T.max(initial=0) >= self.vocabulary:
                problem = f"token {ids_T.max()} of the document {text[:60]!r} for a model of {self.vocabulary}"
                raise ConfigError("model.tokenizer", problem, "one whose added tokens the model has, or documents without them")
        return encoded

    def _documents(self, client: int) -> Documents:
        if self._source is None:
            documents = source.load_client(self._config.data, client, self.names, self._read)
            if not documents.texts:
                raise ConfigError("data.path", f"the file of client {client} holds no documents", "one document or more for every client")
            return documents
        return self._source.take(self._parts[client].tolist())

    def _words(self) -> Any:
        if self._source is None:
            raise ConfigError("model.tokenizer", "missing", "a tokenizer folder or name, when each client has its own file")
        return word_tokenizer(self._source.texts, self._config.model.config.get("vocab_size", MOST_WORDS))
