"""Command lines as people write them: found in texts, and parsed without being run."""

import re
import shlex
from dataclasses import dataclass
from typing import Any

from typer.main import get_command

from moecl.cli import app


def command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `moecl WORDS` names, and the words that are left for it."""
    found: Any = get_command(app)
    while hasattr(found, "commands"):
        found, words = found.commands[words[0]], words[1:]
    return found, words


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of `moecl WORDS`; TyperException where it would be refused."""
    found, rest = command(words)
    return dict(found.make_context(found.name, list(rest)).params)


def all_commands() -> list[list[str]]:
    """The words of every command, those of groups too."""
    group: Any = get_command(app)
    nested = {name: getattr(one, "commands", None) for name, one in group.commands.items()}
    return [[name, *rest] for name, subs in nested.items() for rest in ([[sub] for sub in subs] if subs else [[]])]


def calls(text: str) -> list[list[str]]:
    """The words behind `moecl` of every call in a text of shell lines, comments, pipes and `;` taken into account."""
    parts = [part for line in text.splitlines() for part in re.split(r"&&|[;|]", re.sub(r"\s#.*", "", line))]
    found = [part.split() for part in parts if part.strip().startswith("moecl ")]
    return [shlex.split(" ".join(words))[1:] for words in found]


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        return self.err.splitlines()
