"""Terminal output: names with any bytes can be printed; format of numbers, durations and sizes."""

import logging

import pytest

from vqf import terminal

NAME = b"caf\xe9.png".decode("utf-8", "surrogateescape")  # Latin-1, as old archives have it


def test_names_of_any_bytes_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("vqf", logging.WARNING, "", 0, "cannot read '%s'", (NAME,), None)
    handler = terminal.TerminalHandler()
    handler.handle(record)
    terminal.print_table("unreadable", ["file"], [[NAME]])
    shown = capsys.readouterr().out
    assert shown.count("caf\\udce9.png") == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.123456, "0.1235"), (22.1, "22.1"), (12345.6, "12,346"), (1024, "1,024"), (float("inf"), "inf")),
        *((-0.5, "-0.5"), (9999.7, "10,000"), (0.00012346, "0.0001235")),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert terminal.format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (864000, "240 h 0 min")],
)
def test_durations(value: float, text: str) -> None:
    assert terminal.format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (23.75 * 2**30, "23.75 GiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_sizes(value: float, text: str) -> None:
    assert terminal.format_bytes(value) == text
