"""Conversations by a chat template, in which only the template writes control tokens.

What users type must not become a control token. Before rendering, in every string of the messages and variables, each
character that can begin or end a special token is replaced by a noncharacter of Unicode that stands nowhere else. A
special token found in the rendered text therefore has its first and last character from the template. After the special
tokens are found, the characters are put back, and the text between is encoded as ordinary text. Left as they are:

* a role or a type that is one word, which templates compare with words;
* texts that the template itself compares with, `</think>` say, where no special token begins like them;
* letters and digits, unless a special token that begins with one stands there, whole or cut off by the string's end.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from llm.errors import InputError

_PLANES = range(0, 0x110000, 0x10000)
_NONCHARACTERS = [*range(0xFDD0, 0xFDF0), *(plane + end for plane in _PLANES for end in (0xFFFE, 0xFFFF))]
_WORD = re.compile(r"\w*")


ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation, and how its replaced characters come back.

    Attributes:
        answers: for each message of the assistant in order, the place in the text where its answer begins: what stands
            before is what the template writes to ask for it. None where the template later writes that in another way.
    """

    text: str
    back: dict[int, str]
    answers: tuple[int | None, ...] = ()

    def restore(self, text: str) -> str:
        """The text with its own characters."""
        return text.translate(self.back)


def render(template: str, messages: Sequence[dict[str, Any]], special_tokens: list[str], add_generation_prompt: bool,
           tokens: dict[str, str], variables: dict[str, Any]) -> Rendered:  # fmt: skip
    """The conversation by the template.

    Args:
        template: Jinja source.
        messages: of the conversation.
        special_tokens: texts that must come from the template alone.
        add_generation_prompt: whether the assistant's answer is opened.
        tokens: bos_token, eos_token and so on.
        variables: further variables.

    Raises:
        InputError: the template cannot be read, fails, or refuses the messages.
    """
    import jinja2

    _check(messages)
    compiled, literals = _compiled(template)
    used = set(template)
    _each([list(messages), variables], lambda text: used.update(text) or text)
    masks = _masks(special_tokens, used)
    kept = [t for t in literals if not any(s.startswith(t) or t.startswith(s) for s in special_tokens)]
    mask = functools.partial(_mask, special_tokens=special_tokens, masks=masks, kept=kept)
    masked, given = _each(list(messages), mask), {**tokens, **_each(variables, mask)}

    def write(count: int, asks: bool) -> str:
        try:
            return compiled.render(**given, messages=masked[:count], add_generation_prompt=asks)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses the conversation: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise InputError(f"the chat template fails on the conversation: {error}") from None

    text = write(len(masked), add_generation_prompt)
    answers = []
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            try:
                asked = write(number, True) if number else None
            except InputError:  # it asks for no answer to these
                asked = None
            answers.append(len(asked) if asked is not None and text.startswith(asked) else None)
    return Rendered(text, {ord(mask): character for character, mask in masks.items()}, tuple(answers))


def _check(messages: Sequence[dict[str, Any]]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("a conversation is a list of at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} is not a dict with a role: {message!r}")


def _masks(special_tokens: list[str], used: set[str]) -> dict[str, str]:
    """A noncharacter, none that is `used`, for each character that begins or ends a special token."""
    free = (chr(code) for code in _NONCHARACTERS if chr(code) not in used)
    try:
        return {c: next(free) for c in sorted({token[end] for token in special_tokens for end in (0, -1)})}
    except StopIteration:
        raise InputError(
            "the conversation uses every noncharacter of Unicode; none is left to mark text with"
        ) from None


def _mask(text: str, special_tokens: list[str], masks: dict[str, str], kept: list[str]) -> str:
    def begins(place: int) -> bool:
        rest = text[place:].rstrip()
        return any(text.startswith(token, place) or token.startswith(rest) for token in special_tokens)

    masked, place = [], 0
    while place < len(text):
        literal = next((t for t in kept if text.startswith(t, place)), "")
        if literal:
            masked.append(literal)
        elif text[place] in masks and (not text[place].isalnum() or begins(place)):
            masked.append(masks[text[place]])
        else:
            masked.append(text[place])
        place += len(literal) or 1
    return "".join(masked)


def _each(value: Any, mask, key: str = "") -> Any:
    """A copy of nested messages with every string masked."""
    if isinstance(value, str):
        return value if key in ("role", "type") and _WORD.fullmatch(value) else mask(value)
    if isinstance(value, dict):
        return {mask(k) if isinstance(k, str) else k: _each(v, mask, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each(v, mask) for v in value]
    return value


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    """The template, ready, and the strings that stand in its expressions."""
    import jinja2
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        parsed = environment.parse(template)
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template is not valid Jinja: {error}") from None
    literals = {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
    return compiled, sorted((t for t in literals if len(t) > 1), key=lambda t: (-len(t), t))
