"""HTML to its main text: what a reader came for, without scripts, navigation and lists of links."""

import collections
import dataclasses
import html
import re

_HTML = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?><!--.{0,2000}?-->\s*)*+<(?:!doctype\s+html|html|head|body)\b", re.I | re.S
)
_FRAGMENT = re.compile(r"</(?:p|div|table|ul|ol|article|section|main|span|h[1-6])\s*>", re.I)

_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
# What is never text that is read.
_SKIPPED = frozenset(
    "head script style noscript template svg math nav aside form button select iframe object canvas audio video".split()
)
_SKIPPED_ROLES = frozenset(("navigation", "banner", "contentinfo", "search", "menu", "menubar"))
# Elements that begin and end a paragraph, and those that begin and end a line.
_PARAGRAPHS = frozenset(
    "address article blockquote body center dd div dl dt fieldset figcaption figure footer h1 h2 h3 h4 h5 h6 header "
    "html main ol p pre section table ul".split()
)
_LINES = frozenset(("li", "tr", "caption"))
_AROUND = frozenset(("header", "footer"))

# Blocks with more of their characters in links are lists of links (Kohlschuetter et al. 2010, who measured words).
LINK_DENSITY = 1 / 3

# What begins like a notice of cookies, and speaks of what such notices speak of, lest a recipe be one.
NOTICE = 400  # characters at most
_NOTICE = re.compile(
    r"(?=.*(?:privacy|polic|consent|accept|agree|experience|visit|browser|traffic|analy[sz]|settings|preferences))"
    r"(?:(?:we|(?:this|our) (?:web ?)?site)(?: and our partners)? (?:uses?|stores?|sets?) (?:\w+ ){0,2}"
    r"|by (?:continuing|using|clicking|browsing)\b[^.]*\b)cookies\b|(?:accept|reject|manage) (?:all )?cookies\Z",
    re.I | re.S,
)


def is_html(text: str) -> bool:
    """Whether a text is a page of HTML, or begins with a tag and has elements that structure a page."""
    return bool(_HTML.match(text)) or (text.lstrip()[:1] == "<" and bool(_FRAGMENT.search(text)))


def main_text(page: str) -> str:
    """The text of a page, entities decoded, a line feed between lines and an empty line between paragraphs.

    The text is that of <main> where there is one, else that of <article>, else all but <header> and <footer>; without
    what is never text (scripts, navigation, forms, hidden elements), blocks that are mostly links, and short ones that
    begin like an English notice of cookies; notices in other words stay.
    """
    parser = _Parser()
    parser.feed(page)
    for place in ("main", "article", ""):
        blocks = [b for b in parser.blocks if b.place == place] if place else parser.blocks
        kept = [b for b in blocks if (place or b.place != "around") and not _boilerplate(b)]
        if kept:
            return "".join(b.text + b.separator for b in kept).strip()
    return ""


@dataclasses.dataclass
class _Block:
    text: str
    linked: int  # characters of it that are in links
    place: str  # "main", "article", "around" (header or footer outside of both), ""
    separator: str = "\n"


def _boilerplate(block: _Block) -> bool:
    notice = len(block.text) <= NOTICE and bool(_NOTICE.match(block.text))
    return notice or block.linked > LINK_DENSITY * len(block.text)


# What a "<" opens. Possessive, and with no "<" outside of quotes, so that no page takes more than linear time (the
# standard library's parser is quadratic where tags have no end). Where quotes do not pair up, they do not count.
_MARK = re.compile(
    r"""<(?:(?P<comment>!--)|[!?][^<>]*+(?:>|\Z)|"""
    r"""(?P<close>/?)(?P<tag>[A-Za-z][^\s/<>]*+)(?P<attributes>(?:[^<>"']++|"[^"]*+"|'[^']*+')*+|[^<>]*+)(?:>|\Z))"""
)
_ATTRIBUTE = re.compile(r"""([^\s=/"'<>]++)(?:\s*+=\s*+(?:"([^"]*+)"|'([^']*+)'|([^\s"'<>]++)))?""")
# Elements whose text has no tags in it; none of it is read.
_RAW = {tag: re.compile(rf"</{tag}\b[^<>]*+>", re.I) for tag in ("script", "style", "textarea", "title")}
_LONG_REFERENCE = re.compile("&#[0-9]{9,}+;?")  # beyond Unicode, and at some length beyond what `int` takes


class _Parser:
    def __init__(self):
        self.blocks: list[_Block] = []
        self._open: list[tuple[str, bool]] = []  # tag, whether it is skipped
        self._count: collections.Counter[str] = collections.Counter()
        self._skipped = 0
        self._parts: list[str] = []
        self._linked = 0

    def feed(self, page: str) -> None:
        """Takes in a page: its tags and texts in order, without comments, declarations and raw elements."""
        done = at = 0
        while (at := page.find("<", at)) >= 0:
            mark = _MARK.match(page, at)
            if mark is None:  # a "<" of the text
                at += 1
                continue
            self._data(page[done:at])
            at = mark.end()
            tag = (mark["tag"] or "").lower()
            if mark["comment"]:
                end = page.find("-->", at - 2)  # "<!-->" is a comment, too
                at = end + 3 if end >= 0 else len(page)
            elif mark["close"]:
                self._end(tag)
            elif tag in _RAW and not mark["attributes"].endswith("/"):
                found = _RAW[tag].search(page, at)
                at = found.end() if found else len(page)
            elif tag:
                self._start(tag, mark["attributes"])
            done = at
        self._data(page[done:])
        self._end_block("\n\n")

    def _start(self, tag: str, attributes: str) -> None:
        if tag == "br":
            self._parts.append("\n")
        self._boundary(tag)
        # In HTML the slash of <div/> means nothing; in XHTML the element is empty, and so it mostly is in either.
        if tag in _VOID or attributes.endswith("/"):
            return
        found = {a[1].lower(): a[2] or a[3] or a[4] for a in _ATTRIBUTE.finditer(attributes)}
        hidden = "hidden" in found or found.get("aria-hidden") == "true" or found.get("role") in _SKIPPED_ROLES
        skip = hidden or tag in _SKIPPED
        self._open.append((tag, skip))
        self._count[tag] += 1
        self._skipped += skip

    def _end(self, tag: str) -> None:
        self._boundary(tag)
        if not self._count[tag]:
            return
        # Elements whose end was left out end with the one around them.
        while self._open:
            closed, skip = self._open.pop()
            self._count[closed] -= 1
            self._skipped -= skip
            if closed == tag:
                return

    def _data(self, data: str) -> None:
        if self._skipped or not data:
            return
        data = html.unescape(_LONG_REFERENCE.sub("\ufffd", data))
        if not self._count["pre"]:
            data = re.sub(r"[ \t\n\r\f]+", " ", data)
        self._parts.append(data)
        if self._count["a"]:
            self._linked += len(data.strip())

    def _boundary(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._end_block("\n\n")
        elif tag in _LINES:
            self._end_block("\n")
        elif tag in ("td", "th"):
            self._parts.append(" ")

    def _end_block(self, separator: str) -> None:
        """Ends the block at hand; a paragraph's end after a line's end makes it a paragraph's."""
        text = "".join(self._parts)
        self._parts.clear()
        linked, self._linked = self._linked, 0
        if not self._count["pre"]:
            text = "\n".join(line.strip() for line in re.sub(" +", " ", text).split("\n"))
        text = text.strip("\n")
        if text.strip():
            self.blocks.append(_Block(text, linked, self._place(), separator))
        elif self.blocks and separator == "\n\n":
            self.blocks[-1].separator = separator

    def _place(self) -> str:
        for place in ("main", "article"):
            if self._count[place]:
                return place
        return "around" if any(self._count[tag] for tag in _AROUND) else ""
