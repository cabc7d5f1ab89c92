"""Credentials and personal data in rows: planted ones are found, and look-alikes are not.

All examples are made up. Key-like strings are put together at run time, so that scanners of this
repository find none.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from stdnum import luhn
from stdnum.cn import ric

from qwen3ft.data.safety import mask, scan
from qwen3ft.logs import mask_secrets

LETTERS = "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ"


def random_text(seed: int, count: int, alphabet: str = LETTERS + "123456789") -> str:
    """Return random characters, always the same for a seed."""
    return "".join(Random(seed).choices(alphabet, k=count))


def resident_id(first: str) -> str:
    """Return seventeen digits with their check digit."""
    return first + ric.calc_check_digit(first + "0")


def card(first: str, grouping: str = "") -> str:
    """Return digits with their check digit, in groups of four if there is a separator."""
    number = first + luhn.calc_check_digit(first)
    return grouping.join(number[i : i + 4] for i in range(0, len(number), 4))


UPPER = "ABCDEFGHJKLMNPQRSTUVWXYZ234567"
KEY_BLOCK = "-----{} RSA PRIVATE KEY-----\n" + random_text(1, 64) + "\n" + random_text(2, 64)

CANARIES: list[tuple[str, str, str]] = [
    ("api_key", "export HF_TOKEN={}", "hf" + "_" + random_text(3, 34, LETTERS)),
    ("api_key", "令牌是{}，不要外传", "hf" + "_" + random_text(4, 34)),
    ("api_key", 'openai.api_key = "{}"', "sk" + "-" + random_text(5, 48)),
    ("api_key", "OPENAI_API_KEY={}", "sk" + "-proj-" + random_text(6, 40)),
    ("api_key", "key: {}", "sk" + "-ant-api03-" + random_text(7, 60)),
    ("api_key", "aws_access_key_id = {}", "AKIA" + random_text(8, 16, UPPER)),
    ("api_key", "({})", "ASIA" + random_text(9, 16, UPPER)),
    ("api_key", "AccessKeyId：{}。", "LTAI" + random_text(10, 20)),
    ("api_key", "SecretId: {}", "AKID" + random_text(11, 32)),
    ("api_key", "maps?key={}&q=1", "AIza" + random_text(12, 35)),
    ("api_key", "git clone with {} please", "ghp" + "_" + random_text(13, 36)),
    ("api_key", "token {}", "gho" + "_" + random_text(14, 36)),
    ("api_key", "{}", "github" + "_pat_" + random_text(15, 22) + "_" + random_text(16, 59)),
    ("api_key", "GITLAB={}", "glpat" + "-" + random_text(17, 20)),
    (
        "api_key",
        "slack: {}",
        "xox" + "b-" + random_text(18, 12, "123456789") + "-" + random_text(19, 24),
    ),
    ("api_key", "stripe.api_key='{}'", "sk" + "_live_" + random_text(20, 24)),
    ("api_key", "//registry/:_authToken={}", "npm" + "_" + random_text(21, 36)),
    ("api_key", "TWINE_PASSWORD={}", "pypi" + "-AgE" + random_text(22, 80)),
    (
        "api_key",
        "Cookie: jwt={}",
        "eyJ" + random_text(23, 30) + ".eyJ" + random_text(24, 60) + "." + random_text(25, 43),
    ),
    ("api_key", "Authorization: Bearer {}", random_text(26, 40)),
    (
        "private_key",
        "here it is:\n{}",
        KEY_BLOCK.format("BEGIN") + "\n-----END RSA PRIVATE KEY-----",
    ),
    ("private_key", "cut off: {}", KEY_BLOCK.format("BEGIN").replace("RSA ", "")),
    ("private_key", "key {}", KEY_BLOCK.format("BEGIN").replace("RSA", "OPENSSH") + "\n"),
    ("password_url", "postgresql://{}@db.internal:5432/app", "admin:" + random_text(27, 12)),
    ("password_url", "连接串 mysql://{}@10.0.0.5/crm", "root:Tr0ub4dor&3"),
    ("password_url", "redis://{}@cache:6379", "default:" + random_text(28, 16)),
    ("password_url", "curl https://{}@host/path", "deploy:hunter2"),
    ("email", "写信给{}即可", "lihua.test88@qq.com"),
    ("email", "My address is {}.", "jane.q.doe@gmail.com"),
    ("email", "<{}>", "j_doe+news@mail.unimelb.edu.au"),
    ("email", "email:{};", "k.tanaka@softwerk.co.jp"),
    ("email", "邮箱：{}，电话见下", "wang-xiaoming@foxmail.com"),
    ("email", "联系{}", "sales＠huaxing-trade.com.cn"),
    ("phone", "我的手机号是{}", "13812345678"),
    ("phone", "电话{}，微信同号", "159 2233 4455"),
    ("phone", "请拨打{}。", "186-1234-9876"),
    ("phone", "手机：{}", "+86 177 0123 4567"),
    ("phone", "联系电话:{}", "8619912345678"),
    ("phone", "全角{}也算", "１３９１２３４５６７８"),
    ("phone", "座机 {} 转 8", "010-62345678"),
    ("phone", "公司电话：{}", "(021) 54321098"),
    ("phone", "传真{}", "0755-86543210"),
    ("phone", "Call {} now", "+1 202-555-0143"),
    ("phone", "ring me on {}, please", "+44 20 7946 0958"),
    ("phone", "Tel. {}", "+49 30 901820"),
    ("phone", "mobile {}", "+33 6 12 34 56 78"),
    ("phone", "call {}!", "(415) 867-5309"),
    ("phone", "My number: {}", "212-736-5000"),
    ("phone", "fax {}", "+81 3-3224-9999"),
    ("id_number", "身份证号{}", resident_id("11010519491231002")),
    ("id_number", "身份证：{}，请核对", resident_id("44030819900307231")),
    ("id_number", "ID {}", resident_id("31011519851120463")),
    ("id_number", "{}是他的号码", resident_id("51010719780615281")),
    ("id_number", "My SSN is {}.", "536-22-8725"),
    ("id_number", "social security number {}", "219-45-7781"),
    ("card_number", "卡号{}", card("621226100000482")),
    ("card_number", "card {} exp 09/27", card("453201511283036", " ")),
    ("card_number", "Visa: {}", card("411798200134871", "-")),
    ("card_number", "pay with {}", card("555534124444115", " ")),
    ("card_number", "银联 {}", card("622202020011223344", " ")),
    ("card_number", "JCB {}", card("353011133330000")),
    ("card_number", "amex {}", "3782 822463 10005"),
    ("iban", "IBAN {} please", "DE89 3704 0044 0532 0130 00"),
    ("iban", "account {}.", "GB29NWBK60161331926819"),
    ("iban", "to {} BIC", "FR14 2004 1010 0505 0001 3M02 606"),
    ("iban", "({})", "NL91ABNA0417164300"),
    ("iban", "转账到{}", "ES91 2100 0418 4502 0005 1332"),
]

LOOK_ALIKES = [
    *("订单号20231215123456789", "订单号：13812345678", "快递单号 13987654321，已发货"),
    *("编号为15912345678", "order no. 13800138000 was sent", "Invoice #4532015112830366"),
    *("Ticket 159-2233-4455", "SKU 4111111111111111", "ISBN 978-7-111-40701-0"),
    *("ISBN 9787302511854", "ISBN-13: 978-0-306-40615-7", "EAN 4006381333931", "version 3.11.7"),
    *("numpy==2.4.6", "torch 2.13.0+cpu", "v1.22.474.4876", "build 20231215.1042"),
    *("2023-12-15 08:30:00", "from 1998-2004 to 2010-2012", "2019年12月31日 23:59:59"),
    *("20231215", "15.06.2024", "1700000000", "1700000000123 ms", "13000000000 people"),
    *("15000000000", "0.13812345678", "13812345678.25", "3.14159265358979323846"),
    *("6.02214076e23", "1,234,567,890.12", "x = 12345678901234567890", "19 + 1380013800"),
    *("192.168.100.254", "255.255.255.255:8080", "fe80::1ff:fe23:4567:890a", "00:1A:2B:3C:4D:5E"),
    *("550e8400-e29b-41d4-a716-446655440000", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
    *("sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",),
    *("commit 13812345678abcdef", "110105194912310021", "110105199013310025"),
    *("999999199001011234", "44030819900307231A", "4532015112830367", "1234 5678 9012 3456"),
    *("0000 0000 0000 0000", "9111111111111111", "8765432187654321"),
    *("DE00 3704 0044 0532 0130 00", "GB29NWBK60161331926818", "AB12 CDEF 3456 GHIJ 7890"),
    *("000-12-3456", "666-45-6789", "123-45-6789", "part 10-20-3000", "912-34-5678"),
    *("500-600-700", "user@example.com", "name@example.org", "your.email@gmail.com"),
    *("me@localhost", "git@github.com:org/repo.git", "icon@2x.png", "npm i lodash@4.17.21"),
    *("@dataclass(frozen=True)", "@param name the name", "a @ b.T", "联系 @小明"),
    *("sk-xxxxxxxxxxxxxxxxxxxxxxxx", "sk-your-api-key-goes-here", "hf_xxxxxxxxxxxxxxxxxxxx"),
    *("sk-1234567890abcdef12", "AKIAIOSFODNN7" + "EXAMPLE", "task-management-system-design"),
    *("sk-folding-cube-container", "risk-assessment-methods", "ghp_ is the prefix"),
    *("a bearer certificates-of-deposit", "Bearer <token>", "Bearer $ACCESS_TOKEN"),
    *("-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",),
    *("-----BEGIN CERTIFICATE-----\n" + random_text(30, 64),),
    *("postgresql://user:password@localhost/db", "https://<user>:<password>@host"),
    *("ftp://user:${PASS}@host", "http://localhost:8080/@me"),
    *("max_position_embeddings_per_layer_count", "__init__", "test_a_row_costs_under_200_bytes"),
    *("|----------|----------|", "+1 +2 +3 +4 +5 +6 +7 +8 +9", "f(x)=+12345678"),
    *("1 2 3 4 5 6 7 8 9 10 11 12", "(2023) 12345678", "010-1234", "0123456789"),
    *("400-820-8820 is 8 digits short", "1-800", "100-200-3000", "4 x 256 x 151936 = 155582464"),
]


def results() -> tuple[list[str], list[str], list[str]]:
    """Return the canaries missed, the findings beside canaries, and the look-alikes reported."""
    missed, beside = [], []
    for kind, frame, secret in CANARIES:
        text = frame.format(secret)
        start = text.index(secret)
        inside = [
            f
            for f in scan(text)
            if f.kind == kind and start <= f.start < f.end <= start + len(secret)
        ]
        if len(inside) != 1 or inside[0].end - inside[0].start < 0.8 * len(secret):
            missed.append(f"{kind}: {text!r} {scan(text)}")
        beside += [f"{text!r} {f}" for f in scan(text) if f not in inside]
    alike = [f"{text!r} {scan(text)}" for text in LOOK_ALIKES if scan(text)]
    return missed, beside, alike


def test_every_planted_canary_is_found_in_its_place() -> None:
    """Every kind is found in English and Chinese sentences, and nothing beside it."""
    missed, beside, _ = results()
    assert len(CANARIES) >= 60
    assert missed == []
    assert beside == []


def test_look_alikes_are_not_reported() -> None:
    """Order numbers, ISBNs, versions, dates, decimals, hashes, code and placeholders of manuals."""
    assert len(LOOK_ALIKES) >= 60
    assert results()[2] == []


@pytest.mark.parametrize("prefix", [4, 20, 60])
def test_findings_hold_in_long_texts(prefix: int) -> None:
    """All canaries in one text, in order, none overlapping, and masked they are gone."""
    words = "plain words in between, 你好 and 42 more. "
    text = "\n".join(words * prefix + frame.format(secret) for _, frame, secret in CANARIES)
    found = scan(text)
    assert len(found) >= len(CANARIES)
    assert all(one.end <= other.start for one, other in pairwise(found))
    masked = mask(text)
    assert [secret for _, _, secret in CANARIES if secret in masked] == []
    assert masked.count("plain words in between, 你好 and 42 more. ") == prefix * len(CANARIES)


def test_masking_leaves_harmless_text_as_it_is() -> None:
    """Only what the logs mask as well is changed where nothing is found."""
    for text in LOOK_ALIKES:
        assert mask(text) == mask_secrets(text)
    assert mask("写信给li.hua@qq.com，或打13812345678。") == "写信给***，或打***。"


def test_every_credential_found_is_masked_in_logs() -> None:
    """The logs and the scan share one table; the logs are the stricter ones."""
    credentials = {"api_key", "private_key", "password_url"}
    for kind, frame, secret in CANARIES:
        if kind in credentials:
            assert secret not in mask_secrets(frame.format(secret))


def test_no_key_like_string_stands_in_this_file() -> None:
    """The planted keys are made at run time."""
    written = Path(__file__).read_text(encoding="utf-8")
    assert not re.search(r"(hf_|ghp_|sk-)[A-Za-z]*[0-9][A-Za-z0-9]{20}", written)
    assert not re.search("AKIA[A-Z0-9]{16}", written)


HEADER = KEY_BLOCK.format("BEGIN").partition("\n")[0]

# Texts that grow with their number: of each of many starts, or with many ways to be divided.
GROWING = {
    "contacts": lambda n: "".join(f"Li, li.{i}@huaxing{i}.com.cn\n" for i in range(n)),
    "tokens": lambda n: " ".join("hf" + "_" + random_text(i, 34) for i in range(n)),
    "passwords": lambda n: "://u:secret1@" * n,
    "a key of empty lines": lambda n: HEADER + "\n" * (30 * n),
    "a key of escaped empty lines": lambda n: HEADER + "\\n" * (15 * n),
    "a key of short lines": lambda n: HEADER + "\nrn" * (10 * n),
    "a key without an end": lambda n: HEADER + ("\n" + random_text(1, 64)) * n,
    "keys without lines": lambda n: (HEADER + "\n") * n,
    "ends of keys": lambda n: HEADER + "\n-----END " * n,
    "web tokens without a dot": lambda n: "-eyJ" * (5 * n),
    "web tokens without an end": lambda n: "eyJaaaaaaaaaa." * n,
    "web tokens behind escapes": lambda n: "\\neyJaaaaaaaaaa." * n,
    "keys behind escapes": lambda n: "\\nsk-a1B2c3D4e5F6g7H8" * n,
    "digits": lambda n: "3141592653" * n,
    "dots": lambda n: "." * (20 * n),
    "labels of a domain": lambda n: "x@" + "a." * (10 * n),
    "at signs": lambda n: "a@" * (10 * n),
    "base64": lambda n: random_text(1, 20 * n),
    "hyphens": lambda n: "-" * (20 * n),
    "groups of digits": lambda n: "4532 0151 1283 0366 " * n,
    "letters of IBANs": lambda n: "DE89 3704 0044 0532 0130 00 " * n,
    "words before a number": lambda n: ("order no. is: " * 3 + "13812345678 ") * n,
    "full width": lambda n: "１３９１２３４５６７８ " * n,
}


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.timeout(120)
def test_the_scan_takes_no_longer_than_the_text_grows(name: str) -> None:
    """20,000 of each: where time grew with their square, this would take many minutes.

    Twice the text has twice the findings, or two for one, so that nothing is left out of a long
    text.
    """
    few, many = (scan(GROWING[name](count)) for count in (500, 1000))
    assert 2 * len(few) - 1 <= len(many) <= 2 * len(few) + 1
    text = GROWING[name](20_000)
    assert len(text) >= 200_000
    assert len(scan(text)) >= len(many)
    assert len(mask_secrets(text)) <= len(text)


def test_a_web_token_is_found_whatever_its_length() -> None:
    """A header may hold a chain of certificates; a start in vain hides no other key behind it."""
    token = "eyJ" + random_text(1, 5_000) + ".eyJ" + random_text(2, 60) + "." + random_text(3, 43)
    key = "hf" + "_" + random_text(4, 34)
    text = f"jwt={token}; -eyJ-{key}"
    assert mask_secrets(text) == "jwt=***; -eyJ-***"
    assert [text[found.start : found.end] for found in scan(text)] == [token, key]


@pytest.mark.parametrize("before", ["\n", "\\n", "\\\\n", "\\r", "\\t", "\\b", "\\u662f"])
def test_a_key_is_masked_behind_an_escape(before: str) -> None:
    """In JSON a line break is a backslash and a letter, and Chinese may be written as codes."""
    token = "eyJ" + random_text(1, 30) + ".eyJ" + random_text(2, 60) + "." + random_text(3, 43)
    for key in ("sk" + "-" + random_text(4, 48), token):
        assert mask_secrets(f"use{before}{key}") == f"use{before}***"


KEY_ENDS = [
    "\n{}\n-----END PRIVATE KEY-----",
    "\r\n{}\r\n-----END PRIVATE KEY-----\r\n",
    "\\n{}\\n-----END PRIVATE KEY-----\\n",
    "\\\\r\\\\n{}\\\\r\\\\n-----END PRIVATE KEY-----",
    "\n\n  {}\n  nr==\n-----END RSA PRIVATE KEY-----",
    "{}-----END PRIVATE KEY-----",
]


@pytest.mark.parametrize("frame", KEY_ENDS)
def test_a_private_key_is_masked_to_its_end(frame: str) -> None:
    """Its lines end as in a file, or as in JSON or a log, and may begin with n and r."""
    body = "nr" + random_text(31, 62)
    text = f"before {HEADER}{frame.format(body)} after"
    masked = mask_secrets(text)
    assert masked.startswith("before ***")
    assert masked.endswith(" after")
    assert body not in masked
    assert "END" not in masked


def test_numbers_beyond_those_looked_up_count_as_phone_numbers() -> None:
    """No country has the code 999, but a text of a million such numbers must not take a minute."""
    assert not scan("+999 1234567, " * 1_000)
    assert [finding.kind for finding in scan("+999 1234567, " * 1_003)] == ["phone"] * 3
