"""From a sample to the token ids that the engine gets, cut to the model's window."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from uncomp.eval.tasks.base import Sample, Turn

#: stands for a question; no text has it
_MARK = "\x00\x00"

#: The rule, as reports state it.
CUT_RULE = (
    "a prompt longer than the window minus the answer loses tokens from the middle of its context; "
    "as many stay at the front as at the back (LongBench's rule)"
)


@dataclass(frozen=True)
class Prompt:
    """What is sent for one turn.

    Attributes:
        ids: token ids.
        forced: token ids the model is made to say; empty for ordinary turns.
        cut: context tokens left out.
        context_end: tokens of the prompt up to the end of the context.
    """

    ids: tuple[int, ...]
    forced: tuple[int, ...] = ()
    cut: int = 0
    context_end: int = 0


class Renderer:
    """Makes prompts with one model's tokenizer.

    Args:
        tokenizer: Hugging Face tokenizer.
        window: tokens of prompt and answer at most.
        chat: whether samples that leave it open get the chat template.

    Raises:
        ValueError: chat is asked for, but the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any, window: int, chat: bool) -> None:
        self.tokenizer, self.window, self.chat = tokenizer, window, chat
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "this model's tokenizer has no chat template: run with --no-chat, or name an "
                "instruction-tuned model"
            )

    def uses_chat(self, sample: Sample) -> bool:
        """Whether a sample's prompt is in the chat template."""
        return self.chat if sample.chat is None else sample.chat

    def prompt(self, sample: Sample, turn: int) -> Prompt:
        """The prompt of one turn, with the earlier turns and their reference answers before it.

        Raises:
            ValueError: even without any context it does not fit, or the sample needs a chat
                template that the tokenizer does not have.
        """
        asked = sample.turns[turn]
        forced = self._encode(asked.forced, special=False) if asked.forced else ()
        room = self.window - (len(forced) or asked.max_tokens)
        ids = self._ids(sample, turn, sample.context)
        if len(ids) <= room:
            return Prompt(ids, forced, context_end=self._end(sample, sample.context, ids))
        context = self._encode(sample.context, special=False)
        keep = len(context) - (len(ids) - room)
        while keep > 0:
            text = self._without_middle(context, keep)
            ids = self._ids(sample, turn, text)
            if len(ids) <= room:
                return Prompt(ids, forced, len(context) - keep, self._end(sample, text, ids))
            keep -= len(ids) - room  # text cut at the seam can take a token more
        raise ValueError(
            f"{sample.task} {sample.id}: {len(ids)} tokens do not fit into {room} (a window of "
            f"{self.window} less the answer), even without context"
        )

    def _without_middle(self, context: tuple[int, ...], keep: int) -> str:
        back = keep // 2
        front = keep - back
        halves = (context[:front], context[len(context) - back :])
        return "".join(self.tokenizer.decode(list(half)) for half in halves)

    def _end(self, sample: Sample, context: str, ids: tuple[int, ...]) -> int:
        """How many of a prompt's ids come from what stands before the first question.

        A token of both sides, white space mostly, belongs to the question.
        """
        asked = dataclasses.replace(sample.turns[0], question=_MARK, prefix="")
        marked = dataclasses.replace(sample, turns=(asked,))
        if self.uses_chat(sample):
            text = self._chat_text(marked, 0, context)
        else:
            text = _plain_text(marked, 0, context)
        before = self._encode(text[: text.rindex(_MARK)], special=not self.uses_chat(sample))
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))
        return sum(1 for _ in same)

    def _ids(self, sample: Sample, turn: int, context: str) -> tuple[int, ...]:
        if self.uses_chat(sample):
            return self._encode(self._chat_text(sample, turn, context), special=False)
        if sample.system:
            raise ValueError(
                f"{sample.task} {sample.id}: a system message needs a chat template; leave this "
                f"task out or run with --chat"
            )
        return self._encode(_plain_text(sample, turn, context), special=True)

    def _chat_text(self, sample: Sample, turn: int, context: str) -> str:
        messages = [{"role": "system", "content": sample.system}] if sample.system else []
        for i, asked in enumerate(sample.turns[: turn + 1]):
            before = sample.head + context if i == 0 else ""
            messages.append({"role": "user", "content": before + asked.question})
            if i < turn:
                messages.append({"role": "assistant", "content": _said(asked).strip()})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        # The template has ended the assistant's header with its own white space.
        return text + sample.turns[turn].prefix.lstrip()

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=special))


def _plain_text(sample: Sample, turn: int, context: str) -> str:
    text = sample.head + context
    for asked in sample.turns[:turn]:
        text += f"{asked.question}{_said(asked)}\n\n"
    return text + sample.turns[turn].question + sample.turns[turn].prefix


def _said(turn: Turn) -> str:
    """What stands in the conversation as the answer to an earlier turn."""
    answer = turn.references[0] if turn.references else turn.forced
    return f"{turn.prefix} {answer}"
