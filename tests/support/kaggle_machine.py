"""A machine that executes a version of a notebook as Kaggle does.

The session has namespaces of its own for mounts, processes and the network: the paths
below /kaggle are the real ones, its inputs are read-only, there is no network but
loopback, it is as old as its first process, and what it installs goes with it.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

NOTEBOOK, PAGE = "__notebook__.ipynb", "__results__.html"
_OFFLINE = "http://127.0.0.1:9"  # a proxy that refuses
# The root has all folders of / and a /kaggle; writes to the environment stay in memory.
_MACHINE = """
set -e
root=$1 environment=$2 inputs=$3 working=$4 options=$5
shift 5
ip link set lo up
mount -t tmpfs tmpfs "$root"
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$root"
    elif [ -d "$entry" ] && [ "$entry" != /kaggle ]
    then mkdir "$root$entry"; mount --rbind "$entry" "$root$entry"
    fi
done
mount -t proc proc "$root/proc"
mkdir -p "$root/.upper" "$root/.work"
mount -t overlay overlay "$root$environment" \\
    -o "lowerdir=$environment,upperdir=$root/.upper,workdir=$root/.work$options"
mkdir -p "$root/kaggle/input" "$root/kaggle/working" "$root/kaggle/temp"
mount --bind "$working" "$root/kaggle/working"
mount --bind -o ro "$inputs" "$root/kaggle/input"
exec chroot "$root" "$@"
"""
# It ends at the first error; the page, which takes nbconvert, is written all the same.
_VERSION = f"""
cd "$1"
[ "$PIP_TARGET" ] || "$2" -m pip uninstall -qq --yes minimind_nb
"$2" -m papermill --log-output --no-progress-bar {NOTEBOOK} {NOTEBOOK}
code=$?
if "$2" -c "import nbconvert" 2> /dev/null; then
    "$2" -m nbconvert --log-level WARN --to html --output {PAGE} {NOTEBOOK} || exit 1
fi
exit $code
"""


@dataclass(frozen=True)
class Version:
    """What became of a version: its state as Kaggle names it, its output and its log."""

    state: str  # COMPLETE, ERROR or CANCEL_ACKNOWLEDGED
    output: Path  # what was /kaggle/working, with NOTEBOOK and PAGE
    log: str
    seconds: float


def execute_version(
    python: Path,
    notebook: Path,
    sources: Mapping[str, Path],
    working: Path,
    *,
    run_type: str = "Batch",
    layout: str = "owners",
    limit_seconds: float = 600.0,
    cancelled: Callable[[], Any] = lambda: False,
    environ: Mapping[str, str] | None = None,
) -> Version:
    """Execute a notebook with the `python` of an environment, and wait for its end.

    Of `sources`, {"datasets/ann/wheel": folder} is mounted at
    /kaggle/input/datasets/ann/wheel with layout="owners", and at /kaggle/input/wheel
    with "slugs"; a copy is left in the folder `input` beside `working`, and so is the
    log. `environ` is added to the variables of this process, less PYTHONPATH. After
    `limit_seconds`, or as soon as `cancelled()` is true, all processes get SIGKILL.

    Where namespaces are forbidden, the log begins with the reason, and the session is
    that of a plain machine: MINIMIND_NB_INPUTS names its inputs, proxies lead nowhere,
    and a minimind_nb that the environment has is not hidden.
    """
    working = working.resolve()
    inputs, log = working.with_name("input"), working.with_name(f"{working.name}.log")
    working.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir()
    for name, folder in sources.items():
        place = name if layout == "owners" else Path(name).name
        shutil.copytree(folder, inputs / place)
    shutil.copyfile(notebook, working / NOTEBOOK)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    reason, state, began = why_no_namespaces(), None, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as file:
        if reason:
            file.write(
                f"As on a plain machine, since namespaces are forbidden: {reason}\n"
            )
            command, where = [], working
            variables |= {"MINIMIND_NB_INPUTS": f"{inputs}", "http_proxy": _OFFLINE}
            variables |= {"https_proxy": _OFFLINE, "no_proxy": "127.0.0.1,localhost"}
            variables |= {"PIP_TARGET": scratch, "PYTHONPATH": scratch}
        else:
            environment = python.parents[1].resolve()
            command = _machine(scratch, environment, inputs, working)
            where = Path("/kaggle/working")
            variables["KAGGLE_KERNEL_RUN_TYPE"] = run_type
        file.flush()
        process = subprocess.Popen(
            [*command, "sh", "-c", _VERSION, "version", str(where), str(python)],
            env=variables | dict(environ or {}),
            stdout=file,
            stderr=file,
        )
        while process.poll() is None and state is None:
            if time.monotonic() - began > limit_seconds or cancelled():
                state = "CANCEL_ACKNOWLEDGED"
                _kill_all(psutil.Process(process.pid))
            time.sleep(0.05)
        state = state or ("ERROR" if process.returncode else "COMPLETE")
        process.wait()
    return Version(state, working, log.read_text(), time.monotonic() - began)


@functools.cache
def why_no_namespaces() -> str:
    """Return why sessions get no namespaces of their own here; empty if they do."""
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as folder:
        machine = [*_machine(root, *[Path(folder)] * 3), "true"]
        try:
            subprocess.run(machine, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return getattr(error, "stderr", "").strip() or str(error)
    return ""


def _machine(root: str, environment: Path, inputs: Path, working: Path) -> list[str]:
    """Return the words of a command that runs the command after them in the machine."""
    namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child"]
    folders, options = [root, f"{environment}", f"{inputs}", f"{working}"], ""
    if os.geteuid() != 0:
        namespaces, options = [*namespaces, "--map-root-user"], ",userxattr"
    return ["unshare", *namespaces, "sh", "-c", _MACHINE, "machine", *folders, options]


def _kill_all(process: psutil.Process) -> None:
    for one in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
