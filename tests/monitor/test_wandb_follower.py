import importlib
import importlib.util
import json
import os
import re
import socket
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import minimind_nb as mm
from minimind_nb.config import TrainConfig, resolve
from minimind_nb.monitor import wandb_follower
from minimind_nb.monitor.metrics import History, MetricsLog
from minimind_nb.monitor.wandb_follower import require_wandb

KEY = "0123456789abcdef" * 2 + "01234567"
# Stands for wandb: records its calls, and also does what a test asks for.
FAKE = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace

def write(**fields):
    with open({out!r}, "a") as file:
        file.write(json.dumps(fields) + "\\n")

class Run(SimpleNamespace):
    url = None
    def log(self, values, step):
        {on_log}
        write(step=step, values=values)
    def finish(self, exit_code):
        write(exit_code=exit_code)

def Settings(**settings):
    return settings

def login(verify):
    raise RuntimeError("no key")

def teardown():
    pass

def init(**given):
    {on_init}
    write(tty=os.path.exists("/dev/tty") and _terminal(), **given)
    return Run(dir=given["dir"] + "/wandb/offline-run-1/files")

def _terminal():
    try:
        return bool(open("/dev/tty"))
    except OSError:
        return False
"""


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No key and no setting of wandb's, a home of one's own."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A function that replaces wandb, and returns one that reads the recorded calls."""

    def make(on_init="pass", on_log="pass"):
        calls = tmp_path / "calls.jsonl"
        source = FAKE.format(out=str(calls), on_init=on_init, on_log=on_log)
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "wandb.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path / "modules"))
        return lambda: [json.loads(line) for line in calls.read_text().splitlines()]

    return make


@pytest.fixture
def session(tmp_path, make_history, add_rows, caplog):
    """A function that is one session of a run; returns the messages it logged."""
    caplog.set_level("INFO")

    def run(begin, *steps, status="finished", **settings):
        caplog.clear()
        path = tmp_path / "out" / "pretrain_64" / "metrics.jsonl"
        history = History(path) if path.exists() else make_history()
        config = {"settings": {"epochs": 2}}
        path.with_name("config.json").write_text(json.dumps(config))
        history.rewind(begin or -1)
        cfg = resolve(TrainConfig(use_wandb=True, **settings))
        follower = wandb_follower.wandb_follower(history, cfg)
        assert follower
        with MetricsLog(path) as log:
            log.append("event", event="resume" if begin else "start", step=begin)
        add_rows(history, *steps, expert_load=[[0.25, 0.75]])
        if status:  # None stands for a run that was killed
            with MetricsLog(path) as log:
                log.append("event", event="end", step=steps[-1], status=status)
        follower.report()
        follower.finish()
        return [text for text in caplog.messages if not text.startswith("waiting at")]

    return run


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)])
def test_without_wandb_the_error_says_how_to_get_it(spec, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    needed = r"needs wandb, which is not installed: pip install 'minimind_nb\[wandb\]'"
    with pytest.raises(ValueError, match=needed):
        require_wandb()


def test_without_use_wandb_nothing_is_started(make_history):
    cfg = resolve(TrainConfig())
    assert wandb_follower.wandb_follower(make_history([3.0]), cfg) is None


def test_each_row_is_logged_once_over_all_sessions(fake, session, capfd):
    calls = fake()
    session(0, 1, 2, 3)
    # Step 3 was lost with its weights, and the wandb run has it already.
    session(2, 3, 4, status="failed")
    session(4, 5, status=None)
    first, *others = [row for row in calls() if "id" in row]
    assert [row["step"] for row in calls() if "step" in row] == [1, 2, 3, 4, 5]
    assert [row["exit_code"] for row in calls() if "exit_code" in row] == [0, 1, 1]
    assert {other["id"] for other in others} == {first["id"]}
    assert (first["project"], first["name"]) == ("MiniMind", "pretrain_64")
    assert (first["mode"], first["resume"]) == ("offline", "allow")
    assert first["tty"] is False
    assert first["config"] == {"epochs": 2}
    values = calls()[1]["values"]
    assert values["train/loss"] == 3.0 and values["train/tokens"] == 4000
    assert values["train/expert_load_0_1"] == 0.75
    assert capfd.readouterr() == ("", "")


def test_rows_that_are_lost_at_a_resume_are_not_logged(fake, session, make_history):
    history = make_history([4.0, 4.0, 4.0])
    with MetricsLog(history.path) as log:
        log.append("event", event="end", step=3, status="failed")
    calls = fake()
    session(1, 2)
    rows = [row for row in calls() if "step" in row]
    losses = [(row["step"], row["values"]["train/loss"]) for row in rows]
    assert losses == [(1, 4.0), (2, 3.0)]
    assert calls()[-1] == {"exit_code": 0}


def test_another_project_gets_a_run_of_its_own(fake, session):
    calls = fake()
    session(0, 1)
    session(1, 2, wandb_project="Other")
    runs = [row for row in calls() if "id" in row]
    assert [run["project"] for run in runs] == ["MiniMind", "Other"]
    assert runs[0]["id"] != runs[1]["id"]
    assert [row["step"] for row in calls() if "step" in row] == [1, 1, 2]


def test_a_wandb_that_hangs_keeps_nobody_waiting(fake, session, monkeypatch):
    fake(on_init="time.sleep(600)")
    monkeypatch.setattr(wandb_follower, "FINISH_SECONDS", 1.0)
    began = time.monotonic()
    (message,) = session(0, 1)
    assert time.monotonic() - began < 60
    assert message.startswith("wandb failed or did not finish in time; the training is")


@pytest.mark.parametrize("place", ["on_init", "on_log"])
@pytest.mark.fault("F113")
def test_a_wandb_that_fails_is_reported_once(place, fake, session, tmp_path):
    fake(**{place: "raise OSError('no space')"})
    messages = [one for one in session(0, 1, 2, 3) if "offline" not in one]
    assert len(messages) == 1 and messages[0].startswith("wandb failed or did not")
    log = tmp_path / "out" / "pretrain_64" / "wandb.log"
    assert "OSError: no space" in log.read_text() and str(log) in messages[0]


class DeafServer:
    """Takes connections on 127.0.0.1, counts them and never answers."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self.connections.append(self._server.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        for each in (self._server, *self.connections):
            each.close()


@pytest.fixture
def server(monkeypatch):
    """A server that all of wandb's traffic would reach."""
    server = DeafServer()
    names = ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    for name in names:
        monkeypatch.setenv(name, server.address)
    yield server
    server.close()


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows in wandb's own file of an offline run: LevelDB's log of records."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, part, rows = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last of its parts
            record, part = records.Record.FromString(part), b""
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: i.value_json for i in items})
    return [row for row in rows if row]


def test_a_training_leaves_an_offline_run_and_asks_no_network(server, tmp_path, capsys):
    pytest.importorskip("wandb")
    corpus = tmp_path / "corpus.jsonl"
    lines = (json.dumps({"text": f"The cat saw {n} birds."}) for n in range(40))
    corpus.write_text("\n".join(lines))
    settings = {
        **{"data_path": str(corpus), "out_dir": str(tmp_path / "out")},
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"max_seq_len": 16, "batch_size": 1, "accumulation_steps": 1},
        **{"max_steps": 3, "log_interval": 1, "sample_tokens": 0, "use_wandb": True},
        **{"device": "cpu", "num_processes": 1, "dtype": "float32"},
    }
    run = mm.train(TrainConfig(**settings))
    shown = capsys.readouterr().err
    assert len(re.findall(r"wandb is offline \(.*\); later: wandb sync ", shown)) == 1
    history, rows = run.history, logged(run.folder)
    sent = [(int(row["_step"]), float(row["train/loss"])) for row in rows[1:]]
    assert sent == [(row["step"], row["loss"]) for row in history.select("train")]
    assert float(rows[0]["eval/loss"]) == history.select("eval")[0]["loss"]
    assert not server.connections


def test_a_server_that_does_not_answer_leaves_it_offline(
    server, session, monkeypatch, tmp_path
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    (message,) = session(0, 1, 2)
    assert server.connections
    assert message.startswith("wandb is offline (")
    folder = tmp_path / "out" / "pretrain_64"
    assert [row["_step"] for row in logged(folder)] == ["1", "2"]
    written = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    assert not [data for data in written if KEY.encode() in data]
