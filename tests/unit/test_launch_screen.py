"""On a terminal a bar follows the steps; in a log there are lines alone, as they were said."""

import io
import os
import pty
import re
import subprocess
import sys

from pipeline.launch.screen import STEP, Screen
from pipeline.metrics.console import step_line
from tests.unit.test_metrics_console import make_record

LINES = ["run folder: /tmp/[x]\n", step_line(make_record(), 30) + "\n", "checkpoint step-000012: 1.6 MiB on disk\n"]


def test_the_line_of_a_step_is_known_with_whatever_stands_behind_it():
    for changes in ({}, {"eval_loss": 7.5, "eval_seconds": 3.2, "loss_spike": True}, {"eta_seconds": None}):
        found = STEP.match(step_line(make_record(**changes), 30))
        assert found is not None
        assert found.groups() == ("12", "30", "-" if "eta_seconds" in changes else "0:01:12")
    assert STEP.match("checkpoint step-000012: ETA") is None


def test_a_log_gets_lines_as_they_were_said(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Screen(stream) as screen:
        for line in LINES:
            screen.show(line)
    assert stream.getvalue() == "".join(LINES)


def test_a_real_terminal_gets_the_lines_and_a_bar_that_is_gone_in_the_end():
    code = f"from pipeline.launch.screen import Screen\nwith Screen() as s:\n  for line in {LINES!r}: s.show(line)"
    outer, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    subprocess.run([sys.executable, "-c", code], env=environment, stdout=inner, stdin=inner, check=True, timeout=60)
    os.close(inner)
    shown = b""
    while chunk := _read(outer):
        shown += chunk
    os.close(outer)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert all(line.strip() in text for line in LINES)
    assert re.search(r"training .*━.* 12/30 ETA 0:01:12", text)
    assert shown.rstrip().endswith(b"\x1b[2K"), "the bar's line is cleared"


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so when the other end is closed
        return b""
