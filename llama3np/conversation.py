"""A chat that remembers: the cache keeps every turn, and only what is new is fed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama3np.llm import Llama, Step


class Conversation:
    """Turns of one dialog. `messages` is the dialog so far, as dicts with role and content."""

    def __init__(self, llm: Llama, system: str | None = None, format: str | None = None):
        self.llm, self.format = llm, format
        self.messages = [{"role": "system", "content": system}] if system is not None else []
        llm.chat_ids(self.messages, format)  # raises now if the model has no chat format
        self.cache = llm.new_cache()
        self.prompt_ids: list[int] = []  # the whole dialog, as fed for the latest reply
        self._fed: list[int] = []  # the ids that the cache holds

    def reply(self, text: str, max_new_tokens: int | None = None, **options: Any) -> Iterator[Step]:
        """Answer a message; yield a Step for each token. Options are those of Llama.stream.

        Each turn is encoded anew and the cache trimmed to what it shares with that, so the model
        always sees exactly the dialog: no token is skipped, left over or fed twice.
        Raises InputError at once if the dialog no longer fits; it is then as it was before.
        """
        asked = {"role": "user", "content": text}
        ids = self.llm.chat_ids([*self.messages, asked], self.format)
        shared = 0
        while shared < min(len(ids) - 1, len(self._fed)) and ids[shared] == self._fed[shared]:
            shared += 1
        self.cache.trim(shared)
        self._fed = ids[:shared]
        steps = self.llm.stream(ids[shared:], max_new_tokens, cache=self.cache, **options)
        self.prompt_ids = ids
        return self._answer(asked, ids, steps)

    def _answer(self, asked: dict[str, str], ids: list[int], steps: Iterator[Step]) -> Iterator:
        new_ids, pieces = [], []
        try:
            for step in steps:
                new_ids.append(step.id)
                pieces.append(step.text)
                yield step
        finally:  # a reply that was broken off still counts as far as it came
            self._fed = [*ids, *new_ids][: int(self.cache.lengths_B[0])]
            self.messages += [asked, {"role": "assistant", "content": "".join(pieces)}]
