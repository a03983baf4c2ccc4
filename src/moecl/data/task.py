"""A task's examples: rows of its splits, checked, with what the model reads and what it should answer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, islice
from typing import Any

from moecl.config import Task, TaskConfig
from moecl.data.rows import decode_line, parse_object, read_rows
from moecl.errors import ConfigError, DataError, near

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}\n]+)\}|[{}]")
_SHOWN = 60  # characters of a value, and about as many labels, that an error still shows


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `messages` holds the turns before the answer, the answer itself is `label` or `completion`.

    `text` is the value of the field that cuts fall on (None for messages), `fields` every field that the
    instruction may use, `where` the `file:line` or `file row n` that the row came from.
    """

    text: str | None
    fields: dict[str, str]
    label: str | None
    completion: str | None
    messages: tuple[dict[str, str], ...] | None
    where: str


@dataclass(frozen=True, slots=True)
class Split:
    """Examples in the order of their file; `sha256` is over what is used of them, so that a limit changes it."""

    source: str
    examples: list[Example]
    sha256: str


@dataclass(frozen=True, slots=True)
class TaskData:
    """A task, its labels known, and its splits."""

    task: Task
    train: Split
    validation: Split | None
    test: Split | None

    def splits(self) -> dict[str, Split]:
        """The splits there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}


@dataclass(frozen=True, slots=True)
class Template:
    """An instruction: `literals[0] {names[0]} literals[1] {names[1]} ...`; `{{` and `}}` are literal braces."""

    literals: tuple[str, ...]
    names: tuple[str, ...]

    @property
    def cut(self) -> str:
        """The field that cuts fall on: `text` or `prompt` where the instruction has it, else its last field."""
        return next((name for name in ("text", "prompt") if name in self.names), self.names[-1])

    def fill(self, fields: Mapping[str, str]) -> str:
        """The instruction with the fields put in; braces in their values stay as they are."""
        values = [fields[name] for name in self.names]
        return "".join(part for pair in zip(self.literals, [*values, ""], strict=True) for part in pair)


@lru_cache(maxsize=256)
def template(instruction: str) -> Template:
    """Parse an instruction. Raises `ConfigError` for a single brace and for an instruction without a field."""
    literals, names, start = [""], [], 0
    for match in _TOKEN.finditer(instruction):
        literals[-1] += instruction[start : match.start()]
        start = match.end()
        if match[1] is not None:
            names.append(match[1])
            literals.append("")
        elif match[0] in ("{{", "}}"):
            literals[-1] += match[0][0]
        else:
            raise ConfigError(
                f"instruction: a lone {match[0]!r} in {_show(instruction)}; write {match[0] * 2} for a brace"
            )
    literals[-1] += instruction[start:]
    if not names:
        raise ConfigError(f"instruction: {_show(instruction)} uses no field; put {{text}} where the row's text goes")
    return Template(tuple(literals), tuple(names))


def load_task_data(config: TaskConfig) -> TaskData:
    """Read every split of a task; labels that the settings leave open are those of the training rows, sorted.

    Raises `DataError` with file and line of the first row that cannot be used.
    """
    task = Task(**{name: getattr(config, name) for name in Task.model_fields})
    train = read_split(config.train, task, config.limit.train, "train")
    if task.kind == "classification" and not task.labels:
        task = task.model_copy(update={"labels": _found_labels(train)})
    validation, test = (
        None if source is None else read_split(source, task, limit, name)
        for name, source, limit in (
            ("validation", config.validation, config.limit.validation),
            ("test", config.test, config.limit.test),
        )
    )
    return TaskData(task, train, validation, test)


def read_split(source: str, task: Task, limit: int | None = None, name: str = "train") -> Split:
    """The first `limit` rows of a file, an asset or a hub id; `name` is the hub split where the id names none."""
    rows = islice(read_rows(source, name), limit)
    examples = [_example(where, row, task, answered=True) for where, row in rows]
    if not examples:
        raise DataError(f"{source}: no rows; add some, or name another file")
    digest = hashlib.sha256()
    for one in examples:
        row = [_inputs(one, task), one.label, one.completion]
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return Split(source, examples, digest.hexdigest())


def plain_rows(lines: Iterable[str | bytes], source: str = "stdin") -> Iterator[tuple[str, str | dict[str, Any]]]:
    """(`source:line`, row), one at a time: JSON objects, where the first line is one, else plain texts.

    Blank lines are skipped among JSON objects and at the end; between plain texts one is an error, because answers must
    match lines. Raises `DataError`.
    """
    json_rows: bool | None = None
    blank: str | None = None
    for number, raw in enumerate(lines, 1):
        place = f"{source}:{number}"
        line = decode_line(raw, place, number == 1) if isinstance(raw, bytes) else raw
        line = line.removeprefix("\ufeff") if number == 1 else line
        if not line.strip():
            blank = blank or place
            continue
        if json_rows is None:
            json_rows = _is_object(line)
        if json_rows:
            yield place, parse_object(line, place)
        elif blank:
            raise DataError(f"{blank}: the line is empty; remove it, or give JSONL rows")
        else:
            yield place, line.rstrip("\r\n")


def listed(rows: Iterable[Any], what: str = "rows") -> list[Any]:
    """Raises `DataError` for one row alone, whose characters or fields would be taken for rows."""
    if isinstance(rows, str | bytes | Mapping | Example):
        raise DataError(f"{what}: {_show(rows)} is one alone; give a list")
    return list(rows)


def text_alone(row: Example, task: Task) -> str:
    """What a row's own task is to be told by: the fields that its instruction shows, or a dialogue's turns."""
    if row.messages is not None:
        return _spoken(row.messages)
    return "\n".join(row.fields[name] for name in dict.fromkeys(template(task.instruction).names))


def text_of_any(row: str | Mapping[str, Any], tasks: Iterable[Task], where: str = "row") -> str:
    """The same of a row whose task is not known: the fields that instructions of `tasks` show, as far as it has them.

    Raises `DataError` where it has none, and for what is not valid Unicode.
    """
    if isinstance(row, str):
        _check_unicode(where, "text", row)
        return row
    names = dict.fromkeys(name for task in tasks for name in template(task.instruction).names)
    found = {name: _text_form(row[name]) for name in names if _is_scalar(row.get(name))}
    for name, value in found.items():
        _check_unicode(where, name, value)
    if found:
        return "\n".join(found.values())
    if row.get("messages") is not None:
        return _spoken(_turns(where, row["messages"], answered=False)[0])
    raise DataError(f"{where}: the row has no field that a task reads; give {_listed(names)}, or messages")


def _spoken(turns: Iterable[Mapping[str, str]]) -> str:
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")


def example(row: str | Mapping[str, Any], task: Task, where: str = "row", *, answered: bool = False) -> Example:
    """A row: its fields, or a text for the one field that the instruction has. Only `answered`, it needs its label."""
    return _example(where, _plain_row(row, where, task) if isinstance(row, str) else row, task, answered=answered)


def overlaps(data: TaskData) -> dict[tuple[str, str], int]:
    """How many rows of the second split are also in the first: same input, white space aside, whatever the answer.

    A split with itself counts the rows that repeat an earlier one. Only counts above 0 are in the result.
    """
    counts = {name: Counter(inputs(split, data.task)) for name, split in data.splits().items()}
    found = {(name, name): count.total() - len(count) for name, count in counts.items()}
    for first, second in combinations(counts, 2):
        found[first, second] = sum(n for key, n in counts[second].items() if key in counts[first])
    return {pair: count for pair, count in found.items() if count}


def inputs(split: Split, task: Task) -> list[tuple[str, ...]]:
    """What the model would read of each row, white space made even: equal for rows that repeat each other."""
    return [tuple(" ".join(value.split()) for value in _inputs(one, task)) for one in split.examples]


def _inputs(row: Example, task: Task) -> list[str]:
    if row.messages is not None:
        return [part for turn in row.messages for part in (turn["role"], turn["content"])]
    return [row.fields[name] for name in template(task.instruction).names]


def _found_labels(split: Split) -> dict[str, str]:
    labels = sorted({one.label for one in split.examples if one.label is not None})
    if len(labels) < 2:
        raise DataError(f"{split.source}: every row has the label {labels[0]!r}; a classification needs two or more")
    return {label: label for label in labels}


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return line.lstrip().startswith('{"')  # meant as one: parsing it again says where it is broken


def _plain_row(line: str, place: str, task: Task) -> dict[str, Any]:
    first, *more = dict.fromkeys(template(task.instruction).names)
    if more:
        fields = ", ".join(f'"{name}": ...' for name in (first, *more))
        raise DataError(f"{place}: a plain text fills one field; give all that the task reads as JSON: {{{fields}}}")
    return {first: line}


def _example(where: str, row: Mapping[str, Any], task: Task, *, answered: bool) -> Example:
    parsed = template(task.instruction)
    if row.get("messages") is not None and (task.kind == "generation" or parsed.cut not in row):
        return _dialogue(where, row["messages"], task, answered)
    fields = {name: _text_form(value) for name, value in row.items() if name != task.answered_by and _is_scalar(value)}
    for name in dict.fromkeys(parsed.names):
        _check_field(where, name, row, task, answered=answered, cut=name == parsed.cut)
    label = (
        (_label(where, row, task) if answered else _known_label(row, task)) if task.kind == "classification" else None
    )
    completion = _completion(where, row, task) if answered and task.kind == "generation" else None
    return Example(fields[parsed.cut], fields, label, completion, None, where)


def _check_field(where: str, name: str, row: Mapping[str, Any], task: Task, *, answered: bool, cut: bool) -> None:
    if name == task.answered_by:
        raise DataError(f"{where}: instruction: {{{name}}} would show the model the answer; remove it")
    value = _present(where, name, row, "" if name in row else _remedy(task, answered))
    if not (isinstance(value, str) if cut else _is_scalar(value)):
        raise DataError(f"{where}: {name}: {_show(value)} is of type {type(value).__name__}, not a string")
    if cut and not value.strip():
        raise DataError(f"{where}: {name}: the text is empty; remove the row or fill it in")
    _check_unicode(where, name, str(value))


def _remedy(task: Task, answered: bool) -> str:
    """For a field that a row lacks: once a task is learned, its instruction is what it is."""
    if answered:
        return f"; correct it in the instruction of task {task.name!r} ({{{{ and }}}} are plain braces)"
    alone = len(set(template(task.instruction).names)) == 1
    return f"; task {task.name!r} reads it: rename the field{', or give plain texts' if alone else ''}"


def _present(where: str, name: str, row: Mapping[str, Any], remedy: str) -> Any:
    if name not in row:
        hint = near(name, row) + (remedy if row else "")
        raise DataError(f"{where}: {name}: the row has no such field, only {_listed(row) or 'none at all'}{hint}")
    if row[name] is None:
        raise DataError(f"{where}: {name}: null; fill it in or remove the row")
    return row[name]


def _label(where: str, row: Mapping[str, Any], task: Task) -> str:
    name = task.answered_by
    value = _present(
        where, name, row, "; rename the field that holds the label, or give its name in the task as answer_field"
    )
    forms = _label_forms(value)
    if not forms or not forms[0].strip():
        choices = _listed(task.labels) if task.labels else "a string"
        raise DataError(f"{where}: {name}: {_show(value)} is not a label; give {choices}")
    _check_unicode(where, name, forms[0])
    if not task.labels:
        return forms[0]
    for form in forms:
        if form in task.labels:
            return form
    raise DataError(
        f"{where}: {name}: {_show(value)} is not one of {_listed(task.labels)}{near(forms[0], task.labels)}; "
        "correct the row, or add it to the task's labels"
    )


def _known_label(row: Mapping[str, Any], task: Task) -> str | None:
    """The label of a row that needs none: what else stands there is none of the task's business."""
    return next((form for form in _label_forms(row.get(task.answered_by)) if form in (task.labels or ())), None)


def _label_forms(value: Any) -> list[str]:
    """The strings that a label in data may stand for: JSON has numbers, and a column with gaps turns 1 into 1.0."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bool):
        return [_text_form(value), str(value)]
    if isinstance(value, int):
        return [str(value)]
    if isinstance(value, float):
        if not math.isfinite(value):  # a gap, as pandas writes it
            return []
        return [str(int(value)), str(value)] if value.is_integer() else [str(value)]
    return []


def _completion(where: str, row: Mapping[str, Any], task: Task) -> str:
    name = task.answered_by
    value = _present(
        where, name, row, "; rename the field that holds the answer, or give its name in the task as answer_field"
    )
    if not isinstance(value, str):
        raise DataError(f"{where}: {name}: {_show(value)} is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise DataError(f"{where}: {name}: it is empty; remove the row or fill it in")
    _check_unicode(where, name, value)
    return value


def _dialogue(where: str, messages: Any, task: Task, answered: bool) -> Example:
    if task.kind == "classification":
        raise DataError(f"{where}: messages: a classification needs rows of text and label; use kind: generation")
    prior, last = _turns(where, messages, answered)
    return Example(None, {}, None, last["content"] if last and answered else None, prior, where)


def _turns(where: str, messages: Any, answered: bool) -> tuple[tuple[dict[str, str], ...], dict[str, str] | None]:
    """The turns that are read, and the assistant's answer where the last one is."""
    turns = [_turn(where, index, turn) for index, turn in enumerate(messages if isinstance(messages, list) else [])]
    if not turns:
        raise DataError(f"{where}: messages: {_show(messages)} is not a list of turns, each with role and content")
    last = turns[-1] if turns[-1]["role"] == "assistant" else None
    if answered and last is None:
        raise DataError(f"{where}: messages: ends in {turns[-1]['role']!r}, not in the assistant's answer; add it")
    prior = tuple(turns[:-1] if last else turns)
    if not prior:
        raise DataError(f"{where}: messages: nothing comes before the assistant's answer; add the user's turn")
    if last and answered and not last["content"].strip():
        raise DataError(f"{where}: messages: the assistant's answer is empty; remove the row or fill it in")
    return prior, last


def _turn(where: str, index: int, turn: Any) -> dict[str, str]:
    role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: messages[{index}]: {_show(turn)} needs a role and a content, both strings")
    _check_unicode(where, f"messages[{index}]", role + content)
    return {"role": role, "content": content}


def _check_unicode(where: str, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        half = value[error.start]
        raise DataError(f"{where}: {name}: {half!r} at character {error.start + 1} is not valid Unicode") from error


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _text_form(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
