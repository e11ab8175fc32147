"""Translated messages of programs (gettext's .mo files) as pairs of sentences."""

import re
import struct
from collections.abc import Iterator

# One mark before a letter: an accelerator of GTK (_) or of LibreOffice (~). Capitals on both sides are an identifier.
_ACCELERATOR = re.compile(r"(?<![A-Z0-9_~])[_~](?=[^\W_])|(?<=[A-Z0-9])[_~](?=[^\W_A-Z0-9])")
# Languages without Latin letters have it in brackets behind the text: "添加(_A)".
_BRACKETED = re.compile(r"\s?[(（][_~][^\W_][)）]")


def messages(data: bytes) -> Iterator[tuple[str, str]]:
    """Originals and translations of a .mo file, each form of a plural by itself, without the header and contexts.

    The format: magic number, version, count, offsets of two tables of (length, offset), all uint32 in one byte order.

    Raises:
        ValueError: it is no .mo file.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise ValueError("it does not begin like a .mo file")
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    for n in range(count):
        original, translation = (
            data[offset : offset + length].decode("utf-8")
            for length, offset in (struct.unpack_from(f"{order}2I", data, t + 8 * n) for t in (originals, translations))
        )
        forms = translation.split("\0")
        for form, text in enumerate(original.rpartition("\x04")[2].split("\0")):
            # The first is the singular, the last the plural; a language may have one form for both.
            yield text, forms[0] if form == 0 else forms[-1]


def pairs(data: bytes) -> Iterator[tuple[str, str]]:
    """The messages of a .mo file without accelerators; none without text on both sides.

    A mark is an accelerator where the original has exactly one of its kind, before a letter. It is then taken out of
    the translation too, be it before a letter or in brackets of its own.
    """
    for text, target in messages(data):
        found = _ACCELERATOR.findall(text)
        if len(found) == 1 and text.count(found[0]) == 1:
            text = text.replace(found[0], "")
            target = _BRACKETED.sub("", target)
            if target.count(found[0]) == 1:
                target = _ACCELERATOR.sub("", target)
        text, target = text.strip(), target.strip()
        if text and target:
            yield text, target
