"""Text that matches a regular expression or a JSON schema: which tokens may come next.

llguidance follows the bytes of a text through a grammar; a token is allowed where the text with it can still become a
match, byte for byte, however the vocabulary cuts it.
"""

import copy
import json
import re
from collections.abc import Sequence

import numpy as np

from llm.errors import InputError

# Every token that fits is allowed, not only the one by which the library would cut what is the only way on: a model
# draws from its own distribution over the matching texts' tokens.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# No newline and no run of spaces, in which a weak model could stay until its last token.
_JSON_OPTIONS = {"x-guidance": {"whitespace_flexible": True, "whitespace_pattern": " ?"}}
_TOO_COMPLEX = ("ParserTooComplex", "LexerTooComplex")


def regex_grammar(pattern: str) -> str:
    """The grammar of the texts that a regular expression matches from their first to their last character.

    The syntax is that of Rust's `regex`, close to Python's: there is no looking around, no word boundary and no
    reference to a group, and anchors may stand at the ends alone.

    Raises:
        InputError: it is no such expression.
    """
    from llguidance import regex_to_lark

    try:
        pattern.encode()
    except UnicodeEncodeError:
        raise InputError("it is not valid Unicode") from None
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # it would escape the slash that ends it in the grammar
        raise InputError("it ends in a backslash that escapes nothing")
    return _checked(f"{_OPTIONS}start: /{regex_to_lark(pattern, '')}/")


def json_schema_grammar(schema: str) -> str:
    """The grammar of the JSON texts on one line that are valid by a schema, with at most a space between their parts.

    Args:
        schema: JSON. Members come in the order of its properties.

    Raises:
        InputError: it is no schema, asks for what no text can be, or uses a keyword that cannot be followed, such as
            "not".
    """
    try:
        document = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if isinstance(document, dict):
        document |= _JSON_OPTIONS
    return _checked(f"{_OPTIONS}start: %json {json.dumps(document)}")


def _checked(grammar: str) -> str:
    from llguidance import LLMatcher

    message = LLMatcher.validate_grammar(grammar)
    if message:
        # The library puts the reason before the place in a grammar that the user has not seen.
        reason = re.search(r"^error: (.*)", message, re.MULTILINE) or re.search(
            r"^.*(?:schema|in regex\)): (.*)", message
        )
        raise InputError(reason[1] if reason else message.splitlines()[0])
    return grammar


class Vocabulary:
    """What a tokenizer's ids write, laid out for matching: 0.3 s for 100,000 ids, once for all constraints.

    Args:
        first: the bytes that each id writes at the start of a text; None or nothing for those that are no text.
        later: the same after other ids.
        ends: ids that end a text, and are none.
    """

    def __init__(self, first: Sequence[bytes | None], later: Sequence[bytes | None], ends: Sequence[int] = ()):
        from llguidance import LLTokenizer, TokenizerWrapper

        self.size, self.ends_E, closing = len(later), np.array(sorted(set(ends)), int), set(ends)
        # An id that writes something else at the start stands twice. The byte 0xFF, which no text holds, would mark a
        # special token.
        table = [
            b"" if i in closing or (data or b"").startswith(b"\xff") else data or b"" for i, data in enumerate(later)
        ]
        self.at_start_V = np.arange(self.size)
        for i, data in enumerate(first):
            if data != later[i] and i not in closing:
                self.at_start_V[i] = len(table)
                table.append(data or b"")
        self.later = later
        self.table = LLTokenizer(TokenizerWrapper(_Table([*table, b"\xff<end>"])), slices=[])


class _Table:
    """What the library asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes]):
        self.tokens, self.eos_token_id, self.special_token_ids = tokens, len(tokens) - 1, [len(tokens) - 1]

    def __call__(self, text: bytes | str) -> list[int]:
        # Only a grammar that forces tokens would have a text cut.
        return []


class Constraint:
    """A grammar over a vocabulary: `begin` gives each row its own matcher.

    Args:
        vocabulary: of the tokenizer.
        grammar: of `regex_grammar` or `json_schema_grammar`.

    Raises:
        InputError: no token can begin a match, or the grammar is too large.
    """

    def __init__(self, vocabulary: Vocabulary, grammar: str):
        from llguidance import LLMatcher

        self._vocabulary, self._matcher = vocabulary, LLMatcher(vocabulary.table, grammar, log_level=0)
        self.begin()

    @property
    def size(self) -> int:
        """Ids of the vocabulary."""
        return self._vocabulary.size

    def begin(self) -> "Matcher":
        """A matcher of a text that has not begun."""
        return Matcher(self._vocabulary, self._matcher.deep_copy())


class Matcher:
    """How far the text of one row has matched.

    Attributes:
        allowed_V: the ids that may come next, bool (vocabulary,); those that end a text exactly where it is complete.
        complete: whether the text so far matches.
        finished: whether it matches and nothing can be added.
    """

    def __init__(self, vocabulary: Vocabulary, matcher):
        self._vocabulary, self._matcher, self._tokens = vocabulary, matcher, []
        self._look()

    def advance(self, token: int) -> None:
        """Takes an allowed id that ends no text.

        Raises:
            InputError: what was begun cannot be completed, since the vocabulary lacks the tokens, or the grammar
                became too large.
        """
        place = token if self._tokens else int(self._vocabulary.at_start_V[token])
        if not self.allowed_V[token] or not self._matcher.consume_token(place):
            raise ValueError(f"the token {token} is not allowed here")
        self._tokens.append(token)
        self._look()

    def allows(self, token: int) -> bool:
        """Whether a token may come next that ends no text."""
        return bool(self.allowed_V[token]) and token not in self._vocabulary.ends_E

    def after(self, token: int) -> "Matcher":
        """A matcher of the text with one more token, as `advance` takes it; this one stays where it is."""
        other = copy.copy(self)
        other._matcher, other._tokens = self._matcher.deep_copy(), [*self._tokens]
        other.advance(token)
        return other

    def _look(self) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little").astype(bool)
        vocabulary = self._vocabulary
        allowed_V = allowed_V[: vocabulary.size] if self._tokens else allowed_V[vocabulary.at_start_V]
        failed, going_on = self._matcher.is_error(), bool(allowed_V.any())
        self.complete: bool = not failed and self._matcher.is_accepting()
        if failed and self._matcher.stop_reason() in _TOO_COMPLEX:
            raise InputError("the regular expression or schema is too large to follow: make it simpler")
        if failed or not (going_on or self.complete):
            text = b"".join(vocabulary.later[i] or b"" for i in self._tokens).decode("utf-8", errors="replace")
            raise InputError(
                f"no token of the vocabulary can {'go on with ' + repr(text) if text else 'begin a match'}"
            )
        self.finished: bool = self.complete and not going_on
        self.allowed_V = allowed_V.copy()
        self.allowed_V[vocabulary.ends_E] = self.complete
