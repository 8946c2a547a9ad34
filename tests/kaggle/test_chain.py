"""The chain of sessions, with a stand-in for Kaggle that keeps versions and outputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chain_state
import fetching
import kaggle_command
import kernels
import pytest
from support import kaggle_stand_in
from support.kaggle import metadata

ROOT = Path(__file__).parents[2]
TIME_BUDGET = {"states": "QRC", "gain": 10, "status": "time_budget"}
FINISHED = {"states": "RC", "gain": 10, "status": "finished"}


@pytest.fixture
def site(tmp_path, monkeypatch, built):
    """Kaggle, to which these sessions will come; gives a function that runs a chain."""
    command = tmp_path / "bin" / "kaggle"
    command.parent.mkdir()
    code = Path(kaggle_stand_in.__file__).read_text()
    command.write_text(f"#!{sys.executable} -IS\n{code}")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("KAGGLE_STAND_IN", str(tmp_path))

    def call(words):  # without a process, which only the test of a kill needs
        said = kaggle_stand_in.call(tmp_path, words[1:])
        return subprocess.CompletedProcess(words, 0, said)

    monkeypatch.setattr(kaggle_command, "run", call)
    copy = lambda options: shutil.copytree(built, options.out, dirs_exist_ok=True)  # noqa: E731
    monkeypatch.setattr(chain_state, "run_build", copy)
    return Site(tmp_path)


class Site:
    def __init__(self, folder):
        self.folder = folder
        self.change(kernels={}, sessions=[], quota=[30], unreadable=[])

    def change(self, **values):
        file = self.folder / "site.json"
        now = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(now | values))

    def arguments(self, *more):
        out = ["--out", str(self.folder / "out"), "--user", "ann"]
        return ["run", *out, "--poll", "0", "--wait", "0", *more]

    def run(self, *sessions, arguments=(), **values):
        """Run a chain; gives what it called, without datasets and states."""
        self.change(sessions=sessions, **values)
        kernels.main(self.arguments(*arguments))
        return self.pushes()

    def pushes(self):
        calls = (self.folder / "calls.txt").read_text().splitlines()
        assert not [line for line in calls if "SECOND" in line]
        return [Path(c.split()[3]).name for c in calls if c.startswith("kernels push")]

    def state(self):
        return json.loads((self.folder / "out" / "chain.json").read_text())

    def next(self, slug):
        folder = self.folder / "out" / "chain" / "next" / slug
        values = metadata(folder)
        return values, (folder / values["code_file"]).read_text()


A, B, C = "minimind-pretrain", "minimind-pretrain-b", "minimind-pretrain-c"
NOT_STARTED = {"refused": "Kernel push error: no"}


def test_a_run_is_resumed_in_turns_until_it_is_finished(site, capsys):
    assert site.run(TIME_BUDGET, TIME_BUDGET, FINISHED) == [A, B, A]
    told = capsys.readouterr().out
    assert f"{B} version 1: RUNNING, 0.0 of 30 h used" in told
    assert "pretrain is finished at step 30" in told
    assert f"kaggle kernels output ann/{A} -p" in told
    values, notebook = site.next(A)
    assert values["kernel_sources"] == [f"ann/{A}", f"ann/{B}"]
    assert f"resume = '{B}/out/pretrain_32'" in notebook
    assert "min(max_session_hours or 11.5, 29.80)" in notebook
    kernels.main(site.arguments())
    assert len(site.pushes()) == 3


def test_fine_tuning_starts_from_the_last_output_of_pretraining(site):
    arguments = ("--notebook", "sft", "pretrain")
    pushed = site.run(TIME_BUDGET, FINISHED, FINISHED, arguments=arguments)
    assert pushed == [A, B, "minimind-sft"]
    values, notebook = site.next("minimind-sft")
    assert values["kernel_sources"] == [f"ann/{B}"]
    assert f"init_from = init_from or '{B}/out/pretrain_32'" in notebook


def test_a_session_that_is_lost_costs_its_own_hours_only(site, capsys):
    lost = {"states": "RX", "gain": 10, "lost": True, "status": "running"}
    empty = {"states": "RE", "gain": 10, "empty_mount": True}
    partial = lost | {"lost": False}
    pushed = site.run(TIME_BUDGET, lost, empty, TIME_BUDGET, partial, FINISHED)
    assert pushed == [A, B, B, B, A, C]  # not over the partial output
    told = capsys.readouterr().out
    assert f"{B} version 1: CANCEL_ACKNOWLEDGED" in told and "no run in the" in told
    assert "the run is killed, saved at step 30" in told
    assert "pretrain is finished at step 40" in told


def test_an_empty_mount_is_an_error_three_times_at_most(site):
    empty = {"states": "RE", "empty_mount": True}
    with pytest.raises(SystemExit, match=f"{B} ended ERROR: 3 versions without progr"):
        site.run(TIME_BUDGET, empty, empty, empty)
    assert site.run(FINISHED) == [A, B, B, B, B]


def test_what_a_person_must_see_ends_the_chain(site):
    failed = {"states": "RE", "gain": 5, "status": "failed"}
    with pytest.raises(SystemExit, match="ended in an error of its training: see its"):
        site.run(failed)
    said = (
        "The following are not valid dataset sources …\nKernel version 1 successfully"
    )
    lacking = {"refused": f"{said} pushed."}
    with pytest.raises(SystemExit, match="the session that has started lacks them"):
        site.run(lacking)
    with pytest.raises(SystemExit, match="no rights there: is --user the name"):
        site.run({"refused": "403 Client Error: Forbidden for url: …"})
    with pytest.raises(SystemExit, match="no valid key: create a token"):
        site.run({"refused": "Authentication required to call the Kaggle API."})
    with pytest.raises(SystemExit, match="a chain of other parameters: leave out -p"):
        kernels.main(site.arguments("-p", "epochs", "2"))
    with pytest.raises(SystemExit, match="0.0 of 0.4 h are used: .* a larger --hours"):
        kernels.main(site.arguments("--hours", "0.4"))


def test_a_kill_while_it_pushes_starts_no_second_session(site):
    with pytest.raises(SystemExit, match="Kernel push error: no"):
        site.run({"refused": "Kernel push error: no"})
    site.change(sessions=[TIME_BUDGET | {"states": "QRRRC", "kill": True}, FINISHED])
    command = [sys.executable, ROOT / "kaggle" / "kernels.py", *site.arguments()]
    killed = subprocess.run(command, timeout=60, check=False)
    assert killed.returncode < 0 and site.state()["session"]["version"] is None
    kernels.main(site.arguments())
    assert site.pushes() == [A, A, B]


def test_a_session_that_was_started_by_hand_is_waited_for(site, capsys):
    running = {"states": list("RRRRC"), "number": 7, "run": None, "late": 0}
    site.run(FINISHED, kernels={f"ann/{B}": running})
    assert f"ann/{B} is RUNNING already: waiting" in capsys.readouterr().out
    assert site.pushes() == [A]


def test_a_push_of_which_nothing_is_known_is_looked_for(site, capsys):
    site.run({"refused": "ConnectionError: Max retries exceeded"}, FINISHED)
    assert "looking whether it started" in capsys.readouterr().out
    assert site.pushes() == [A, A]


def test_late_output_and_unreadable_answers_end_nothing(site, monkeypatch, capsys):
    odd = ["502 Server Error", "", "nonsense"]
    late = TIME_BUDGET | {"late": 4}
    assert site.run(late, FINISHED, unreadable=odd, quota=["?"]) == [A, B]
    told = capsys.readouterr().out
    assert "is unknown (kaggle said '502 Server Error')" in told
    assert "nothing is concluded, asking" in told
    assert "names no GPU hours: relying on --hours" in told
    monkeypatch.setattr(fetching, "UNREADABLE", 2)
    site.change(unreadable=["?"] * 4)
    (site.folder / "out" / "chain.json").unlink()
    with pytest.raises(SystemExit, match="the state of ann/.* is unknown"):
        kernels.main(site.arguments())


def test_a_chain_waits_for_quota(site, capsys):
    with pytest.raises(SystemExit, match="used up .0.1 h left, new hours at 2026-12"):
        site.run(quota=[0.1], arguments=["--no-wait"])
    used_up = {"refused": "Kernel push error: Maximum weekly GPU quota exceeded"}
    assert site.run(used_up, FINISHED, quota=[0.1, 7]) == [A, A]
    assert "asking again in 0 min" in capsys.readouterr().out
    assert "max_session_hours or 11.5, 6.80)" in site.next(A)[1]


def test_two_chains_do_not_share_a_folder(site):
    (site.folder / "out").mkdir()
    with chain_state.hold_lock(site.folder / "out" / ".chain.lock"):
        with pytest.raises(SystemExit, match=f"process {os.getpid()} runs a chain in"):
            site.run()


def test_a_dry_run_calls_nothing_and_writes_the_folder(site, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    kernels.main(site.arguments("--dry-run"))
    told = capsys.readouterr().out
    assert (
        f"would run: kaggle kernels push -p {site.folder}/out/chain/next/{A} " in told
    )
    assert site.next(A)[0]["kernel_sources"] == []
    assert not (site.folder / "out" / "chain.json").exists()


def test_by_hand_a_version_is_waited_for_fetched_and_continued(site, built, capsys):
    out = ["--out", str(site.folder / "hand"), "--notebook", "pretrain"]
    shutil.copytree(built, site.folder / "hand")
    site.change(sessions=[TIME_BUDGET, FINISHED])
    kernels.main(["push", "--kernels-only", *out])
    with pytest.raises(SystemExit, match="is QUEUED: kernels.py wait, then continue"):
        kernels.main(["continue", *out])
    for command in ("wait --poll 0", "fetch", "continue", "wait --poll 0", "continue"):
        kernels.main([*command.split(), *out])
    told = capsys.readouterr().out
    assert "pretrain_32: time_budget, saved at step 10" in told
    assert f"ann/{A} is finished at step 20: nothing was pushed" in told
    assert site.pushes() == ["pretrain", "pretrain"]


@pytest.mark.parametrize(
    "useless", [("--hours", "0"), ("--hours", "nan"), ("--poll=-1",)]
)
def test_numbers_that_mean_nothing_are_refused_first(site, useless):
    with pytest.raises(
        SystemExit, match="is no number of at least .* .--hours, --poll"
    ):
        kernels.main(site.arguments(*useless))
    assert not (site.folder / "calls.txt").exists()


def test_a_network_error_is_no_missing_notebook(site):
    address = "HTTPSConnection object at 0x7f2f404bd910>: Failed to resolve"
    site.change(unreadable=[f"Max retries exceeded (<{address})"] * 2)
    with pytest.raises(kaggle_command.Unreadable, match="0x7f2f404bd910"):
        kaggle_command.find_state(f"ann/{A}")


def test_an_output_that_cannot_be_read_is_fetched_until_it_can(site, monkeypatch):
    answers, real = (
        ["Read timed out.", "", "config", "rank0"] * 4,
        kaggle_stand_in.output,
    )

    def output(state, kernel, target):
        odd = answers.pop(0) if answers else "whole"
        said = real(state, kernel, target)
        for file in target.rglob(f"{odd}.json"):
            file.unlink()
        return odd if odd in ("Read timed out.", "") else said

    monkeypatch.setattr(kaggle_stand_in, "output", output)
    assert site.run(TIME_BUDGET, FINISHED) == [A, B]
    answers += [""] * 9
    monkeypatch.setattr(fetching, "UNREADABLE", 2)
    shutil.rmtree(site.folder / "out")
    site.change(kernels={})
    with pytest.raises(SystemExit, match=f"output of ann/{A} is late or incomplete"):
        site.run(TIME_BUDGET, FINISHED)
    assert site.pushes() == [A, B, A]


def test_a_partial_output_of_the_first_version_is_never_pushed_over(site):
    partial = {"states": "RE", "gain": 5, "status": "time_budget"}
    empty = {"states": "RE", "empty_mount": True}
    assert site.run(partial, empty, FINISHED) == [A, B, B]
    assert site.state()["runs"]["pretrain"]["step"] == 15


def test_a_notebook_that_lost_the_run_is_not_attached(site):
    with pytest.raises(SystemExit, match="Kernel push error"):
        site.run(TIME_BUDGET, NOT_STARTED)
    kernels_now = json.loads((site.folder / "site.json").read_text())["kernels"]
    browser = {
        "identity": "other",
        "step": 3,
        "stage": "pretrain",
        "status": "finished",
    }
    kernels_now[f"ann/{A}"] |= {"number": 2, "run": browser}
    with pytest.raises(
        SystemExit, match=f"{A} no longer holds the run at step 10, since"
    ):
        site.run(FINISHED, kernels=kernels_now)
    assert site.run(FINISHED, arguments=["--adopt"]) == [A, B, B]
    assert site.state()["runs"]["pretrain"]["identity"] == "other"


def test_a_new_chain_resumes_a_run_that_is_there_only_if_asked(site):
    site.run(FINISHED)
    longer = ["-p", "epochs", "2"]
    with pytest.raises(
        SystemExit, match="other parameters: .* add --adopt to train its"
    ):
        kernels.main(site.arguments(*longer))
    (site.folder / "out" / "chain.json").write_text("{}")
    with pytest.raises(SystemExit, match="chain.json is damaged: delete it, then the"):
        kernels.main(site.arguments())
    (site.folder / "out" / "chain.json").unlink()
    with pytest.raises(
        SystemExit, match=f"{A} has a run at step 10: --adopt resumes it"
    ):
        kernels.main(site.arguments())
    assert site.run(FINISHED, arguments=[*longer, "--adopt"]) == [A, B]
    assert site.state()["runs"]["pretrain"]["step"] == 20


def test_a_push_with_an_unknown_error_may_have_started(site, monkeypatch):
    real = kaggle_stand_in.push

    def push(state, folder):
        real(state, folder)
        return "Expecting value: line 1 column 1 (char 0)"

    monkeypatch.setattr(kaggle_stand_in, "push", push)
    assert site.run(TIME_BUDGET, FINISHED) == [A, B]


def test_a_pushed_notebook_is_never_taken_for_a_missing_one(site):
    missing = ["404 Client Error: Not Found"] * 9
    with pytest.raises(SystemExit, match="Kernel push error"):
        site.run(TIME_BUDGET, NOT_STARTED)
    kernels_now = json.loads((site.folder / "site.json").read_text())["kernels"]
    kernels_now[f"ann/{A}"]["states"] = list("RRRRC")
    assert site.run(FINISHED, unreadable=missing, kernels=kernels_now) == [A, B, B]


def test_only_the_quota_of_the_gpu_is_waited_for(site):
    full = {"refused": "Kernel push error: Private notebook storage quota exceeded"}
    with pytest.raises(SystemExit, match="storage quota exceeded"):
        site.run(full)


def test_a_state_of_another_name_is_waited_for(site, monkeypatch):
    monkeypatch.setitem(kaggle_stand_in.NAMES, "P", "PENDING")
    monkeypatch.setitem(FINISHED, "states", "PPRC")
    assert site.run(FINISHED) == [A]
