"""Cleaning: the same text in one form of Unicode, line ends and blank space."""

import dataclasses
import re
import unicodedata

from llm.data.sources import Document

# C0 and C1 controls but tab and line feed.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(document: Document) -> Document:
    """NFC, line feeds as line ends, no control characters, no blank space at line ends, at most one blank line."""
    text = document.text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    text = unicodedata.normalize("NFC", text)
    text = _CONTROLS.sub("", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return dataclasses.replace(document, text=text + "\n" if text else "")
