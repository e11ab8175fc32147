"""Records that are conversations, or preferences between two answers to one, in the field's usual form.

    chat        {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}
    preference  {"prompt": text or messages, "chosen": text, "rejected": text}

Of a message, role and content are read. A prompt that is a text is what a user says.
"""

from collections.abc import Sequence
from typing import Any

TEXT, CHAT, PREFERENCE = "text", "chat", "preference"
# The keys of each form whose texts make a document, as `normalised` leaves them.
PARTS = {TEXT: (), CHAT: ("messages",), PREFERENCE: ("prompt", "chosen", "rejected")}
# What an example of each form consists of in token shards; "learned" has 1 for each id that is, else 0.
FIELDS = {CHAT: ("tokens", "learned"), PREFERENCE: PARTS[PREFERENCE]}
ROLES = ("system", "user", "assistant")


def normalised(record: object, form: str) -> tuple[dict[str, Any], str]:
    """(the record with its conversations as lists of {"role", "content"}, what is wrong with it or "")."""
    if not isinstance(record, dict):
        return {}, f"expected an object with {_keys(form)}, not {_short(record)}"
    for key in PARTS[form]:
        if key not in record:
            return (
                {},
                f"there is no {key!r}, only {', '.join(map(repr, record)) or 'nothing'}; data.form={form!r} needs it",
            )
    made = dict(record)
    if form == CHAT:
        made["messages"], wrong = _messages("messages", record["messages"])
        if not wrong and all(message["role"] != "assistant" for message in made["messages"]):
            wrong = "messages: no turn is the assistant's, so there is nothing to learn"
        return made, wrong
    prompt = record["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    made["prompt"], wrong = _messages("prompt", prompt)
    if not wrong and made["prompt"][-1]["role"] == "assistant":
        wrong = "prompt: its last turn is the assistant's; the answer belongs into 'chosen' and 'rejected'"
    for key in ("chosen", "rejected"):
        if not wrong and (not isinstance(record[key], str) or not record[key].strip()):
            wrong = f"{key} is {_short(record[key])}, expected a text that is not empty"
    if not wrong and record["chosen"].strip() == record["rejected"].strip():
        wrong = f"chosen and rejected are one text, {_short(record['chosen'])}: neither is preferred"
    return made, wrong


def _messages(key: str, value: object) -> tuple[list[dict[str, str]], str]:
    if not isinstance(value, list) or not value:
        return [], f"{key} is {_short(value)}, expected a list of messages, each with a role and a content"
    found = []
    for number, message in enumerate(value):
        where = f"{key}, message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return [], f"{where} is {_short(message)}, expected an object with 'role' and 'content'"
        role, content = message["role"], message["content"]
        if role not in ROLES:
            return [], f"{where}: the role {_short(role)} is unknown; there are {', '.join(ROLES)}"
        if not isinstance(content, str) or not content.strip():
            return [], f"{where} ({role}): its content is {_short(content)}, expected a text that is not empty"
        if role == "assistant" and all(other["role"] != "user" for other in found):
            return [], f"{where}: the assistant answers before a user has spoken"
        found.append({"role": role, "content": content})
    return found, ""


def transcript(parts: dict[str, Any], form: str) -> str:
    """The conversation as a plain text, by which duplicates are found, and tokenizers trained."""
    said: list[str] = []
    for key in PARTS[form]:
        value = parts[key]
        said += [value] if isinstance(value, str) else [f"{m['role']}: {m['content']}" for m in value]
    return "\n".join(said)


def contents(value: str | Sequence[dict[str, str]]) -> list[str]:
    """The texts of a part."""
    return [value] if isinstance(value, str) else [message["content"] for message in value]


def _keys(form: str) -> str:
    return ", ".join(map(repr, PARTS[form]))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
