"""A stand-in for the command `kaggle` and the site behind it, lies included.

`install` makes the site, a folder, with the command in it. A push starts a session in
the background that executes the notebook for real. Which lies the site tells is in its
script, where sessions and calls are counted from 1:

- steps: after so many in a session the clocks of its ranks jump by twelve hours
- empty: whether a source is mounted empty in the first version that has it
- kill: {session: steps that it makes before it is killed}; lost: those without output
- one_gpu: sessions in which `num_processes` is 1; late: {session: seconds of its output}
- failed_pushes: push calls that fail, with exit code 0
- kill_caller_of_push, …_of_output: calls whose caller is killed before the answer
- unreadable_every: one of so many answers to `kernels status` is an error
- quota_seconds: the seconds of sessions that are 30 hours, in each `week_seconds`
"""

import fcntl
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.kaggle_machine import execute_version

WEEKLY_HOURS = 30
Record = dict[str, Any]
# What Python runs when it starts in a session.
CLOCK = """
import os, sys, time
if "spawn_main" in "".join(sys.orig_argv):
    clock = time.monotonic
    time.monotonic = lambda: clock() + 43200 * os.path.exists({late!r})
"""
HONEST: Record = {
    **{
        "steps": 1 << 30,
        "empty": False,
        "kill": {},
        "lost": [],
        "one_gpu": [],
        "late": {},
    },
    **{"failed_pushes": [], "kill_caller_of_push": [], "kill_caller_of_output": []},
    **{"unreadable_every": 1 << 30, "quota_seconds": 1 << 30, "week_seconds": 1 << 30},
}


def install(folder: Path, script: Record) -> dict[str, str]:
    """Make a site; return the environment in which `kaggle` is its command."""
    command = folder / "bin" / "kaggle"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} "$@"\n')
    command.chmod(0o755)
    write(folder / "script.json", HONEST | script)
    write(folder / "site.json", {"began": time.time(), "beside": 0})
    return {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}


def read(file: Path) -> Record:
    return json.loads(file.read_bytes())


def write(file: Path, values: Record) -> None:
    """Replace a file at once, since others read it meanwhile."""
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(values))
    aside.replace(file)


def largest(folder: Path, number: str = r'"step": (\d+)') -> float:
    """Return the largest of such numbers in the metrics below a folder, or 0."""
    found = [0.0]
    # Unlike pathlib, glob takes folders in its stride that a run removes meanwhile.
    for file in glob.glob(f"{folder}/**/metrics.jsonl", recursive=True):
        found += map(float, re.findall(number, Path(file).read_text()))
    return max(found)


class Site:
    """The site, whose methods answer the commands of their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = read(folder / "script.json")
        self.state = read(folder / "site.json")

    def count(self, what: str) -> int:
        """Count a call, and return which one of its kind it is."""
        self.state[what] = self.state.get(what, 0) + 1
        write(self.folder / "site.json", self.state)
        return self.state[what]

    def sessions(self, kernel: str = "*") -> list[Record]:
        """List the records of a kernel's versions, or of all sessions, in their order."""
        found = self.folder.glob(f"kernels/{kernel}/*/version.json")
        return sorted(map(read, found), key=lambda record: record["session"])

    def quota_used(self) -> float:
        """Return the hours that sessions have used of this week."""
        now, began = time.time(), self.state["began"]
        monday = now - (now - began) % self.script["week_seconds"]
        ended = [(r, r["ended"] or now) for r in self.sessions()]
        used = sum(max(0.0, end - max(r["began"], monday)) for r, end in ended)
        return used / self.script["quota_seconds"] * WEEKLY_HOURS

    def quota(self) -> str:
        total, used = WEEKLY_HOURS, min(self.quota_used(), WEEKLY_HOURS)
        row = f"GPU       {used:.2f}h  {total - used:.2f}h     {total:.2f}h"
        return f"resource  used    remaining  total   refreshAt\n{row}"

    def kernels_status(self, name: str) -> str:
        if self.count("status") % self.script["unreadable_every"] == 0:
            raise SystemExit("502 Server Error: Bad Gateway for url: …")
        versions = self.sessions(name.partition("/")[2])
        if not versions:
            denied = "(Permission 'kernels.get' was denied)"
            raise SystemExit(f"Cannot access kernel '{name}' {denied}.")
        return f'{name} has status "KernelWorkerStatus.{versions[-1]["state"]}"'

    def kernels_push(self, _p: str, folder: str, *_: str) -> str:
        call, metadata = self.count("push"), read(Path(folder, "kernel-metadata.json"))
        if call in self.script["failed_pushes"]:
            return "Kernel push error: Internal error"
        if self.quota_used() >= WEEKLY_HOURS:
            return "Kernel push error: Maximum weekly GPU quota of 30.00 hours reached."
        kernel = metadata["id"].partition("/")[2]
        before, others = self.sessions(kernel), self.sessions()
        if any(record["ended"] is None for record in others):
            self.count("beside")  # also of another notebook: it is all one chain
        version = self.folder / "kernels" / kernel / str(len(before) + 1)
        version.mkdir(parents=True)
        shutil.copyfile(Path(folder, metadata["code_file"]), version / "notebook.ipynb")
        record = {
            **{"session": len(others) + 1, "folder": str(version), "state": "QUEUED"},
            **{"began": time.time(), "ended": None, "began_at": 0, "reached": 0},
            "sources": metadata["dataset_sources"] + metadata["kernel_sources"],
            "known": before[-1]["sources"] if before else [],
        }
        write(version / "version.json", record)
        command = [sys.executable, __file__, str(self.folder), "session", str(version)]
        with (version / "session.log").open("w") as log:
            subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if call in self.script["kill_caller_of_push"]:
            os.kill(os.getppid(), signal.SIGKILL)
        return f"Kernel version {version.name} successfully pushed.  Please check …"

    def kernels_output(self, name: str, _p: str, to: str, _o: str, pattern: str) -> str:
        call = self.count("output")
        record = self.sessions(name.partition("/")[2])[-1]
        late = self.script["late"].get(str(record["session"]), 0)
        if record["ended"] is None or time.time() < record["ended"] + late:
            return ""
        working = Path(record["folder"]) / "working"
        for file in filter(Path.is_file, working.rglob("*")):
            part = file.relative_to(working)
            if re.search(pattern, str(part)):
                Path(to, part).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, Path(to, part))
                if call in self.script["kill_caller_of_output"]:
                    os.kill(os.getppid(), signal.SIGKILL)
        return f"Output files downloaded to {to}\nKernel log downloaded to {to}"

    def datasets_status(self, name: str) -> str:
        if not (self.folder / "datasets" / name).is_dir():
            raise SystemExit("403 Client Error: Forbidden for url: …")
        return "ready"

    def datasets_create(self, _p: str, folder: str) -> str:
        name = read(Path(folder, "dataset-metadata.json"))["id"]
        shutil.copytree(folder, self.folder / "datasets" / name)
        return "Your private Dataset is being created. Please check progress at …"

    def run_session(self, version: Path) -> None:
        """Execute a version, and write down what became of it."""
        record = read(version / "version.json") | {"state": "RUNNING"}
        write(version / "version.json", record)
        session, notebook = record["session"], version / "notebook.ipynb"
        if session in self.script["one_gpu"]:
            text = notebook.read_text()
            notebook.write_text(text.replace("_processes = 2", "_processes = 1"))
        sources, working = self.find_sources(version, record), version / "working"
        kept, late = max(map(largest, sources.values())), version / "late"
        (clock := version / "clock").mkdir()
        (clock / "sitecustomize.py").write_text(CLOCK.format(late=str(late)))

        def watch() -> bool:
            made = largest(working) - kept
            if made >= self.script["steps"]:
                late.touch()
            return made >= self.script["kill"].get(str(session), 1 << 30)

        ended = execute_version(
            *(Path(sys.executable), notebook, sources, working),
            limit_seconds=3600,
            cancelled=watch,
            environ={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(clock)},
        )
        record["began_at"] = largest(working, r'"step": (\d+).*"event": "resume"')
        record |= {"reached": largest(working), "state": ended.state}
        if session in self.script["lost"]:
            shutil.rmtree(working)
            working.mkdir()
        write(version / "version.json", record | {"ended": time.time()})

    def find_sources(self, version: Path, record: Record) -> dict[str, Path]:
        """Return what is mounted: data sets, and the output of kernels' last versions."""
        (nothing := version / "nothing").mkdir()
        found = {}
        for name in record["sources"]:
            place, folder = f"datasets/{name}", self.folder / "datasets" / name
            if not folder.is_dir():
                ended = [r for r in self.sessions(Path(name).name) if r["ended"]]
                place = f"notebooks/{name}"
                folder = Path(ended[-1]["folder"], "working")
            hidden = self.script["empty"] and name not in record["known"]
            found[place] = nothing if hidden else folder
        return found


def main(folder: Path, *words: str) -> None:
    """Answer a call of `kaggle`, one at a time, or run a session."""
    if words[0] == "session":
        Site(folder).run_session(Path(words[1]))
        return
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        named = 1 if words[0] == "quota" else 2
        answer = getattr(Site(folder), "_".join(words[:named]))
        print(answer(*words[named:]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
