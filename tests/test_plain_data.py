"""Tests of plain data as text: strict JSON, and YAML from strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hiera_core import plain_data
from hiera_core.plain_data import decode_text, text_encoding


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_json_has_no_constants_of_its_own() -> None:
    value = {"a": float("inf"), "b": [1.5, float("nan"), (-float("inf"), {"c": 2})], "d": None}
    text = plain_data.to_json(value)
    expected = {"a": None, "b": [1.5, None, [None, {"c": 2}]], "d": None}
    assert json.loads(text, parse_constant=refuse) == expected
    assert plain_data.to_json({"b": 1, "a": 0.5}, sort_keys=True) == '{"a": 0.5, "b": 1}'


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 10_000, "{a: " * 10_000, "- " * 10_000, LAUGHS, "&a [*a]", "&a {b: *a}"),
        *("!!bool x", "!!int ''", "!!timestamp x", "2026-13-45", "!!python/object:os.x {}"),
        *("a: [", "%", "9" * 5000, "{[]: 1}", "\x00", "1:" * 500 + "1.0"),
    ],
)
def test_yaml_that_cannot_be_used_is_a_value_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        plain_data.parse_yaml(text)
    assert str(error.value)
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ValueError):
        plain_data.read_yaml(tmp_path / "file.yaml")


def test_yaml_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1\nb: [x, 2.5]\n")
    assert plain_data.read_yaml(path) == {"a": 1, "b": ["x", 2.5]}
    path.write_bytes(b"#" * (1 << 20))
    assert plain_data.read_yaml(path) is None
    for content in (b"#" * ((1 << 20) + 1), b"\xff\xfe\x80"):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            plain_data.read_yaml(path)
    with pytest.raises(OSError):
        plain_data.read_yaml(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has these devices")
@pytest.mark.parametrize("device", ["/dev/full", "/dev/zero", "/dev/urandom"])
def test_devices_without_an_end_are_refused(device: str) -> None:
    with pytest.raises(ValueError):
        plain_data.read_yaml(Path(device))


def test_one_is_not_several() -> None:
    assert [plain_data.counted(n, "input") for n in (0, 1, 2)] == [
        "0 inputs",
        "1 input",
        "2 inputs",
    ]


def test_files_that_are_not_text_are_not_utf_16() -> None:
    """Numbers of 16 bits, and paths that are separated by NUL, look like it."""
    for text in ("a\nb\n", "Käse\r\nБрот is bread\r\n"):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
            assert decode_text(text.encode(encoding)) == text
    assert text_encoding(b"a\0b\0c\0") == "utf-8"
    for values in ([10, 1, 2, 3], [10, 65, 0, 66], [300, 400, 500, 10]):
        for order in ("little", "big"):
            content = b"".join(value.to_bytes(2, order) for value in values)
            assert text_encoding(content) == "utf-8", values
    for content in (b"\xff\xfe\0\0a\0\0\0", b"a\0", "a\0b\n".encode("utf-16")):
        with pytest.raises(ValueError, match="not a text file"):
            decode_text(content)
