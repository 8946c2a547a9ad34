import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

import minimind_nb
from minimind_nb import diagnosis
from minimind_nb.cli import field_docstrings, main
from minimind_nb.config import STAGES, TrainConfig
from minimind_nb.launch.verdict import TrainingFailed
from minimind_nb.storage.runs import RunLocked
from minimind_nb.training import api

# Frozen: a script that starts runs depends on these names.
OPTIONS = """
    data_path val_path tokenizer out_dir run_name resume allow_change init_from preset
    recipe
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size vocab_size max_position_embeddings rope_theta rms_norm_eps dropout
    qk_norm use_moe n_routed_experts num_experts_per_tok n_shared_experts aux_loss_alpha
    seq_aux norm_topk_prob inference_rope_scaling max_seq_len document_mask epochs
    batch_size accumulation_steps learning_rate min_learning_rate warmup_iters
    weight_decay beta1 beta2 grad_clip dpo_beta max_steps seed val_fraction eval_tokens
    eval_interval sample_prompts sample_tokens log_interval save_interval keep_checkpoints max_session_hours device
    num_processes dtype max_skipped_steps hang_timeout_seconds on_bad_line
    max_bad_fraction
""".split()


@dataclasses.dataclass
class FakeRun:
    status: str = "finished"


class FakeTrain:
    """Stands for `train`: keeps the configuration, and ends as it was told."""

    def __init__(self) -> None:
        self.configs: list[TrainConfig] = []
        self.ending: str | BaseException = "finished"

    def __call__(self, cfg: TrainConfig) -> FakeRun:
        self.configs.append(cfg)
        if isinstance(self.ending, BaseException):
            raise self.ending
        return FakeRun(self.ending)


@pytest.fixture
def train(monkeypatch) -> FakeTrain:
    fake = FakeTrain()
    monkeypatch.setattr(api, "train", fake)
    return fake


def exit_code(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_options_are_the_settings_but_the_stage(capsys):
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert names == ["stage", *OPTIONS]
    for command in ("pretrain", "sft", "dpo", "plan"):
        assert exit_code(command, "--help") == 0
        shown = capsys.readouterr().out.partition("options:")[2].split()
        found = [word[2:] for word in shown if word[2:] in names]
        assert found == [*OPTIONS, *(["stage"] if command == "plan" else [])]


def test_the_help_is_the_settings_docstrings(capsys):
    helps = field_docstrings()
    assert list(helps) == ["stage", *OPTIONS]
    assert helps["grad_clip"] == "Largest norm of the gradient; 0 never clips."
    exit_code("pretrain", "--help")
    # argparse breaks lines at blanks and hyphens.
    shown = "".join(capsys.readouterr().out.split())
    for name in OPTIONS:
        assert "".join(helps[name].split()) in shown


def test_the_main_help_lists_the_commands(capsys):
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    for command in ("pretrain", "sft", "dpo", "plan", "tokenizer", "doctor"):
        assert command in shown


def test_the_version_is_the_packages(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"{minimind_nb.__version__}\n"


def test_options_become_the_configuration(train):
    code = exit_code(
        *"pretrain --data_path demo --epochs 3 --learning_rate 1e-3 --use_moe true "
        "--seed=7 --allow_change batch_size,dtype --resume runs/a".split()
    )
    assert code == 0
    assert train.configs == [
        TrainConfig(
            data_path="demo",
            epochs=3,
            learning_rate=1e-3,
            use_moe=True,
            seed=7,
            allow_change=("batch_size", "dtype"),
            resume="runs/a",
        )
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_given_is_left_to_the_defaults(stage, train):
    exit_code(stage)
    assert train.configs == [TrainConfig(stage=stage)]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("Once upon, 猫", ("Once upon", "猫")),
        ('["a, b", "c"]', ("a, b", "c")),
        ('["a, b"]', ("a, b",)),
    ],
)
def test_texts_with_commas_are_given_as_a_list(text, prompts, train):
    exit_code("sft", "--sample_prompts", text, "--init_from", "runs/a")
    expected = TrainConfig(stage="sft", sample_prompts=prompts, init_from="runs/a")
    assert train.configs == [expected]


def test_a_list_that_is_none_is_explained(train, capsys):
    assert exit_code("sft", "--sample_prompts", '["a, b') == 2
    assert "argument --sample_prompts: invalid" in capsys.readouterr().err
    assert exit_code("sft", "--sample_prompts", "[1, 2]") == 2
    assert "expected tuple of strings or None" in capsys.readouterr().err
    assert not train.configs


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("yes", True), ("false", False), ("OFF", False)],
)
def test_booleans_are_real_booleans(text, value, train):
    exit_code("pretrain", "--qk_norm", text, "--resume", text)
    (cfg,) = train.configs
    assert (cfg.qk_norm, cfg.resume) == (value, value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--use_moe maybe", "argument --use_moe: 'maybe' is neither true nor false"),
        ("--use_moe", "argument --use_moe: expected one argument"),
        ("--epochs two", "argument --epochs: invalid int value: 'two'"),
        ("--dropout x", "argument --dropout: invalid float value: 'x'"),
        ("--hiden_size 512", "is no option; did you mean --hidden_size?"),
        ("--hiden-size=512", "is no option; did you mean --hidden_size?"),
        ("--epoch 1", "is no option; did you mean --epochs?"),
        ("--qqq 1", "qqq' is no option"),
        ("corpus.jsonl", "'corpus.jsonl' is no option"),
    ],
)
def test_an_option_that_cannot_be_is_explained(arguments, text, train, capsys):
    assert exit_code("pretrain", *arguments.split()) == 2
    assert text in capsys.readouterr().err
    assert not train.configs


def test_a_command_must_be_named_and_known(capsys):
    assert exit_code() == 2
    assert "required: COMMAND" in capsys.readouterr().err
    assert exit_code("pretrian") == 2
    assert "invalid choice: 'pretrian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("finished", 0),
        ("time_budget", 0),
        ("interrupted", 130),
        ("terminated", 143),
        (KeyboardInterrupt(), 130),
        (TrainingFailed("rank 1 failed", 1, "training"), 1),
        (RunLocked("in use"), 2),
        (FileNotFoundError("corpus.jsonl does not exist"), 2),
        (OSError("the disk is full"), 2),
    ],
)
def test_the_exit_code_tells_how_a_run_ended(ending, code, train, capsys):
    train.ending = ending
    assert exit_code("pretrain") == code
    shown = capsys.readouterr()
    if isinstance(ending, Exception):
        assert shown.err == f"minimind-nb: {ending}\n"
    elif isinstance(ending, str):
        assert shown.out == f"FakeRun(status='{ending}')\n"


def test_an_error_of_ours_is_not_hidden(train):
    for error in (AssertionError, TypeError):
        train.ending = error("ours")
        with pytest.raises(error, match="ours"):
            main(["pretrain"])


def test_all_problems_of_a_configuration_are_shown(train, capsys):
    assert exit_code("pretrain", "--epochs", "0", "--dtype", "fp8") == 2
    assert capsys.readouterr().err == (
        "minimind-nb: the configuration has 2 problems:\n"
        "  - dtype='fp8' is not one of float16, bfloat16, float32\n"
        "  - epochs=0 is too small, at least 1 is needed\n"
    )
    assert not train.configs


@pytest.fixture
def corpus(tmp_path) -> str:
    path = tmp_path / "corpus.jsonl"
    rows = ({"text": f"The cat saw {n} birds and {7 * n} mice."} for n in range(60))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_plan_prints_what_a_run_would_take(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    out = str(tmp_path / "out")
    options = ("--preset", "demo", "--recipe", "demo", "--out_dir", out)
    assert exit_code("plan", "--data_path", corpus, *options) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("pretrain_128 on ")
    assert "1,606,784" in shown and "text tokens" in shown


def test_plan_takes_a_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    path = tmp_path / "chats.jsonl"
    rows = (
        {
            "chosen": [question(n), answer("yes")],
            "rejected": [question(n), answer("no")],
        }
        for n in range(60)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "out")
    options = ("--preset", "demo", "--recipe", "demo-dpo", "--out_dir", out)
    new = ("--stage", "dpo", "--init_from", "none", "--data_path", str(path))
    assert exit_code("plan", *new, *options) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("dpo_128 on ")
    assert "8 pairs = batch_size 8" in shown
    assert exit_code("plan", "--stage", "spt") == 2
    assert "invalid choice: 'spt'" in capsys.readouterr().err


def question(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"Is {number} a number?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_plan_names_a_file_that_is_not_there(capsys):
    assert exit_code("plan", "--data_path", "nowhere.jsonl") == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_doctor_prints_what_this_machine_is(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(diagnosis, "doctor", lambda out: asked.append(out) or "a table")
    assert exit_code("doctor") == exit_code("doctor", "--out_dir", "runs") == 0
    assert asked == ["out", "runs"]
    assert capsys.readouterr().out == "a table\n" * 2


def test_tokenizer_trains_a_vocabulary(corpus, tmp_path, capsys):
    out = tmp_path / "vocabulary"
    both = f"{corpus}, {corpus}"
    options = ("--data_path", both, "--out_dir", str(out), "--vocab_size", "280")
    assert exit_code("tokenizer", *options) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "tokenizer.json").is_file()
    assert exit_code("tokenizer", *options) == 2
    assert "holds a tokenizer.json already" in capsys.readouterr().err


def test_the_package_runs_as_a_command():
    command = [sys.executable, "-m", "minimind_nb"]
    answer = subprocess.run(
        [*command, "plan", "--epoch", "1"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert "is no option; did you mean --epochs?" in answer.stderr
    assert answer.stderr.startswith("usage: minimind-nb plan ")
