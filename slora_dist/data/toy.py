"""Data sets made on the spot, which a tiny random model learns within a few dozen steps: texts of four classes, and questions about
their words with answers; six uneven clients each.
"""

from collections.abc import Callable, Mapping

import numpy as np

from slora_dist.seeding import derive

TOPICS = {
    "animals": "cat dog horse cow sheep goat wolf bear lion tiger otter mouse fox deer owl eagle",
    "cooking": "bake boil fry oven pan flour butter sugar salt pepper soup sauce bread roast dough whisk",
    "music": "piano violin drum flute song choir opera melody chord rhythm guitar cello trumpet concert tune waltz",
    "weather": "rain snow wind storm cloud fog sunny hail thunder frost breeze drizzle humid flood heat mist",
}
SHARED = "the a of in and with very some this that was is about on under again"
SIZES = {"train": 240, "test": 80}
CLIENTS = 6
QUESTIONS = ("what is {word} ?", "where does {word} belong ?", "tell me about {word} .")

Columns = dict[str, list[str]]


def toy() -> dict[str, Columns]:
    """Return the splits ``train`` and ``test``, each with the columns text, label (a class name) and client."""
    return {split: _columns(split, size) for split, size in SIZES.items()}


def _columns(split: str, size: int) -> Columns:
    rows = [_row(index, np.random.Philox(key=derive(0, "toy", split, index)).random_raw(32).tolist()) for index in range(size)]
    texts, labels, clients = (list(column) for column in zip(*rows, strict=True))
    return {"text": texts, "label": labels, "client": clients}


def _row(index: int, bits: list[int]) -> tuple[str, str, str]:
    label = list(TOPICS)[index % len(TOPICS)]
    topic, shared = TOPICS[label].split(), SHARED.split()
    pairs = zip(bits[2 : 8 + bits[0] % 7], bits[16:], strict=False)  # 6 to 12 words, each with a word and a choice of vocabulary
    words = [(topic if choice % 5 < 2 else shared)[word % 16] for word, choice in pairs]
    words[bits[14] % len(words)] = topic[bits[15] % len(topic)]  # at least one word tells the class
    return " ".join(words), label, _client(bits[1])


def _client(bits: int) -> str:
    return f"client{min(bits % CLIENTS, bits // CLIENTS % CLIENTS)}"  # the smaller of two draws: early clients hold more


def toy_qa() -> dict[str, Columns]:
    """Return ``train`` and ``test``, each with text (a question), answer, label (the answer's topic) and client.

    Every word is asked for in three ways; ``test`` has one of them, so that what a model has learned of a word answers it.
    """
    words = [(word, topic) for topic, own in TOPICS.items() for word in own.split()]
    asked = [(at, way, word, topic) for at, (word, topic) in enumerate(words) for way in range(len(QUESTIONS))]
    rows = {split: [row for row in asked if ((row[0] + row[1]) % len(QUESTIONS) == 0) == (split == "test")] for split in SIZES}
    return {
        split: {
            "text": [QUESTIONS[way].format(word=word) for _, way, word, _ in chosen],
            "answer": [f"{word} belongs to {topic}" for _, _, word, topic in chosen],
            "label": [topic for *_, topic in chosen],
            "client": [_client(np.random.Philox(key=derive(0, "toy_qa", at, way)).random_raw()) for at, way, _, _ in chosen],
        }
        for split, chosen in rows.items()
    }


MADE: Mapping[str, Callable[[], dict[str, Columns]]] = {"toy": toy, "toy_qa": toy_qa}
