"""Credentials and personal data in texts, found and masked.

Numbers must pass their checksum or numbering plan (`python-stdnum`, `phonenumbers`), so that order
numbers, versions and dates are left alone, as are placeholders of manuals (example.com, sk-xxxx).
Not found are names, postal addresses, credentials without a known form (`password: ...`), and
national phone numbers outside China and North America.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qwen3ft.logs import MASK, find_secrets, mask_secrets
from qwen3ft.text.plain import without_steering


class Finding(NamedTuple):
    """A kind of credential or personal data at `text[start:end]`."""

    kind: str
    start: int
    end: int


# A text without candidates costs two searches. Python passes quickly over what cannot begin a
# match, if a pattern begins with a character: so all patterns here do, and look back from there at
# what must not stand before. Those below begin with one that is rare in prose.
_HAS_KEY_MARK = re.compile(
    r"@"  # addresses, passwords in URLs
    r"|_(?<=[a-z]_)[A-Za-z0-9]{12}"  # hf_, ghp_, sk_live_ ...
    r"|-(?:[A-Za-z0-9_-]{10}|----BEGIN)"  # sk-, glpat-, xoxb-, private keys
    r"|A(?:KIA|SIA|KID|Iza)[A-Za-z0-9]|LTAI[A-Za-z0-9]|J(?<=eyJ)[A-Za-z0-9]"
)
_HAS_NUMBER = re.compile(r"[0-9][0-9 ().-]{8}")
_WIDE_TRIGGERS = ("０", "１", "＠")  # every phone or identity number has one of these digits
_FULL_WIDTH = str.maketrans("０１２３４５６７８９＠－＋　（）", "0123456789@-+ ()")

_PLACEHOLDER_KEY = re.compile(r"example|xxxx|your|123456|abcdef|\.\.\.|0000", re.IGNORECASE)
_PLACEHOLDER_PASSWORD = re.compile(
    r"(?:my|your)?_?(?:pass(?:word|wd|phrase)?|pwd|pw|secret|token|key|changeme|x+|\*+|\.+)\Z"
    r"|.*[<>{}$\[\]()*]",
    re.IGNORECASE,
)
_IBAN = re.compile(
    r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
)
_CARD = re.compile(
    r"[0-9][0-9](?<![A-Za-z0-9.-]..)[0-9]{2}"
    r"(?:[0-9]{9,15}|([ -])[0-9]{4}(?:\1[0-9]{4}){2}(?:\1[0-9]{3})?"
    r"|(?<=3...)([ -])[0-9]{6}\2[0-9]{5})(?![A-Za-z0-9-]|\.[0-9])"
)
# Length and leading digits of the networks; every tenth number has a valid checksum.
_NETWORK = re.compile(
    r"4(?:.{12}|.{15}|.{18})|(?:5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720|35[2-8]|6011|64[4-9]|65)"
    r".*(?<=^.{16})|3[47].{13}|3(?:0[0-5]|[68]).*(?<=^.{14})|62.{14,17}"
)
_RESIDENT_ID = re.compile(
    r"[1-8][0-9]{5}(?:18|19|20)[0-9]{9}[0-9Xx](?<![A-Za-z0-9].{18})(?![A-Za-z0-9])"
)
# 31 provinces and regions, Taiwan, Hong Kong and Macao (GB/T 2260)
_PROVINCE = re.compile("[1-3][1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]")
_SSN = re.compile(r"[0-9][0-9]{2}-[0-9]{2}-[0-9]{4}(?<![A-Za-z0-9-].{11})(?![A-Za-z0-9-])")
# Behind two digits, which fewer places begin with than with one.
_NONE_BEFORE = "(?<![A-Za-z0-9.+-]..)"
_MOBILE = r"[0-9](?:[0-9]{8}| [0-9]{4} [0-9]{4}|-[0-9]{4}-[0-9]{4})"  # behind 13 to 19
_LANDLINE = r"[0-9]{1,2}(?:\) ?|[ -])[0-9]{7,8}"  # behind 0 and a digit
_CHINESE_PHONE = re.compile(
    rf"(?:1[3-9]{_NONE_BEFORE}{_MOBILE}|0[0-9]{_NONE_BEFORE}{_LANDLINE}"
    rf"|\(0{_NONE_BEFORE}[0-9]{_LANDLINE}"
    rf"|86{_NONE_BEFORE}[ -]?(?:1[3-9]{_MOBILE}|\(?0[0-9]{_LANDLINE})"
    rf"|\+8{_NONE_BEFORE}6[ -]?(?:1[3-9]{_MOBILE}|\(?0[0-9]{_LANDLINE}))"
    r"(?![A-Za-z0-9]|\.[0-9]|-[0-9]{6})"
)
_AMERICAN_PHONE = re.compile(
    r"[(2-9][0-9][0-9](?<![A-Za-z0-9.+-]...)"
    r"(?:(?<=\([2-9].)[0-9]\) ?[0-9]{3}-|(?<=[2-9]..)([.-])[0-9]{3}\1)[0-9]{4}"
    r"(?![A-Za-z0-9-]|\.[0-9])"
)
_INTERNATIONAL_PHONE = re.compile(
    r"\+(?<![A-Za-z0-9+].)[1-9](?:[ ().-]{0,2}[0-9]){7,14}(?![A-Za-z0-9])"
)
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@"
    r"(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
# Names reserved by RFC 2606, placeholders of manuals, and file names such as icon@2x.png.
_NO_DOMAIN = re.compile(
    r"(?:.*\.)?example(?:\.[a-z]+)?\Z|.*\.(?:test|invalid|localhost|local)\Z"
    r"|(?:my|your)?-?(?:domain|company|email|mail|server|host)\.(?:com|org|net|cn)\Z|x+\.com\Z"
    r"|.*\.(?:png|jpe?g|gif|svg|webp|js|ts|py|css|json|tgz|zip|whl|md)\Z",
    re.IGNORECASE,
)
_NO_USER = re.compile(r"your|xxx|(?:foo|bar|user(?:name)?|name|someone)\Z", re.IGNORECASE)
_OTHER_NUMBER = re.compile(
    r"(?:单号|订单|编号|流水号?|序列号|条形?码|货号|型号|版本|批号|order|invoice|isbn|ean|upc|sku"
    r"|serial|tracking|ticket|parcel|part|batch|version|id)"
    r"(?:\W{0,3}(?:号码?|no|nr|number|code|id|is|was|是|为))*\W{0,3}\Z",
    re.IGNORECASE,
)
_WORDS_BEFORE = 32

_MOST_LOOKED_UP = 1_000
"""Candidates of one text and pattern that are looked up in the numbering plan, at some 50 us each.
All further ones count as phone numbers: rather too many than a row that takes a minute."""


def scan(text: str) -> tuple[Finding, ...]:
    """Return all findings in order; none overlap.

    Kinds: api_key, private_key, password_url, iban, card_number (payment cards), id_number (Chinese
    resident identity, US social security), phone, email.
    """
    is_wide = not text.isascii() and any(mark in text for mark in _WIDE_TRIGGERS)
    has_candidates = _HAS_NUMBER.search(text) or _HAS_KEY_MARK.search(text) or "earer " in text
    if not is_wide and not has_candidates:
        return ()
    if is_wide:
        text = text.translate(_FULL_WIDTH)  # one character for one: indices stay the same
    found: list[Finding] = []
    taken = bytearray(len(text))  # to compare each finding with all others would take too long
    for finding in _candidates(text):
        if taken.find(1, finding.start, finding.end) < 0:
            taken[finding.start : finding.end] = b"\1" * (finding.end - finding.start)
            found.append(finding)
    return tuple(sorted(found, key=lambda finding: finding.start))


def mask(text: str) -> str:
    """Return `text` with all findings, and whatever the logs would mask, replaced by ***."""
    parts, end = [], 0
    for finding in scan(text):
        parts += [text[end : finding.start], MASK]
        end = finding.end
    return mask_secrets("".join(parts) + text[end:])


def mask_keys(text: str) -> str:
    """Return `text` with credentials alone replaced by ***; what only looks like one stays."""
    parts, end = [], 0
    for finding in scan(text):
        if finding.kind in _SECRET_CHECKS:
            parts += [text[end : finding.start], MASK]
            end = finding.end
    return "".join(parts) + text[end:]


def _candidates(text: str) -> Iterator[Finding]:
    """Yield findings by kind, the most reliable kinds first."""
    if "earer " in text or _HAS_KEY_MARK.search(text):
        for kind, match in find_secrets(text):
            if _SECRET_CHECKS[kind](match):
                yield Finding(kind, *match.span())
    for match in _IBAN.finditer(text):
        length = _iban_length(match.group())
        if length:
            yield Finding("iban", match.start(), match.start() + length)
    for kind, mark, pattern, check in _OTHER_CHECKS:
        for number, match in enumerate(pattern.finditer(text) if mark in text else ()):
            if (kind == "phone" and number >= _MOST_LOOKED_UP) or check(match):
                yield Finding(kind, *match.span())


def _is_key(match: re.Match[str]) -> bool:
    """Return whether a key looks random, not written by hand."""
    key = match.group()
    has_digit = any(character.isdigit() for character in key)
    if match.string.endswith("earer ", 0, match.start()) and not has_digit:
        return False
    is_mixed = "-" not in key and key.upper() != key != key.lower()
    is_random = has_digit or is_mixed or key.isupper()
    return is_random and len(set(key)) >= 10 and not _PLACEHOLDER_KEY.search(key)


def _is_private_key(match: re.Match[str]) -> bool:
    body = match.group().split("-----")[2]
    return len(re.findall("[A-Za-z0-9+/=]", body)) >= 40


def _is_password(match: re.Match[str]) -> bool:
    return _PLACEHOLDER_PASSWORD.match(match.group().partition(":")[2]) is None


def _iban_length(candidate: str) -> int:
    """Return the length of the IBAN that `candidate` starts with, 0 if none."""
    from stdnum import iban

    # Words in capitals may follow it.
    while len(candidate) >= 15:
        if iban.is_valid(candidate):
            return len(candidate)
        candidate = candidate.rpartition(" ")[0]
    return 0


def _is_card(match: re.Match[str]) -> bool:
    from stdnum import luhn

    digits = re.sub("[ -]", "", match.group())
    return (
        _NETWORK.fullmatch(digits) is not None
        and len(set(digits)) > 2
        and luhn.is_valid(digits)
        and not _is_labelled_otherwise(match)
    )


def _is_resident_id(match: re.Match[str]) -> bool:
    from stdnum.cn import ric
    from stdnum.exceptions import ValidationError

    number = match.group().upper()
    if not _PROVINCE.match(number):
        return False
    try:
        ric.get_birth_date(number)
    except ValidationError:
        return False
    # Not `ric.is_valid`, which refuses people older than the county they are registered in.
    return bool(ric.calc_check_digit(number) == number[-1])


def _is_ssn(match: re.Match[str]) -> bool:
    from stdnum.us import ssn

    # stdnum knows the numbers that were printed in adverts, but not the example of every manual.
    return match.group() != "123-45-6789" and bool(ssn.is_valid(match.group()))


def _is_phone(match: re.Match[str], region: str | None) -> bool:
    import phonenumbers

    digits = re.sub(r"\D", "", match.group())
    if digits.endswith("00000") or _is_labelled_otherwise(match):
        return False
    try:
        number = phonenumbers.parse(match.group(), region)
    except phonenumbers.NumberParseException:
        return False
    return phonenumbers.is_valid_number(number)


def _is_labelled_otherwise(match: re.Match[str]) -> bool:
    """Return whether the words before a number say that it is of another kind."""
    start = match.start()
    return _OTHER_NUMBER.search(match.string[max(0, start - _WORDS_BEFORE) : start]) is not None


def _is_email(match: re.Match[str]) -> bool:
    user, _, domain = match.group().partition("@")
    is_remote = user == "git" and match.string[match.end() : match.end() + 1] == ":"
    return not (is_remote or _NO_USER.match(user) or _NO_DOMAIN.match(domain))


Check = Callable[[re.Match[str]], bool]

_SECRET_CHECKS: dict[str, Check] = {
    "api_key": _is_key,
    "private_key": _is_private_key,
    "password_url": _is_password,
}
# The mark is part of every match.
_OTHER_CHECKS: tuple[tuple[str, str, re.Pattern[str], Check], ...] = (
    ("id_number", "", _RESIDENT_ID, _is_resident_id),
    ("card_number", "", _CARD, _is_card),
    ("id_number", "-", _SSN, _is_ssn),
    ("phone", "+", _INTERNATIONAL_PHONE, lambda match: _is_phone(match, None)),
    ("phone", "", _CHINESE_PHONE, lambda match: _is_phone(match, "CN")),
    ("phone", "", _AMERICAN_PHONE, lambda match: _is_phone(match, "US")),
    ("email", "@", _EMAIL, _is_email),
)


# A secret may begin before the cut and end behind it; private keys are the longest.
_LOOK_AHEAD = 4096


def safe_excerpt(text: str, most_characters: int) -> str:
    """Return `text` masked, without control characters and direction marks, and cut with a note."""
    looked_at = text[: most_characters + _LOOK_AHEAD]
    # Control characters go first: one inside a secret would hide it from the mask.
    kept = mask(without_steering(looked_at)).strip()
    left_out = len(kept) - most_characters + max(0, len(text) - most_characters - _LOOK_AHEAD)
    if left_out <= 0:
        return kept
    return f"{kept[:most_characters].rstrip()} … ({left_out:,} more characters)"
