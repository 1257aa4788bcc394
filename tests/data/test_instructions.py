"""What a causal language model learns from: which tokens of prompts, chats and texts, and what is said of rows that are none."""

from typing import Any

import pyarrow
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from slora_dist.config import DataConfig
from slora_dist.data.instructions import Instructions
from slora_dist.data.source import Documents
from slora_dist.data.table import Rows, Table
from slora_dist.data.tokens import IGNORED, batches, encode, predicted, word_tokenizer
from slora_dist.errors import ConfigError, RunError

WORDS = ["what", "does", "a", "cat", "say", "?", "meow", "now", "and", "then", "user", "assistant", ":", ";", "system"]
TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} : {{ turn.content }} ;\n{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
REWRITES = "{{ messages | length }} {% for turn in messages %}{{ turn.content }}{% endfor %}"


def tokenizer(template: str | None = None) -> Any:
    words = word_tokenizer([" ".join(WORDS)])
    words.chat_template = template
    return words


def table(**columns: list[Any]) -> Table:
    return Table(Rows(pyarrow.table(columns)), "here", "data.path")


def learned(found: Any, words: Any, length: int = 64) -> list[tuple[str, str]]:
    """(all tokens, the tokens that are learned) of every document."""
    encoded = encode(Documents(found.texts, [0] * len(found.texts), None, found.answers, found.complete), words, length)
    assert encoded.answers is not None
    pairs = zip(encoded.ids, encoded.answers, strict=True)
    return [(words.decode(ids_T.tolist()), words.decode(ids_T[answer_T].tolist())) for ids_T, answer_T in pairs]


def config(**settings: Any) -> DataConfig:
    return DataConfig(path="here", **settings)


def subwords(kind: str) -> Any:
    """A tokenizer that takes a space to the word behind it, as Llama's (Metaspace) and GPT-2's (ByteLevel) do."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "metaspace" else pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.Metaspace() if kind == "metaspace" else decoders.ByteLevel()
    special = ["<end>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    words.train_from_iterator([" ".join(WORDS)] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


PAIR = {"text": ["what does a cat say ?"], "answer": ["meow now"]}


@pytest.mark.parametrize(
    ("settings", "columns", "whole"),
    [
        ({}, PAIR, "[CLS] what does a cat say ? meow now [SEP]"),
        ({"template": "user : {text} assistant : "}, PAIR, "[CLS] user : what does a cat say ? assistant : meow now [SEP]"),
        ({"template": "{more} ; {text} ;"}, PAIR | {"more": [None]}, "[CLS] ; what does a cat say ? ; meow now [SEP]"),
        ({"template": "now : "}, PAIR, "[CLS] now : meow now [SEP]"),
    ],
)
def test_of_a_prompt_the_answer_and_its_end_are_learned(settings: dict[str, Any], columns: dict[str, list[Any]], whole: str) -> None:
    words = tokenizer()
    found = Instructions(config(answer="answer", **settings), words).read(table(**columns))
    assert learned(found, words) == [(whole, "meow now [SEP]")]


def test_keys_that_a_turn_has_not_do_not_reach_the_template() -> None:
    """A column of structs has all keys in all turns."""
    words = tokenizer(TEMPLATE.replace("{{ turn.role }}", "{{ turn.tool_calls | length if 'tool_calls' in turn else turn.role }}"))
    turns = [{"role": "user", "content": "what ?", "tool_calls": None}, {"role": "assistant", "content": "meow", "tool_calls": None}]
    found = Instructions(config(), words).read(table(text=[turns]))
    assert found.texts == ["user : what ? ;\nassistant : meow ;\n"]
    odd = [turns[0] | {"tool_calls": 7}, turns[1]]
    with pytest.raises(ConfigError, match=r"^data\.text: the chat template refuses here"):
        Instructions(config(), words).read(table(text=[odd]))


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
@pytest.mark.parametrize("template", ["user : {text} assistant : ", "{text}\n", "{text}"])
def test_a_word_that_takes_the_prompts_last_space_to_itself_is_learned(kind: str, template: str) -> None:
    words = subwords(kind)
    found = Instructions(config(answer="answer", template=template), words).read(table(**PAIR))
    ((whole, answer),) = learned(found, words)
    assert whole.endswith("meow now<end>") and answer.strip() == "meow now<end>"


def test_a_plain_text_is_learned_from_end_to_end() -> None:
    words = tokenizer()
    assert learned(Instructions(config(), words).read(table(text=["a cat"])), words) == [("[CLS] a cat [SEP]", "a cat [SEP]")]


def test_of_a_chat_every_turn_of_the_assistant_is_learned() -> None:
    words = tokenizer(TEMPLATE)
    roles = ("system", "user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": content} for role, content in zip(roles, ("cat", "what", "meow", "and", "then"), strict=True)]
    found = Instructions(config(), words).read(table(text=[chat]))
    assert learned(found, words) == [("system : cat ; user : what ; assistant : meow ; user : and ; assistant : then ;", "meow ; then ;")]


def test_a_chat_template_writes_prompts_and_answers_unless_another_is_given() -> None:
    words = tokenizer(TEMPLATE)
    found = Instructions(config(answer="answer"), words).read(table(**PAIR))
    assert learned(found, words) == [("user : what does a cat say ? ; assistant : meow now ;", "meow now ;")]
    given = Instructions(config(answer="answer", template="{text} "), words).read(table(**PAIR))
    assert learned(given, words) == [("[CLS] what does a cat say ? meow now [SEP]", "meow now [SEP]")]


@pytest.mark.parametrize(
    ("length", "whole", "answer"),
    [
        (10, "[CLS] what does a cat say ? meow now [SEP]", "meow now [SEP]"),
        (9, "[CLS] does a cat say ? meow now [SEP]", "meow now [SEP]"),
        (6, "[CLS] say ? meow now [SEP]", "meow now [SEP]"),
        (4, "[CLS] ? meow now", "meow now"),
        (2, "[CLS] meow", "meow"),
    ],
)
def test_a_long_document_keeps_what_opens_it_and_its_answer(length: int, whole: str, answer: str) -> None:
    words = tokenizer()
    assert learned(Instructions(config(answer="answer"), words).read(table(**PAIR)), words, length) == [(whole, answer)]


def test_of_a_long_answer_the_end_is_left_out() -> None:
    words = tokenizer()
    found = Instructions(config(answer="answer"), words).read(table(text=["what ?"], answer=["meow " * 9]))
    assert learned(found, words, 6) == [("[CLS] what ? meow meow meow", "meow meow meow")]


def test_labels_are_the_learned_tokens_and_padding_is_ignored() -> None:
    words = tokenizer()
    found = Instructions(config(answer="answer"), words).read(table(text=["what ?", "a"], answer=["meow", "cat say"]))
    encoded = encode(Documents(found.texts, [0, 0], None, found.answers), words, 64)
    (batch,) = batches(encoded, 4, words.pad_token_id)
    expected = batch["input_ids"].clone()
    expected[0, :3] = IGNORED
    expected[1, :2] = IGNORED
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 5] and batch["labels"].tolist() == expected.tolist()
    assert predicted(batch["labels"]) == 2 + 3 and predicted(encoded.labels_N) == 2
    (padded,) = batches(encode(Documents(["what ?", "a cat say now"], [0, 0], None, [[(0, 6)], [(0, 13)]]), words, 64), 4, 0)
    assert padded["labels"][0].tolist() == [IGNORED, *padded["input_ids"][0, 1:4].tolist(), IGNORED, IGNORED]


CHAT = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "meow"}]


@pytest.mark.parametrize(
    ("settings", "template", "columns", "message"),
    [
        ({"answer": "reply"}, None, PAIR, r"data\.answer: no column 'reply' in here. Allowed: one of text, answer"),
        ({"answer": "answer"}, None, {"text": ["a"], "answer": [" "]}, r"data\.answer: the document in row 1 of here is empty"),
        ({"answer": "answer", "template": "{body}"}, None, PAIR, r"data\.template: no column 'body'"),
        ({"answer": "answer", "template": "{text:d}"}, None, PAIR, r"data\.template: cannot be filled in \(row 1 of here: "),
        ({"answer": "answer", "template": "{text!x}"}, None, PAIR, r"data\.template: cannot be filled in"),
        ({"answer": "answer", "template": "{text:{w}}"}, None, PAIR, r"data\.template: cannot be filled in"),
        ({"answer": "answer", "template": "{text"}, None, PAIR, r"data\.template: cannot be read"),
        ({}, None, {"text": [CHAT]}, r"data\.text: here holds chats, and the tokenizer has no chat template"),
        ({}, TEMPLATE, {"text": [CHAT, CHAT[:1]]}, r"data\.text: row 2 of here is no chat"),
        ({}, TEMPLATE, {"text": [[{"from": "user", "value": "a"}]]}, r"data\.text: row 1 of here is no chat"),
        ({}, REWRITES, {"text": [CHAT]}, r"data\.text: the chat template rewrites earlier turns of row 1"),
        ({}, "{{ raise_exception('no') }}", {"text": [CHAT]}, r"data\.text: the chat template refuses here \(no\)"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], template: str | None, columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Instructions(config(**settings), tokenizer(template)).read(table(**columns))


def test_a_document_without_anything_to_learn_ends_the_run() -> None:
    with pytest.raises(RunError, match="no token of the document 'cat' can be learned"):
        encode(Documents(["cat"], [0], None, [[(0, 3)]], complete=True), tokenizer(), 8)
