"""Commands tell the person what to mend in one line and end with status 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import REPOSITORY
from univla_jax.cli import format_table, report
from univla_jax.errors import TransientError, UserError

CONFIG = """
import dataclasses
import ml_collections
from univla_jax.config import complete
from univla_jax.errors import UserError

@dataclasses.dataclass(frozen=True)
class Fit:
    size: int = dataclasses.field(default=1, metadata={"formerly": "extent"})

def get_config(name="small"):
    if name == "fit":
        return complete(Fit, {})
    if name == "buggy":
        return [].width
    if name != "small":
        raise UserError(f"no recipe {name!r}; known: small")
    return ml_collections.ConfigDict({"steps": 3, "model": {"width": 4}, "fast": True})
"""
COMMAND = """
import pathlib
import threading
import time
from univla_jax import cli
from univla_jax.errors import HangError, UserError

CONFIG = cli.config_flag(DEFAULT)

def main(argv):
    del argv
    if CONFIG.value.steps == 9:
        raise UserError("nine steps\\nare too many")
    if CONFIG.value.steps == 8:
        raise ValueError("a bug")
    if CONFIG.value.steps == 7:
        pathlib.Path("/dev/full").write_text("more than a full disk takes")
    if CONFIG.value.steps == 6:
        threading.Thread(target=time.sleep, args=(300,)).start()
        raise HangError("no batch for 10 s")
    print(CONFIG.value.steps, CONFIG.value.model.width, CONFIG.value.fast)

if __name__ == "__main__":
    cli.run(main)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands")
    (path / "config.py").write_text(textwrap.dedent(CONFIG))
    (path / "required.py").write_text(COMMAND.replace("DEFAULT", "None"))
    (path / "defaulted.py").write_text(COMMAND.replace("DEFAULT", "'config.py:small'"))
    return path


def run(folder, script, *arguments):
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY))
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "output"),
    [
        ("required.py", ["--config=config.py"], "3 4 True"),
        ("required.py", ["--config", "config.py:small", "--noconfig.fast"], "3 4 False"),
        ("defaulted.py", ["--config.model.width=7", "--config.steps=2"], "2 7 True"),
    ],
)
def test_runs_with_overrides(folder, script, arguments, output):
    result = run(folder, script, *arguments)
    assert (result.returncode, result.stdout.strip()) == (0, output), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing; give --config=FILE.py"),
        (["--config=nowhere.py"], "no file 'nowhere.py'"),
        (["--config=config.py:big"], "no recipe 'big'; known: small"),
        (["--config=config.py", "--config.model.widht=4"], "did you mean 'width'?"),
        (["--config=config.py:fit", "--config.extent=4"], "'extent'; renamed to 'size'"),
        (["--config=config.py", "--config.zzz=4"], "config has: fast, model, steps"),
        (["--config=config.py", "--config.steps.x=4"], "config.steps is a value"),
        (["--config=config.py", "--config.steps=many"], "'many'"),
        (["--config=config.py", "--cofnig=4"], "Did you mean: config"),
        (["--config=config.py", "extra"], "unexpected argument 'extra'"),
        (["--config=config.py", "--config.steps=9"], "nine steps are too many"),
        (["--config=config.py", "--config.steps=7"], "No space left on device; make room"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folder, arguments, message):
    result = run(folder, "required.py", *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--config.steps=8"], ["--config=config.py:buggy"]])
def test_a_bug_keeps_its_traceback(folder, arguments):
    result = run(folder, "defaulted.py", *arguments)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_hang_does_not_wait_for_the_threads_that_hang(folder):
    result = run(folder, "required.py", "--config=config.py", "--config.steps=6")
    assert (result.returncode, result.stderr) == (86, "error: no batch for 10 s\n")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("wrong"), 2),
        (OSError(errno.EROFS, "read-only", "file"), 2),
        (TransientError("the bucket answered 503"), 85),
        (OSError(errno.ESTALE, "stale file handle", "file"), 85),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 85),
        (FileNotFoundError(errno.ENOENT, "no such file", "file"), None),
        (ValueError("a bug"), None),
    ],
)
def test_the_status_says_whether_the_same_command_may_go_on(error, status, capsys):
    assert report(error) == status
    assert len(capsys.readouterr().err.splitlines()) == (status is not None)


def test_a_table_has_words_to_the_left_and_numbers_to_the_right():
    rows = [("what", "n"), ("a longer name", 12)]
    assert format_table(rows) == "what            n\na longer name  12"
    assert format_table(rows, left=2) == "what           n\na longer name  12"
