"""Documents of a causal language model: prompts, answers and chats become one text each, with the places that are learned.

A document is a prompt with its answer, put together by ``data.template`` or by the tokenizer's chat template; or a chat, of which every
turn of the assistant is learned; or a plain text, which is learned from end to end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from jinja2 import TemplateError

from slora_dist.config import DataConfig
from slora_dist.data.table import Table, filled, texts, values
from slora_dist.errors import ConfigError

Span = tuple[int, int]  # characters of a text: the first one, and the one behind the last
Chat = Sequence[Mapping[str, str]]  # turns, each with a role and its content
CHAT = "a list of {role: system | user | assistant, content: text} in which an assistant answers"


@dataclass(frozen=True)
class Written:
    """Texts with the spans of each that are learned, if that is the task.

    ``complete`` ones have their special tokens in them, as chat templates write them.
    """

    texts: list[str]
    answers: list[list[Span]] | None
    complete: bool


Reader = Callable[[Table], Written]


def unread(table: Table) -> Written:
    """Read no text at all, where only labels and clients of the rows are asked for."""
    return Written([""] * len(table), [[]] * len(table), True)


class Instructions:
    """Reads the rows of a source as a tokenizer's model is to see them."""

    def __init__(self, config: DataConfig, tokenizer: Any | None) -> None:
        """Without a ``tokenizer`` there is no chat template. Raises ``ConfigError`` on one that cannot tell where a token comes from."""
        if tokenizer is not None and not tokenizer.is_fast:
            raise ConfigError("model.tokenizer", "does not tell the places of its tokens", "a fast tokenizer, with a tokenizer.json")
        self._config = config
        self._tokenizer = tokenizer if tokenizer is not None and tokenizer.chat_template else None

    def read(self, table: Table) -> Written:
        """Return the documents of ``table``. Raises ``ConfigError`` naming the column or row that is wrong."""
        if self._config.answer is not None:
            return self._prompts(table, self._config.answer)
        found = filled(table, "data.text", self._config.text)
        if isinstance(found[0], list):
            return self._chats([_chat(value, row, table) for row, value in enumerate(found, start=1)], table)
        plain = texts(table, "data.text", self._config.text)
        return Written(plain, [[(0, len(text))] for text in plain], False)

    def _prompts(self, table: Table, column: str) -> Written:
        prompts, answers = texts(table, "data.text", self._config.text), texts(table, "data.answer", column)
        template = self._config.template
        if template is None and self._tokenizer:
            pairs = zip(prompts, answers, strict=True)
            chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in pairs]
            return self._chats(chats, table)
        begun = [f"{prompt}\n" for prompt in prompts] if template is None else _filled_in(template, table)
        whole = [prompt + answer for prompt, answer in zip(begun, answers, strict=True)]
        return Written(whole, [[(len(prompt), len(text))] for prompt, text in zip(begun, whole, strict=True)], False)

    def _chats(self, chats: Sequence[Chat], table: Table) -> Written:
        if not self._tokenizer:
            raise ConfigError("data.text", f"{table.name} holds chats, and the tokenizer has no chat template", "another `model.tokenizer`")
        try:
            written = [self._render(chat, row, table) for row, chat in enumerate(chats, start=1)]
        except ConfigError:
            raise
        except (TemplateError, TypeError, ValueError) as error:
            raise ConfigError("data.text", f"the chat template refuses {table.name} ({error})", "chats that fit the model's") from None
        return Written([text for text, _ in written], [spans for _, spans in written], True)

    def _render(self, chat: Chat, row: int, table: Table) -> tuple[str, list[Span]]:
        """Return a chat as text, and of each answer the span from what asks for it to the end of its turn."""
        text, spans = self._apply(chat), []
        for at, turn in enumerate(chat):
            if turn["role"] == "assistant":
                before, after = self._apply(chat[:at], add_generation_prompt=True), self._apply(chat[: at + 1])
                if not (text.startswith(after) and after.startswith(before)):
                    problem = f"the chat template rewrites earlier turns of row {row} of {table.name}"
                    raise ConfigError("data.text", problem, "a template that only adds, or `data.answer` with `data.template`")
                spans.append((len(before), len(after)))
        return text, spans

    def _apply(self, chat: Chat, add_generation_prompt: bool = False) -> str:
        assert self._tokenizer
        return str(self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt))


def _chat(value: object, row: int, table: Table) -> Chat:
    turns = value if isinstance(value, list) else []
    sound = all(isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns)
    if not (turns and sound and turns[0]["role"] != "assistant" and any(turn["role"] == "assistant" for turn in turns)):
        raise ConfigError("data.text", f"row {row} of {table.name} is no chat", CHAT)
    # columns of structs have all keys in all turns, and templates ask whether a key is there
    return [{key: part for key, part in turn.items() if part is not None} for turn in turns]


def _filled_in(template: str, table: Table) -> list[str]:
    """Return the template for every row, with the row's columns in it; an empty cell leaves nothing."""
    try:
        columns = sorted({name for _, name, _, _ in Formatter().parse(template) if name is not None})
    except ValueError as error:
        raise ConfigError("data.template", f"cannot be read ({error})", "text with {column} in it; {{ and }} stand for braces") from None
    cells = [["" if value is None else value for value in values(table, "data.template", column)] for column in columns]
    rows = zip(*cells, strict=True) if columns else [()] * len(table)
    return [_row(template, dict(zip(columns, row, strict=True)), number, table) for number, row in enumerate(rows, start=1)]


def _row(template: str, cells: Mapping[str, object], number: int, table: Table) -> str:
    try:
        return template.format(**cells)
    except (ValueError, LookupError, TypeError) as error:  # a format that is none, or that does not fit what stands in the cell
        cause = f"row {number} of {table.name}: {error}"
        raise ConfigError("data.template", f"cannot be filled in ({cause})", "text with {column} in it, without formats") from None
