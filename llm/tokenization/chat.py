"""Chat templates: messages to the parts of a text."""

from __future__ import annotations

import datetime
import json
import typing
from collections.abc import Mapping, Sequence

from llm.errors import InputError

if typing.TYPE_CHECKING:
    from llm.tokenization.tokenizer import Tokenizer


def parts(
    tokenizer: Tokenizer, messages: Sequence[Mapping], add_generation_prompt: bool, variables: Mapping
) -> list[str | int]:
    """A conversation as plain text and ids of special tokens, by the tokenizer's template.

    The template runs on messages in which every special token's text is cut by a character that stands nowhere else, so
    the special tokens of its output are its own. Then that character is taken out of the plain text. So that no token
    arises where a message meets the template either, a cut is also made where a message starts or ends with a part of
    one.

    Raises:
        InputError: there is no template, it can not be read, or it refuses the messages.
    """
    import jinja2  # 1 MB, for chats only
    import jinja2.ext
    import jinja2.sandbox

    if tokenizer.chat_template is None:
        raise InputError("this tokenizer has no chat template: it was not made for conversations")
    written = json.dumps([messages, variables], ensure_ascii=False, default=str)
    cut = _unused(written + tokenizer.chat_template)

    def safe(value):
        if isinstance(value, str):
            return _cut(value, tokenizer.special, cut)
        if isinstance(value, Mapping):
            return {safe(key): safe(item) for key, item in value.items()}
        return [safe(item) for item in value] if isinstance(value, list | tuple) else value

    def refuse(message):
        raise jinja2.TemplateError(message)

    # Templates in use are written for these settings and functions.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    tokens = {f"{name}_token": text for name, text in _texts(tokenizer).items()}
    try:
        template = environment.from_string(tokenizer.chat_template)
        text = template.render(
            **tokens | safe(variables), messages=safe(messages), add_generation_prompt=add_generation_prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"the chat template does not take these messages: {error}") from None
    return [part if isinstance(part, int) else part.replace(cut, "") for part in tokenizer.split(text)]


def _texts(tokenizer: Tokenizer) -> dict[str, str]:
    texts = {i: text for text, i in tokenizer.special.items()}
    roles = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
    return {role: texts[getattr(tokenizer, role)] for role in roles if getattr(tokenizer, role) is not None}


def _unused(text: str) -> str:
    """A character of the private use area that the text does not hold."""
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in text)


def _cut(text: str, special: Mapping[str, int], cut: str) -> str:
    for token in special:
        if len(token) == 1 and token in text:
            raise InputError(f"this tokenizer can not write {token!r} as plain text: take it out of the messages")
        while token in text:
            text = text.replace(token, token[:1] + cut + token[1:])
    if any(text.endswith(token[:n]) for token in special for n in range(1, len(token))):
        text += cut
    if any(text.startswith(token[n:]) for token in special for n in range(1, len(token))):
        text = cut + text
    return text


def _json(value, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False) -> str:
    """The filter that templates for tools expect: JSON without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
