"""Answers as OpenAI's objects: whole, and as server-sent events."""

import codecs
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from moecl.generation import Piece, Token
from moecl.server.library import expert
from moecl.server.schema import (
    Chat,
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from moecl.server.service import Written, logprob
from moecl.store import TaskRecord

Decode = Callable[[int], tuple[str, bytes]]
DONE = b"data: [DONE]\n\n"


def fingerprint(record: TaskRecord) -> str:
    return f"{record.name}-v{record.version}-{expert(record)[:12]}"


def head(kind: str, record: TaskRecord) -> dict[str, Any]:
    """What every object and chunk of an answer has."""
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": record.name,
        "system_fingerprint": fingerprint(record),
    }


def usage(answers: Sequence[Written]) -> Usage:
    return Usage.of(sum(one.prompt_tokens for one in answers), sum(one.tokens for one in answers))


def finish(answer: Written) -> Any:
    return "stop" if answer.completion is None else answer.completion.reason


def chat(answer: Written, decode: Decode, top: int | None) -> Chat:
    logprobs = None if top is None else ChatLogprobs(content=answer_logprobs(answer, decode, top))
    choice = ChatChoice(message=ChatMessage(content=answer.text), logprobs=logprobs, finish_reason=finish(answer))
    return Chat(**head("chat.completion", answer.record), choices=[choice], usage=usage([answer]))


def completions(answers: Sequence[Written], decode: Decode, top: int | None) -> TextCompletion:
    choices = [
        TextChoice(
            index=index,
            text=answer.text,
            logprobs=None if top is None else text_logprobs(answer_logprobs(answer, decode, top), Offsets()),
            finish_reason=finish(answer),
        )
        for index, answer in enumerate(answers)
    ]
    return TextCompletion(**head("text_completion", answers[0].record), choices=choices, usage=usage(answers))


def answer_logprobs(answer: Written, decode: Decode, top: int) -> list[TokenLogprob]:
    """The tokens with their log p; of a label the label, beside the others."""
    if answer.completion is not None:
        return [token_logprob(token, decode) for token in answer.completion.logprobs]
    scores = answer.scores or {}
    ranked = sorted(scores.items(), key=lambda one: -one[1])[:top]
    others = [label_logprob(label, share) for label, share in ranked]
    return [TokenLogprob(**vars(label_logprob(answer.text, scores[answer.text])), top_logprobs=others)]


def token_logprob(token: Token, decode: Decode) -> TokenLogprob:
    others = [one_logprob(*decode(other), share) for other, share in token.top]
    return TokenLogprob(**vars(one_logprob(*decode(token.id), token.logprob)), top_logprobs=others)


def label_logprob(label: str, share: float) -> TopLogprob:
    return one_logprob(label, label.encode(), logprob(share))


def one_logprob(token: str, raw: bytes, logprob: float) -> TopLogprob:
    return TopLogprob(token=token, logprob=max(logprob, -9999.0), bytes=list(raw))  # JSON has no infinity


class Offsets:
    """Where tokens, one after another, begin in their text, which has no white space in front."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def next(self, token: TokenLogprob) -> int:
        start, text = self._characters, self._decoder.decode(bytes(token.bytes))
        self._characters += len(text if start else text.lstrip())
        return start


def text_logprobs(tokens: Sequence[TokenLogprob], offsets: Offsets) -> TextLogprobs:
    return TextLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{one.token: one.logprob for one in token.top_logprobs} for token in tokens],
        text_offset=[offsets.next(token) for token in tokens],
    )


# As a stream


def event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()  # readers may end a line at U+2028


Said = TaskRecord | Piece | Written
Choice = Callable[[str, Sequence[TokenLogprob], str | None], dict[str, Any]]  # text, tokens, why it ends there


async def chat_events(
    pieces: AsyncIterator[Said], decode: Decode, top: int | None, with_usage: bool
) -> AsyncIterator[bytes]:
    """A piece's tokens come with it."""

    def choice(text: str, tokens: Sequence[TokenLogprob], reason: str | None = None, **delta: str) -> dict[str, Any]:
        logprobs = ChatLogprobs(content=list(tokens)).model_dump() if tokens else None
        delta |= {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    first = choice("", (), role="assistant", content="")
    async for data in events("chat.completion.chunk", pieces, decode, top, with_usage, choice, first):
        yield data


async def text_events(
    pieces: AsyncIterator[Said], decode: Decode, top: int | None, with_usage: bool
) -> AsyncIterator[bytes]:
    offsets = Offsets()

    def choice(text: str, tokens: Sequence[TokenLogprob], reason: str | None = None) -> dict[str, Any]:
        logprobs = text_logprobs(tokens, offsets).model_dump() if tokens else None
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async for data in events("text_completion", pieces, decode, top, with_usage, choice):
        yield data


async def events(
    kind: str,
    pieces: AsyncIterator[Said],
    decode: Decode,
    top: int | None,
    with_usage: bool,
    choice: Choice,
    first: dict[str, Any] | None = None,
) -> AsyncIterator[bytes]:
    shared: dict[str, Any] = {}
    more = {"usage": None} if with_usage else {}
    seen = 0  # tokens that were told
    async for found in pieces:
        if isinstance(found, TaskRecord):
            shared = head(kind, found)
            said = [] if first is None else [first]
        elif isinstance(found, Piece):
            said = [choice(found.text, [token_logprob(token, decode) for token in found.logprobs], None)]
            seen += len(found.logprobs)
        else:
            said = [choice("", [] if top is None else answer_logprobs(found, decode, top)[seen:], finish(found))]
        for one in said:
            yield event({**shared, "choices": [one], **more})
        if with_usage and isinstance(found, Written):
            yield event({**shared, "choices": [], "usage": usage([found]).model_dump()})
    yield DONE
