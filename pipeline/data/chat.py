"""Chats become text through the tokenizer's own chat template, and which characters of it the assistant wrote.

Inside the second stop of the data path: messages -> text, counted characters.
"""

import re
from typing import Any

from pipeline.errors import DataError

Spans = tuple[tuple[int, int], ...]


class ChatTemplate:
    """The chat template of a tokenizer; transformers renders it, as it will at inference."""

    def __init__(self, name_or_path: str, *, revision: str | None = None) -> None:
        """Raises DataError if the tokenizer cannot be loaded, or has no chat template."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path, revision=revision)
        except Exception as error:  # the library raises many kinds, from the hub, the network and the files
            raise DataError(f"tokenizer {name_or_path!r} cannot be loaded: {error}; set data.tokenizer") from error
        if not self._tokenizer.chat_template:
            raise DataError(
                f"tokenizer {name_or_path!r} has no chat template, and data.sources has chats; set data.tokenizer to "
                "an instruct model's"
            )
        self.template = str(self._tokenizer.chat_template)
        added = self._tokenizer.added_tokens_decoder.values()
        special = sorted((str(token) for token in added if token.special), key=len, reverse=True)
        self._turn_end = re.compile(r"\s*(?:" + "|".join(map(re.escape, special)) + ")") if special else None

    def render(self, messages: list[dict[str, str]], *, where: str) -> tuple[str, Spans]:
        """The chat as text, and the characters `[start, stop)` of it that count.

        These are the assistant's contents, each with the special token that ends its turn. They are found by rendering
        the chat a second time with a mark in place of each content, so that a content that also occurs elsewhere is
        not mistaken. Raises DataError where the template changes a content.
        """
        text = self._apply(messages, where=where)
        marks = [message | {"content": f"\x00{number}\x00"} for number, message in enumerate(messages)]
        first, *rest = re.split("\x00([0-9]+)\x00", self._apply(marks, where=where))
        counted: list[tuple[int, int]] = []
        at = len(first) if text.startswith(first) else -1
        for number, literal in zip(rest[::2], rest[1::2], strict=True):
            message = messages[int(number)]
            content = _as_rendered(text, at=at, content=message["content"], literal=literal) if at >= 0 else None
            if content is None:
                at = -1
                break
            if message["role"] == "assistant":
                counted.append((at, self._end_of_turn(text, at=at + len(content))))
            at += len(content) + len(literal)
        if at != len(text):
            raise DataError(
                f"{where}: the chat template does not write the contents as they are, so what the assistant wrote "
                "cannot be told from the rest; drop the row, or set data.tokenizer to one whose template does"
            )
        return text, tuple(counted)

    def _apply(self, messages: list[dict[str, str]], *, where: str) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template raises what it likes, e.g. where roles do not alternate
            raise DataError(f"{where}: the chat template refuses it: {error}; repair or drop the row") from error

    def _end_of_turn(self, text: str, *, at: int) -> int:
        found = self._turn_end.match(text, at) if self._turn_end else None
        return found.end() if found else at


def _as_rendered(text: str, *, at: int, content: str, literal: str) -> str | None:
    """The content as it stands in `text` at `at`, before `literal`: as it is, or trimmed, as many templates do."""
    return next((form for form in (content, content.strip()) if text.startswith(form + literal, at)), None)
