"""A stand-in for the command `kaggle`: kernels whose versions take turns by a script.

Its folder holds `site.json`: "sessions" are what the pushes to come bring, in order;
"quota" and "unreadable" are answers to come. A session resumes the run that its notebook
names if that is in the last output of the kernel, and else starts another run. A second
session beside a running one is written down in `calls.txt`.
"""

import json
import os
import re
import signal
import sys
import uuid
from pathlib import Path

FOLDER = Path(os.environ["KAGGLE_STAND_IN"])
NAMES = {"C": "COMPLETE", "E": "ERROR", "X": "CANCEL_ACKNOWLEDGED"}
NAMES |= {"R": "RUNNING", "Q": "QUEUED"}
QUOTA = """resource  used    remaining  total   refreshAt
--------  ------  ---------  ------  -------------------------
GPU       {used:.2f}h  {left:.2f}h     30.00h  2026-12-05T00:00:00+00:00
TPU       0.00h   20.00h     20.00h  2026-12-05T00:00:00+00:00"""


def push(site, folder):
    """Start a session: the next of the script."""
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    session = site["sessions"].pop(0)
    if "refused" in session:
        return session["refused"]
    if busy := [k for k, v in site["kernels"].items() if v["states"][0] in "RQ"]:
        note(f"SECOND SESSION beside {busy}")
    text = (folder / metadata["code_file"]).read_text()
    run, wanted = None, re.findall(r'resume = [\'\\"]+([\w/-]+)[\'\\"]', text)
    version = {"states": list(session["states"]), "number": 1, "run": None}
    if wanted and not session.get("empty_mount"):
        holder = f"ann/{wanted[-1].partition('/')[0]}"
        assert holder in metadata["kernel_sources"]
        run = site["kernels"][holder]["run"]
    if run or not wanted:
        run = run or {"identity": uuid.uuid4().hex, "step": 0}
        step = run["step"] + session.get("gain", 0)
        version["run"] = run | {"step": step, "status": session.get("status")}
    version["late"] = session.get("late", 0)
    before = site["kernels"].get(metadata["id"], {"number": 0})
    version["number"] = before["number"] + 1
    if session.get("lost"):
        version["run"] = None
    site["kernels"][metadata["id"]] = version
    if session.get("kill"):
        save(site)
        os.kill(os.getppid(), signal.SIGKILL)
    return f"Kernel version {version['number']} successfully pushed.  Please check …"


def status(site, kernel):
    """Give the next state of a kernel's last version."""
    if site["unreadable"]:
        return site["unreadable"].pop(0)
    if kernel not in site["kernels"]:
        return "404 Client Error: Not Found"
    states = site["kernels"][kernel]["states"]
    state = states.pop(0) if len(states) > 1 else states[0]
    return f'{kernel} has status "KernelWorkerStatus.{NAMES[state]}"'


def output(site, kernel, target):
    """Write the small files of the run of a kernel's last version."""
    version = site["kernels"][kernel]
    late, version["late"] = version["late"], version["late"] - 1
    run = version["run"]
    if not run or late > 0:
        return ""
    folder = target / "out" / "pretrain_32"
    folder.mkdir(parents=True)
    config = {"run": run["identity"], "settings": {"stage": "pretrain"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rank0.json").write_text(json.dumps({"status": run["status"]}))
    row = {"kind": "event", "event": "save", "step": run["step"]}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")
    return "Output file downloaded to …"


def answer(site, words):
    """Return what the command prints."""
    match words:
        case ["kernels", "push", "-p", folder, *_]:
            return push(site, Path(folder))
        case ["kernels", "status", kernel]:
            return status(site, kernel)
        case ["kernels", "output", kernel, "-p", target, *_]:
            return output(site, kernel, Path(target))
        case ["quota"]:
            left = site["quota"].pop(0) if len(site["quota"]) > 1 else site["quota"][0]
            return left if left == "?" else QUOTA.format(used=30 - left, left=left)
        case ["datasets", "status", _]:
            return "ready"
        case ["datasets", *_]:
            return "Dataset version is being created."


def note(line):
    with (FOLDER / "calls.txt").open("a") as file:
        print(line, file=file)


def save(site):
    (FOLDER / "site.json").write_text(json.dumps(site))


if __name__ == "__main__":
    note(" ".join(sys.argv[1:]))
    now = json.loads((FOLDER / "site.json").read_text())
    print(answer(now, sys.argv[1:]))
    save(now)
