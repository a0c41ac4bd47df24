"""What a person sees: whatever a name holds, it can be shown."""

import logging

import pytest

from vqf import terminal

NAME = b"caf\xe9.png".decode("utf-8", "surrogateescape")  # Latin-1, as old archives have it


def test_names_of_any_bytes_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("vqf", logging.WARNING, "", 0, "cannot read '%s'", (NAME,), None)
    handler = terminal.TerminalHandler()
    handler.handle(record)
    terminal.table("unreadable", ["file"], [[NAME]])
    shown = capsys.readouterr().out
    assert shown.count("caf\\udce9.png") == 2
