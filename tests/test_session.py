import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minimind_nb import session
from minimind_nb.session import Session, current_session, process_age_seconds

KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}

FAMILY = """
import os, subprocess, sys, time
child = '''
import ctypes, os, sys, time
if sys.argv[2] == "thread":
    ctypes.CDLL = lambda _: object()
from minimind_nb.session import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
'''
subprocess.Popen([sys.executable, "-c", child, str(os.getpid()), sys.argv[1]])
time.sleep(60)
"""


def test_kaggle_is_known_by_its_run_type():
    interactive = current_session(KAGGLE)
    assert (interactive.kind, interactive.batch) == ("kaggle", False)
    batch = current_session({"KAGGLE_KERNEL_RUN_TYPE": "Batch"})
    assert (batch.kind, batch.batch) == ("kaggle", True)
    assert batch.scratch == Path("/kaggle/temp")


def test_an_api_key_on_a_laptop_is_no_kaggle():
    assert current_session({"KAGGLE_USERNAME": "x", "KAGGLE_KEY": "y"}).kind == "plain"


def test_colab_is_known_by_its_release_tag():
    assert current_session({"COLAB_RELEASE_TAG": "r1"}) == Session("colab")


def test_the_environment_of_this_process_is_the_default(monkeypatch):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "r1")
    assert current_session().kind == "colab"


def test_what_can_be_made_again_is_kept_out_of_kaggles_saved_folder():
    cache = current_session(KAGGLE).cache_folder("/kaggle/working/out")
    assert cache == Path("/kaggle/temp/minimind_nb")
    assert Session("plain").cache_folder("runs") == Path("runs/cache")


def test_a_session_on_kaggle_ends_with_a_margin_unless_set():
    kaggle = current_session(KAGGLE)
    assert kaggle.hours(None) == 11.5
    assert kaggle.hours(9.0) == 9.0
    assert Session("colab").hours(None) is None


def test_a_plain_session_starts_with_the_call():
    assert Session("plain").seconds_left(None) is None
    assert Session("plain").seconds_left(0.5) == 1800.0


@pytest.mark.parametrize("kind", ["kaggle", "colab"])
def test_a_hosted_sessions_clock_started_with_the_kernel(kind, monkeypatch):
    monkeypatch.setattr(session, "process_age_seconds", lambda: 600.0)
    assert Session(kind).seconds_left(1.0) == 3000.0


def test_a_process_knows_its_age():
    code = (
        "import time; time.sleep(0.3)\n"
        "from minimind_nb.session import process_age_seconds as age\n"
        "print(age())"
    )
    began = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert 0.25 <= float(answer.stdout) <= time.monotonic() - began + 0.1


def test_an_age_that_nothing_tells_is_zero(monkeypatch):
    def refuse(self, *_args, **_options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert process_age_seconds() == 0.0


@pytest.mark.parametrize("means", ["kernel", "thread"])
def test_a_child_dies_with_its_killed_parent(means):
    parent = subprocess.Popen(
        [sys.executable, "-c", FAMILY, means], stdout=subprocess.PIPE
    )
    assert parent.stdout
    with parent.stdout as output:
        child = int(output.readline())
        parent.kill()
        parent.wait()
        # The pipe reaches its end when the last process that holds it is gone.
        os.set_blocking(output.fileno(), False)
        limit = time.monotonic() + 3
        while output.read() != b"" and time.monotonic() < limit:
            time.sleep(0.02)
        ended = time.monotonic() < limit
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended
