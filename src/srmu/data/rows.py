"""What a row holds, as a text: of questions with their answers, and of chats, losses count the answers alone."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from srmu.errors import SrmuError, first_line

# Columns of a question and of its answer, and who speaks in the plain form; of several pairs the first counts.
PAIRS = {("question", "answer"): ("Question", "Answer"), ("instruction", "output"): ("User", "Assistant")}
RAW = ("prompt", "completion")  # joined as they are, as TRL does
CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # of OpenAI, of ShareGPT
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TEXT = "text"
TODAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"  # for templates that tell the date: always this one
SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant"}
KNOWN = ", ".join([TEXT, *CHATS, *map("/".join, [RAW, *PAIRS])])  # what a row may hold, for errors


class Turn(NamedTuple):
    """What one side says."""

    role: str  # system, user or assistant
    content: str


class CountedText(str):
    """A text of which losses count only some spans of characters; of a chat this is the plain form."""

    spans: Sequence[tuple[int, int]] = ()  # none: all of it
    turns: Sequence[Turn] = ()  # written in the model's chat template, if it has one
    first: int = 0  # the turn from which on the assistant's count
    taken: str = ""  # the columns of its row
    place: str = ""  # of the row, for errors


def join_counted(parts: Sequence[tuple[str, bool]]) -> CountedText:
    """A text of parts, of which those that are marked count."""
    text = CountedText("".join(part for part, _ in parts))
    ends = [0, *accumulate(len(part) for part, _ in parts)]
    if not all(counted for part, counted in parts if part):
        text.spans = [(*pair,) for pair, (_, counted) in zip(pairwise(ends), parts, strict=True) if counted]
    return text


def take_row(row: Mapping[str, Any], place: str, *, plain: bool) -> CountedText | None:
    """The text of a row of questions, of instructions or of a chat; None where it holds none of these.

    `plain`: never in the model's chat template.
    """
    for column, keys in CHATS.items():
        if column in row:
            return join_turns(read_turns(row[column], keys, f"{place}: {column}"), column, place, plain)
    if {*RAW} <= row.keys():
        taken = " and ".join(RAW)
        if all(isinstance(row[column], list) for column in RAW):
            turns = read_turns([*row["prompt"], *row["completion"]], CHATS["messages"], f"{place}: {taken}")
            return join_turns(turns, taken, place, plain, first=len(row["prompt"]))
        text = join_counted([(read_text(row, column, place), column == RAW[1]) for column in RAW])
        text.taken, text.place = taken, place
        return text
    for columns, names in PAIRS.items():
        if {*columns} <= row.keys():
            asked, answer = (read_text(row, column, place) for column in columns)
            more = columns[0] == "instruction" and str(row.get("input") or "").strip()
            turns = [Turn("user", f"{asked}\n\n{read_text(row, 'input', place)}" if more else asked)]
            turns.append(Turn("assistant", answer))
            speakers = dict(zip(("user", "assistant"), names, strict=True))
            return join_turns(turns, " and ".join(columns), place, plain, speakers)
    return None


def join_turns(
    turns: Sequence[Turn], taken: str, place: str, plain: bool, speakers: Mapping[str, str] = SPEAKERS, first: int = 0
) -> CountedText:
    """The plain form of a chat, a line a turn: what the assistant says from turn `first` on is counted."""
    parts: list[tuple[str, bool]] = []
    for number, (role, content) in enumerate(turns):
        counts = role == "assistant" and number >= first
        parts += [("\n" * bool(parts) + f"{speakers[role]}: ", False), (content, counts)]
    text = join_counted(parts)
    text.taken, text.place, text.turns, text.first = taken, place, () if plain else turns, first
    return text


def read_turns(value: Any, keys: tuple[str, str], place: str) -> list[Turn]:
    """The turns of a chat in a row; SrmuError where they cannot be learned from."""
    if isinstance(value, str) and value.startswith("["):  # in a CSV file
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise SrmuError(f"{place}: expected a list of messages with {' and '.join(keys)}")
    turns: list[Turn] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {*keys} <= message.keys():
            raise SrmuError(f"{place}: message {number} has no {' and '.join(keys)}")
        name, content = (message[key] for key in keys)
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise SrmuError(f"{place}: message {number} is by {name!r}, expected one of {', '.join(ROLES)}")
        before = turns[-1].role if turns else ""
        if role == before or (role == "system" and before) or (role == "assistant" and before in ("", "system")):
            after = f"after one by {before}" if before else "and nothing comes before it"
            raise SrmuError(f"{place}: message {number} is by {role}, {after}; user and assistant take turns")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            parts = [part.get("text") for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        turns.append(Turn(role, read_text({f"message {number}": content}, f"message {number}", place)))
    if turns[-1].role != "assistant":
        raise SrmuError(f"{place}: the last message is by {turns[-1].role}; expected an answer by assistant after it")
    return turns


def render_chat(text: CountedText, tokenizer: Any) -> CountedText:
    """A chat in the model's chat template; counted is what the template adds for each answer, its end too."""
    turns = [turn._asdict() for turn in text.turns]
    try:
        template = TODAY + tokenizer.get_chat_template()
        render = partial(tokenizer.apply_chat_template, tokenize=False, chat_template=template)
        whole = render(turns)
        found = CountedText(whole)
        found.spans = []
        for number in range(len(turns)):
            if turns[number]["role"] == "assistant" and number >= text.first:
                before, after = render(turns[:number], add_generation_prompt=True), render(turns[: number + 1])
                if not whole.startswith(after):  # some end the last message alone with it
                    after = after.removesuffix(tokenizer.eos_token or "")
                if not (after.startswith(before) and whole.startswith(after)):
                    raise SrmuError(
                        f"{text.place}: this model's chat template writes a message differently when others follow it; "
                        "give each answer a row, or set plain: true"
                    )
                found.spans.append((len(before), len(after)))
    except SrmuError:
        raise
    except Exception as error:  # a template is a program
        why = f"{text.place}: this model's chat template cannot write the row ({first_line(error)})"
        raise SrmuError(f"{why}; leave it out, or set plain: true") from None
    return found


def read_cell(row: dict[str, Any], column: str, place: str) -> Any:
    """What a row holds in a column."""
    if column not in row:
        names = ", ".join(map(str, row)) or "none"
        raise SrmuError(f"{place}: no column {column!r}; found {names}")
    return row[column]


def read_text(row: Any, column: str, place: str) -> str:
    """The text of a row, which is an object with `column` or a plain string."""
    if isinstance(row, dict):
        row = read_cell(row, column, place)
    if not isinstance(row, str):
        raise SrmuError(f"{place}: {column!r} is {type(row).__name__}, expected a string")
    if not row.strip():
        raise SrmuError(f"{place}: the {column} is empty")
    try:
        row.encode()
    except UnicodeEncodeError:
        raise SrmuError(f"{place}: the {column} holds half of a surrogate pair") from None
    return row
