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
from pathlib import Path

NAMES = {"C": "COMPLETE", "E": "ERROR", "X": "CANCEL_ACKNOWLEDGED"}
NAMES |= {"R": "RUNNING", "Q": "QUEUED"}
QUOTA = """resource  used    remaining  total   refreshAt
--------  ------  ---------  ------  -------------------------
GPU       {used:.2f}h  {left:.2f}h     30.00h  2026-12-05T00:00:00+00:00
TPU       0.00h   20.00h     20.00h  2026-12-05T00:00:00+00:00"""


def call(folder, words):
    """Return what the command prints; its state is in a folder."""
    note(folder, " ".join(words))
    site = json.loads((folder / "site.json").read_text())
    said = answer(site, words)
    if busy := site.pop("second", None):
        note(folder, f"SECOND SESSION beside {busy}")
    (folder / "site.json").write_text(json.dumps(site))
    if site.pop("kill", None):
        (folder / "site.json").write_text(json.dumps(site))
        os.kill(os.getppid(), signal.SIGKILL)
    return said


def push(site, folder):
    """Start a session: the next of the script."""
    metadata = json.loads((folder / "kernel-metadata.json").read_text())
    session = site["sessions"].pop(0)
    if "refused" in session:
        return session["refused"]
    kernels = site["kernels"].items()
    site["second"] = [k for k, v in kernels if v["states"][0] in "RQ"]
    text = (folder / metadata["code_file"]).read_text()
    run, wanted = None, re.findall(r'resume = [\'\\"]+([\w/-]+)[\'\\"]', text)
    version = {"states": list(session["states"]), "number": 1, "run": None}
    if wanted and not session.get("empty_mount"):
        holder = f"ann/{wanted[-1].partition('/')[0]}"
        assert holder in metadata["kernel_sources"]
        run = site["kernels"][holder]["run"]
    if run or not wanted:
        stage = metadata["code_file"].removesuffix(".ipynb")
        run = run or {"identity": os.urandom(8).hex(), "step": 0, "stage": stage}
        step = run["step"] + session.get("gain", 0)
        version["run"] = run | {"step": step, "status": session.get("status")}
    version["late"] = session.get("late", 0)
    before = site["kernels"].get(metadata["id"], {"number": 0})
    version["number"] = before["number"] + 1
    if session.get("lost"):
        version["run"] = None
    site["kernels"][metadata["id"]] = version
    site["kill"] = session.get("kill")
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
    if late > 0:
        return ""
    if not run:
        return f"Kernel log downloaded to {target}"
    folder = target / "out" / f"{run['stage']}_32"
    folder.mkdir(parents=True)
    config = {"run": run["identity"], "settings": {"stage": run["stage"]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rank0.json").write_text(json.dumps({"status": run["status"]}))
    rows = [{"kind": "event", "event": "save", "step": run["step"]}]
    if run["status"] in ("finished", "time_budget"):
        rows.append(rows[0] | {"event": "end", "status": run["status"]})
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    return f"Output file downloaded to …\nKernel log downloaded to {target}"


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


def note(folder, line):
    with (folder / "calls.txt").open("a") as file:
        print(line, file=file)


if __name__ == "__main__":
    print(call(Path(os.environ["KAGGLE_STAND_IN"]), sys.argv[1:]))
