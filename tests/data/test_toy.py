from collections import Counter

from slora_dist.data.toy import TOPICS, toy, toy_qa


def test_is_the_same_each_time() -> None:
    assert toy() == toy()


def test_sizes_classes_and_clients() -> None:
    train, test = toy()["train"], toy()["test"]
    assert Counter(train["label"]) == dict.fromkeys(TOPICS, 60)
    assert Counter(test["label"]) == dict.fromkeys(TOPICS, 20)
    sizes = Counter(train["client"])
    assert len(sizes) == 6 and max(sizes.values()) > 2 * min(sizes.values())
    assert not set(train["text"]) & set(test["text"])


def test_every_document_tells_its_class_and_no_other() -> None:
    for columns in toy().values():
        for text, label in zip(columns["text"], columns["label"], strict=True):
            words = text.split()
            assert 6 <= len(words) <= 12
            assert {topic for topic, vocabulary in TOPICS.items() if set(words) & set(vocabulary.split())} == {label}


def test_every_word_is_asked_for_in_training_and_once_more_in_the_test() -> None:
    train, test = toy_qa()["train"], toy_qa()["test"]
    assert toy_qa() == toy_qa() and (len(train["text"]), len(test["text"])) == (128, 64)
    assert Counter(train["answer"]) == dict.fromkeys(test["answer"], 2) and not set(train["text"]) & set(test["text"])
    assert all(answer.endswith(f"belongs to {label}") for answer, label in zip(train["answer"], train["label"], strict=True))
    assert len(set(train["client"])) == 6
