"""Keys, home folders and ports of a user's stay the user's own."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import psutil
import pytest
from support.injection import Fault, inject
from support.runs import Settings

import minimind_nb as mm
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.monitor.metrics import History

pytestmark = pytest.mark.usefixtures("forked")

TYPED = ("transformers", "vllm", "lm_eval", "python")
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "KAGGLE_USERNAME": "a_person_by_name",
    "KAGGLE_KEY": "fedcba9876543210" * 2,
    "HF_TOKEN": "hf_this_is_nobodys_business",
}


@pytest.mark.fault("S01")
def test_no_key_and_no_home_folder_gets_into_files_or_outputs(
    settings: Settings,
    corpus_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that goes well, one that fails and an export, with paths of a work folder."""
    home = tmp_path / "home_of_a_person"
    home.mkdir()
    (home / "corpus.jsonl").write_bytes(corpus_file.read_bytes())
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    places = {"out_dir": "out", "data_path": "corpus.jsonl", "max_steps": 4}
    cfg = mm.TrainConfig(**{**settings, **places})
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        run = mm.train(cfg)
        print(run, repr(cfg), run.config, run.samples())
        mm.export(run, "exported")
        in_full = {"out_dir": "~/out", "data_path": f"{home}/corpus.jsonl"}
        fails = {**settings, **places, **in_full, "run_name": "fails"}
        failing = mm.TrainConfig(**fails)
        inject(monkeypatch, Fault("batch", "raise", str(tmp_path / "m"), step=2))
        with pytest.raises(mm.TrainingFailed):
            mm.train(failing)
        print(mm.doctor())
    written = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert len(written) > 20
    for secret in SECRETS.values():
        assert secret not in said.getvalue()
        assert not [path for path, text in written.items() if secret.encode() in text]
    home_text = str(home).encode()
    assert not [path for path, text in written.items() if home_text in text]
    # What is to be typed into a shell names folders in full, and nothing else does.
    told = [line for line in said.getvalue().splitlines() if str(home) in line]
    assert all(
        line.lstrip().startswith(TYPED) or "exported" in line for line in told
    ), told


@pytest.mark.fault("S02")
def test_ranks_listen_on_this_machine_only(settings: Settings) -> None:
    cfg = mm.TrainConfig(**{**settings, "num_processes": 2, "batch_size": 2})
    listening: set[str] = set()

    def look(history: History) -> None:
        for rank in range(2):
            record = RankRecord.read(history.path.with_name(f"rank{rank}.json"))
            assert record
            for one in psutil.net_connections("inet"):
                listens = one.pid == record.pid and one.status == psutil.CONN_LISTEN
                if listens and one.laddr:
                    listening.add(one.laddr.ip)

    mm.train(cfg, view=look)
    assert listening <= {"127.0.0.1", "::1"}
    assert listening, "they do meet by sockets"
