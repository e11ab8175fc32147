"""Personal data and the placeholders that stand in its place.

Kinds are looked for in this order, each in what the ones before left:

    email        <EMAIL>
    ip           <IP>           IPv6 and IPv4 addresses that are global by `ipaddress`: private, shared, loopback,
                                link-local, multicast, reserved and documentation addresses lead to nobody, and stay;
                                so do four numbers behind "version", "section" or the like
    national_id  <NATIONAL_ID>  US social security numbers (with hyphens, of areas that were given out), Chinese
                                resident ids (ISO 7064 MOD 11-2, with a date), German tax ids (MOD 11,10)
    card         <CARD>         13 to 19 digits, whole or grouped as on cards, with an issuer's prefix and length, Luhn
    phone        <PHONE>        +country code (ITU E.164); US; Chinese mobile; 0 and area code with a separator, as in
                                Germany and China

Rules of form alone, no dictionaries: what is written otherwise is not found ("jane at example dot com"), and one in
ten rows of digits that are grouped and begin like a card's passes for one.

Texts alone are changed (and what reports show of them): ids and other metadata of documents, and records that could
not be read and are listed as skipped, stay as they came.
"""

import datetime
import ipaddress
import re
from collections.abc import Callable

from llm.data.documents import Note

PLACEHOLDERS = {
    "email": "<EMAIL>", "ip": "<IP>", "national_id": "<NATIONAL_ID>", "card": "<CARD>", "phone": "<PHONE>",
}  # fmt: skip


def replace(text: str, kinds: tuple[str, ...], note: Note) -> str:
    """The text with placeholders for personal data of `kinds`; `note` hears how many, never what they were."""
    counts: dict[str, list] = {}
    # A placeholder in place of one datum can uncover another beside it: until nothing changes.
    while True:
        before = text
        for kind in PLACEHOLDERS:
            if kind in kinds and _HINTS[kind].search(text):
                text = _replaced(text, kind, counts)
        if text == before:
            break
    for kind, (count, example) in counts.items():
        note(kind, example, count)
    return text


def _replaced(text: str, kind: str, counts: dict[str, list]) -> str:
    pattern, check, placeholder = _PATTERNS[kind], _CHECKS[kind], PLACEHOLDERS[kind]
    parts, done, at = [], 0, 0
    while match := pattern.search(text, at):
        at = match.start() + 1  # what is none may hold one, behind its first digits ...
        while match and not check(match):
            # ... or before its last: a year behind a card's number.
            match = pattern.match(text, match.start(), match.start() + max(match[0].rfind(" "), 0))
        if match:
            counts.setdefault(kind, [0, f"{masked(match[0])} -> {placeholder}"])[0] += 1
            parts += text[done : match.start()], placeholder
            done = at = match.end()
    return "".join(parts) + text[done:] if parts else text


def masked(text: str) -> str:
    """The shape of a text: letters as x, digits as 0."""
    return "".join("x" if c.isalpha() else "0" if c.isdigit() else c for c in text)


SHOWN = 300  # characters
_DATUM = re.compile(r"[^\s<>]*@[^\s<>]*|[0-9](?:[ ./:()-]{0,2}[0-9]){5,}")


def hidden(text: str) -> str:
    """The beginning of a text for a report: whatever could be personal data, or a cut-off part of it, is masked."""
    return _DATUM.sub(lambda match: masked(match[0]), text[: SHOWN + 100])[:SHOWN]  # with what ends behind the cut


def _digits(text: str) -> str:
    return re.sub("[^0-9]", "", text)


# --- e-mail -----------------------------------------------------------------------------------------------------------

# Latin letters, so that Chinese around an address is not taken for a part of it.
_L = "A-Za-zÀ-ÖØ-öø-ɏ0-9"
_EMAIL = re.compile(
    rf"(?<![{_L}.!#$%&'*+/=?^_`{{|}}~-])[{_L}!#$%&'*+/=?^_`{{|}}~-][{_L}.!#$%&'*+/=?^_`{{|}}~-]{{0,63}}"
    rf"@(?:[{_L}](?:[{_L}-]{{0,61}}[{_L}])?\.){{1,8}}[A-Za-z]{{2,24}}(?![{_L}])"
)

# --- IP ---------------------------------------------------------------------------------------------------------------

_IP = re.compile(
    # Eight groups or fewer with "::", at the end perhaps an IPv4 address.
    r"(?<![A-Za-z0-9:.])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]{0,4})(?![A-Za-z0-9:])"
    r"|(?<![A-Za-z0-9.])[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?!-?[A-Za-z0-9]|\.[0-9])"
)
_NUMBERED = re.compile(
    r"(?:\b(?:version|ver|release|build|revision|firmware|section|sect|sec|chapter|clause|paragraph|article|appendix|"
    r"table|figure|fig)s?[.:]?|[§第版本章节節])\s*\Z",
    re.I,
)


def _is_ip(match: re.Match) -> bool:
    found = match[0]
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_multicast or not address.is_global:
        return False
    if ":" in found:
        # Python's "[::2]" names nobody.
        return len(re.findall("[0-9A-Fa-f]", found)) >= 4 and any(c.isdigit() for c in found)
    return not _NUMBERED.search(match.string, max(0, match.start() - 16), match.start())


# --- national ids -----------------------------------------------------------------------------------------------------

_NATIONAL_ID = re.compile(
    r"(?<![A-Za-z0-9.+-])(?:(?P<us>[0-9]{3}-[0-9]{2}-[0-9]{4})|(?P<cn>[1-9][0-9]{16}[0-9Xx])"
    r"|(?P<de>[1-9][0-9](?P<gap> ?)[0-9]{3}(?P=gap)[0-9]{3}(?P=gap)[0-9]{3}))(?![A-Za-z0-9-]|\.[0-9])"
)


def _is_national_id(match: re.Match) -> bool:
    if match["us"]:
        area, group, serial = match["us"].split("-")
        return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return _is_chinese(match["cn"]) if match["cn"] else _is_german(_digits(match["de"]))


def _is_chinese(number: str) -> bool:
    """Date of birth in places 7 to 14; sum of digits times 2^(17-i) mod 11 gives the last (GB 11643-1999)."""
    try:
        born = datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return 1850 <= born.year < 2100 and "10X98765432"[total % 11] == number[17].upper()


def _is_german(number: str) -> bool:
    """Of the first ten digits just one stands twice or three times; the last by ISO 7064 MOD 11,10."""
    counts = sorted((number[:10].count(digit) for digit in set(number[:10])), reverse=True)
    if counts[0] not in (2, 3) or counts[1] != 1:
        return False
    product = 10
    for digit in number[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(number[10])


# --- cards ------------------------------------------------------------------------------------------------------------

_CARD = re.compile(
    r"(?<![A-Za-z0-9.+-])(?:[0-9]{13,19}"
    r"|[0-9]{4}(?P<gap>[ -])[0-9]{4}(?P=gap)[0-9]{4}(?P=gap)[0-9]{1,4}(?:(?P=gap)[0-9]{1,3})?"
    r"|[0-9]{4}(?P<amex>[ -])[0-9]{6}(?P=amex)[0-9]{4,5})(?![A-Za-z0-9-]|\.[0-9])"
)
# Prefix and lengths: Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay, Maestro.
_ISSUERS = re.compile(
    r"4(?:.{12}|.{15}|.{18})|(?:5[1-5]..|222[1-9]|22[3-9].|2[3-6]..|27[01].|2720).{12}|3[47].{13}"
    r"|(?:6011|64[4-9].|65..).{12,15}|35(?:2[89]|[3-8].).{12,15}|3(?:0[0-5]|09|6.|[89].).{11,16}|62.{14,17}"
    r"|(?:5018|5020|5038|6304|6759|676[1-3]).{9,15}"
)


def _is_card(match: re.Match) -> bool:
    number = _digits(match[0])
    doubled = (int(d) * 2 for d in number[-2::-2])
    total = sum(map(int, number[-1::-2])) + sum(d - 9 if d > 9 else d for d in doubled)
    return total % 10 == 0 and bool(_ISSUERS.fullmatch(number))


# --- phones -----------------------------------------------------------------------------------------------------------

# Country calling codes that were given out, of one to three digits (ITU E.164, list of 2016).
_COUNTRY = (
    r"(?:1|7|2[07]|2[1-689][0-9]|3[0-469]|3[578][0-9]|4[013-9]|42[0-9]|5[1-8]|5[09][0-9]|6[0-6]|6[7-9][0-9]|8[1246]"
    r"|8[0578][0-9]|9[0-58]|9[67][0-9]|99[2-68])"
)
_PHONE = re.compile(
    rf"(?<![A-Za-z0-9+./-])(?:(?P<world>(?:\+|00(?={_COUNTRY}[ ./(-])){_COUNTRY}"
    r"(?:[ ./-]?\([0-9]{1,5}\))?(?:[ ./-]{0,2}[0-9]){5,13})"
    r"|(?P<us>(?:1[-. ])?(?:\([2-9][0-9]{2}\) ?-?|[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-. ][0-9]{4})"
    r"|(?P<mobile>1[3-9][0-9](?P<gap>[ -]?)[0-9]{4}(?P=gap)[0-9]{4})"
    r"|(?P<trunk>(?:\(0[1-9][0-9]{1,4}\) ?|0[1-9][0-9]{1,4}(?: ?[/-] ?| ))[1-9][0-9]{1,8}(?:[ -]?[0-9]{1,5}){0,3}))"
    r"(?![A-Za-z0-9]|[./:-][0-9])"
)


def _is_phone(match: re.Match) -> bool:
    found, count = match[0], len(_digits(match[0]))
    if match["world"]:
        digits = _digits(found).removeprefix("00")
        return len(digits) == 11 if digits[0] == "1" else 8 <= len(digits) <= 15
    if match["trunk"]:
        # Nine digits grouped 3-2-4 are a social security number.
        return 9 <= count <= 12 and not re.fullmatch("[0-9]{3}-[0-9]{2}-[0-9]{4}", found)
    return True


_PATTERNS = {"email": _EMAIL, "ip": _IP, "national_id": _NATIONAL_ID, "card": _CARD, "phone": _PHONE}
_CHECKS: dict[str, Callable[[re.Match], bool]] = {
    "email": lambda match: True, "ip": _is_ip, "national_id": _is_national_id, "card": _is_card, "phone": _is_phone,
}  # fmt: skip
# What a text must have for a look at all: cheap to search for.
_LONG = re.compile(r"[0-9](?:[ ./()-]{0,3}[0-9]){6}")
_HINTS = {
    "email": re.compile("@"),
    "ip": re.compile(r":[0-9A-Fa-f]{0,4}:|\.[0-9]{1,3}\.[0-9]"),
    "national_id": _LONG, "card": _LONG, "phone": _LONG,
}  # fmt: skip
