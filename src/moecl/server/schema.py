"""Requests and answers. OpenAI's API as far as it is served: what else a request has is refused by its name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Finish = Literal["stop", "length"]
Name = Annotated[str, Field(min_length=1, max_length=200, description="a task's name, or auto")]
Text = Annotated[str, Field(min_length=0)]  # with a length to check, halves of surrogate pairs are refused, too
Fields = dict[str, str | int | float | bool]  # of a row, as the instruction names them


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Said(BaseModel):
    """A part of an answer."""


# Requests


class Part(Asked):
    type: Literal["text"]
    text: Text


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None
    refusal: None = None  # what an answer has that is sent back as a turn
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Asked):
    include_usage: bool = False


class Wish(Asked):
    """What a chat and a completion have in common."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        default=None, description="0, the default, writes the likeliest token each time, as `moecl eval` scores it"
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatWish(Wish):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionWish(Wish):
    prompt: Text | Annotated[list[Text | Fields], Field(min_length=1)] = Field(
        description="a text, several, or (not OpenAI's) objects with the fields that the task's instruction names"
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None


class ClassifyWish(Asked):
    model: Name
    input: Text | Annotated[list[Text | Fields], Field(min_length=1)] = Field(
        description="a text, several, or objects with the fields that the task's instruction names"
    )
    gates: bool = Field(default=False, description="tell the task expert's mean weight by layer; a row at a time")


# Answers


class Model(Said):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "moecl"


class Models(Said):
    object: Literal["list"] = "list"
    data: list[Model]


class Usage(Said):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> "Usage":
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class TopLogprob(Said):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Said):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(Said):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Completed(Said):
    """What the answers to a chat and to a completion have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str = Field(description="task, version and the sha256 of the expert that answered")
    usage: Usage


class ChatChoice(Said):
    index: int = 0
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish


class Chat(Completed):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextLogprobs(Said):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Said):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finish


class TextCompletion(Completed):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class Classified(Said):
    index: int
    label: str | None = Field(description="null where auto knows no task for the text, or one that writes")
    scores: dict[str, float] = Field(description="the labels' shares of the probability")
    decision: str | None = Field(default=None, description="the label, or review; null without a thresholds file")
    task: str | None
    version: int | None
    expert: str | None = Field(description="sha256 of the task's own expert")
    tasks: dict[str, float] | None = Field(
        default=None, description="under auto: each task's share, if the text is for one of them"
    )
    familiar: float | None = Field(
        default=None, description="under auto: how like the tasks' texts it is, -1 to 1, -2 beyond all"
    )
    gates: dict[str, float] | None = Field(
        default=None, description="where asked for: layer -> the task expert's weight"
    )


class Classification(Said):
    object: Literal["list"] = "list"
    model: str
    data: list[Classified]
    usage: Usage


class TaskInfo(Said):
    name: str
    version: int
    versions: list[int]
    kind: str
    labels: list[str]
    fields: list[str]
    chats: bool = Field(description="whether it reads a whole chat, through the base's template")
    metric: str
    score: float | None
    expert: str
    parts: dict[str, str]


class Run(Said):
    """What the page shows of a run."""

    base: str
    auto: bool
    thresholds: bool
    tasks: list[TaskInfo]
    R: list[list[float | None]] | None = Field(
        description="R[i][j]: score on task j after learning task i; row 0 before"
    )
    R_tasks: list[str]
    metrics: dict[str, float | None]


class Problem(Said):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Problems(Said):
    """OpenAI's error object."""

    error: Problem


class Health(Said):
    status: Literal["ok"]


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problems, "description": text}
    for status, text in {
        400: "not a request that is served",
        401: "no key, or a wrong one",
        403: "not from here: the Host is not this server's",
        404: "no such model",
        408: "the request came too slowly",
        413: "the request is too large",
        429: "too many rows under way; Retry-After says when to ask again",
        500: "a fault of the server",
        503: "the store cannot be read, or the server stops",
        504: "it took longer than the time limit",
    }.items()
}
