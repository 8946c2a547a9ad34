"""Processes: how old they are, how they end, what they import."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from minimind_nb.lifetime import oldest_age_seconds

FAMILY = """
import os, subprocess, sys, time
child = '''
import ctypes, os, sys, time
if sys.argv[2] == "thread":
    ctypes.CDLL = lambda _: object()
from minimind_nb.lifetime import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
'''
subprocess.Popen([sys.executable, "-c", child, str(os.getpid()), sys.argv[1]])
time.sleep(60)
"""


def test_the_age_is_that_of_the_oldest_process_above():
    """A command that a cell starts is younger than the session."""
    code = "from minimind_nb.lifetime import oldest_age_seconds as age; print(age())"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    ours = oldest_age_seconds()
    assert ours > 0
    assert ours - 60 < float(child.stdout) <= ours


@pytest.mark.parametrize("above", [psutil.NoSuchProcess, psutil.AccessDenied])
def test_the_age_is_of_the_ancestors_that_can_be_seen(monkeypatch, above):
    def refuse(self):
        raise above(self.pid)

    everything = oldest_age_seconds()
    monkeypatch.setattr(psutil.Process, "parent", refuse)
    assert 0 < oldest_age_seconds() <= everything + 1


@pytest.mark.fault("F107")
def test_a_script_without_its_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from minimind_nb.lifetime import without_main_script\n"
        "print('once')\n"
        "child = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(0,))\n"
        "with without_main_script():\n"
        "    child.start()\n"
        "child.join()\n"
        "print(child.exitcode, __import__('__main__').child is child)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["once", "0", "True"]


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
        while not (ended := output.read() == b"") and time.monotonic() < limit:
            time.sleep(0.02)
    if not ended:
        os.kill(child, signal.SIGKILL)
    assert ended
