"""HTML reduced to its main text."""

import dataclasses
import html.parser
import re

from llm.data.word_units import UNITS_PER_WORD, script, words

_HTML_START = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)
_CLOSING_TAG = re.compile(r"</(?:p|div|td|tr|li|ul|ol|table|span|a|b|i|font|center|h[1-6])\s*>", re.I)

# Elements whose text is never read, and those that hold navigation and the like, not what the page is about.
_UNREAD = frozenset(
    "script style noscript template svg math iframe object canvas head title button select option textarea".split()
)
_AROUND = frozenset("nav footer aside form menu dialog".split())
_AROUND_ROLES = frozenset("navigation banner contentinfo complementary search dialog alertdialog menu".split())
_AROUND_NAMES = re.compile(
    r"(?:^|[\s_-])(?:cookies?|consent|gdpr|breadcrumbs?|nav(?:bar|igation)?|menu|sidebar|footer|share|sharing|social|"
    r"newsletter|subscribe|advert(?:isement)?s?|promo|popup|related)(?:$|[\s_-])",
    re.I,
)
_BLOCKS = frozenset(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure footer "
    "form h1 h2 h3 h4 h5 h6 header hr html legend li main menu nav ol p pre section summary table tbody td tfoot th "
    "thead tr ul".split()
)
_HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())
_CLOSE_TOGETHER = frozenset("li tr dt dd td th br".split())
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_COOKIE_LINE = re.compile(r"\b(?:cookies?|privacy policy|terms of (?:use|service))\b|隐私政策|使用条款|Datenschutz", re.I)
COOKIE_LINE_WORDS = 40


def looks_like_html(text: str) -> bool:
    """Whether a text is a page of HTML: it opens as one, or opens with a tag and has three closing tags of HTML."""
    if _HTML_START.match(text[:4096]):
        return True
    return text[:256].lstrip().startswith("<") and len(_CLOSING_TAG.findall(text[:65536])) >= 3


def main_text(page: str) -> str:
    """The main text of an HTML page, a block a paragraph, entities decoded.

    Scripts, styles, navigation, forms, cookie notices go. When the page marks its content (`main`, `article`), that
    is taken; otherwise blocks are judged by number of words and density of links in themselves and their neighbours:
    algorithm 2 of Kohlschuetter et al., Boilerplate Detection using Shallow Text Features, WSDM 2010. A heading stays
    when the block after it does. Where that leaves nothing, as on a page of a few lines, what is not links stays.
    """
    parser = _Blocks()
    parser.feed(page)
    parser.close()
    parser.end_block()
    blocks = [b for b in parser.blocks if not (_COOKIE_LINE.search(b.text) and b.words < COOKIE_LINE_WORDS)]
    marked = [b for b in blocks if b.marked]
    if sum(b.words for b in marked) > 0.25 * sum(b.words for b in blocks):
        kept = [b for b in marked if b.link_density <= 0.5]
    else:
        content = _content(blocks)
        kept = [b for b, good in zip(blocks, content) if good] or [b for b in blocks if b.link_density <= 0.5]
    return "".join(("\n" if b.close else "\n\n") + b.text for b in kept).strip()


@dataclasses.dataclass
class _Block:
    text: str
    words: float
    link_density: float
    heading: bool
    marked: bool
    close: bool


def _content(blocks: list[_Block]) -> list[bool]:
    """Which blocks are content."""
    nothing = _Block("", 0, 0, False, False, False)
    kept = []
    for before, block, after in zip([nothing, *blocks], blocks, [*blocks[1:], nothing]):
        if block.link_density > 1 / 3:
            kept.append(False)
        elif before.link_density <= 5 / 9:
            kept.append(block.words > 16 or after.words > 15 or before.words > 4)
        else:
            kept.append(block.words > 40 or after.words > 17)
    for i in reversed(range(len(blocks) - 1)):
        if blocks[i].heading and blocks[i].link_density <= 1 / 3:
            kept[i] = kept[i + 1]
    return kept


class _Blocks(html.parser.HTMLParser):
    """Splits a page into blocks of text. Tags that are never closed, or closed twice, do no harm."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks: list[_Block] = []
        self._open: list[tuple[str, bool]] = []  # (tag, its text goes unread)
        self._unread = self._links = self._pre = self._marked = 0
        self._heading = self._close = False
        self._text: list[str] = []
        self._linked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.end_block()
            self._heading, self._close = tag in _HEADINGS, tag in _CLOSE_TOGETHER
        if tag == "br":
            self._text.append("\n")
        if tag in _VOID:
            return
        if tag in ("p", "li", "td", "th", "tr", "dt", "dd", "option"):  # their closing tags may be left out
            self._close_unclosed(tag)
        unread = tag in _UNREAD or self._around(tag, dict(attrs))
        self._open.append((tag, unread))
        self._unread += unread
        self._links += tag == "a"
        self._pre += tag == "pre"
        self._marked += tag in ("main", "article")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.end_block()
        if any(name == tag for name, _ in self._open[-64:]):
            while self._open:
                name = self._pop()
                if name == tag:
                    return

    def handle_data(self, data: str) -> None:
        if self._unread:
            return
        if not self._pre:
            data = re.sub(r"\s+", " ", data)
        self._text.append(data)
        if self._links:
            self._linked.append(data)

    def end_block(self) -> None:
        """Ends the block at hand; the text that follows belongs to another."""
        text, linked = "".join(self._text), "".join(self._linked)
        self._text, self._linked = [], []
        if not self._pre:
            text = re.sub(r"[ \t]*\n[ \t]*", "\n", re.sub(r"[ \t]+", " ", text))
        text = text.strip("\n") if self._pre else text.strip()
        if text.strip():
            count = len(words(text)) / UNITS_PER_WORD[script(text)]
            density = len(linked.strip()) / len(text)
            self.blocks.append(_Block(text, count, density, self._heading, self._marked > 0, self._close))
        self._heading = False

    def _pop(self) -> str:
        name, unread = self._open.pop()
        self._unread -= unread
        self._links -= name == "a"
        self._pre -= name == "pre"
        self._marked -= name in ("main", "article")
        return name

    def _close_unclosed(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._pop()

    @staticmethod
    def _around(tag: str, attributes: dict[str, str | None]) -> bool:
        if tag in ("html", "body", "main", "article"):
            return False
        if tag in _AROUND or (attributes.get("role") or "").lower() in _AROUND_ROLES or "hidden" in attributes:
            return True
        if tag not in ("div", "section", "ul", "ol", "header", "p", "span", "table"):
            return False
        return bool(_AROUND_NAMES.search(f"{attributes.get('class') or ''} {attributes.get('id') or ''}"))
