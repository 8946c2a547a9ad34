import dataclasses
import inspect
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import minimind_nb
from minimind_nb.cli import field_docstrings, main
from minimind_nb.config import SHAPE_FIELDS, STAGES, TrainConfig
from minimind_nb.diagnosis import Verdict
from minimind_nb.launch.outcome import TrainingFailed
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.storage.run_folder import RunLocked

# Frozen: scripts depend on these names.
OPTIONS = """
    data_path data_weights val_path tokenizer out_dir run_name resume allow_change init_from preset
    recipe
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size vocab_size max_position_embeddings rope_theta rms_norm_eps dropout
    qk_norm use_moe n_routed_experts num_experts_per_tok n_shared_experts aux_loss_alpha
    seq_aux norm_topk_prob inference_rope_scaling max_seq_len document_mask epochs
    global_batch batch_size accumulation_steps allow_smaller_batch learning_rate
    min_learning_rate
    optimizer schedule decay_fraction warmup_iters weight_decay beta1 beta2 grad_clip dpo_beta max_steps seed val_fraction eval_tokens
    eval_interval sample_prompts sample_tokens log_interval use_wandb wandb_project
    publish publish_minutes save_interval keep_checkpoints max_session_hours device num_processes dtype
    compile max_skipped_steps hang_timeout_seconds on_bad_line max_bad_fraction
""".split()
EVALUATION = (
    """
    data_path which tokenizer rope_scaling out_dir max_seq_len document_mask batch_size
    allow_smaller_batch eval_tokens device num_processes dtype hang_timeout_seconds on_bad_line
    max_bad_fraction
""".split()
    + SHAPE_FIELDS
)
LOADING = ["which", "tokenizer", "rope_scaling"]
CHAT = """
    temperature max_new_tokens system thinking top_p top_k repetition_penalty seed
""".split()
CHAT += [*LOADING, *SHAPE_FIELDS]
TRAINING = [*OPTIONS, "ddp", "pretrain_data_path", "sft_data_path"]
COMMANDS = {
    "pretrain": TRAINING,
    "sft": TRAINING,
    "dpo": TRAINING,
    "eval": EVALUATION,
    "chat": CHAT,
    "export": ["format", "dtype", *LOADING, *SHAPE_FIELDS],
    "tokenizer": ["data_path", "vocab_size", "special", "out_dir"],
    "plan": ["stage", "hours", *TRAINING],
    "preview": ["stage", "rows", *TRAINING],
    "report": ["stage", *TRAINING],
    "bench": ["stage", *TRAINING],
    "runs": ["out_dir"],
    "compare": ["file", "y", "x"],
    "doctor": ["out_dir"],
    "verify": [],
}
POSITIONALS = {
    "eval": ["SOURCE"],
    "chat": ["SOURCE", "TEXT"],
    "export": ["SOURCE", "FOLDER"],
    "verify": ["RUN_DIR"],
    "compare": ["RUNS"],
}
# What people who come from MiniMind type.
MINIMIND = """
    out_dir epochs batch_size learning_rate hidden_size num_hidden_layers max_seq_len
    use_moe accumulation_steps grad_clip warmup_iters save_interval log_interval
    use_wandb ddp data_path dtype
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
    monkeypatch.setattr(minimind_nb, "train", fake)
    return fake


def exit_code(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_options_are_the_settings_but_the_stage():
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert names == ["stage", *OPTIONS]
    assert set(MINIMIND) <= set(COMMANDS["pretrain"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_arguments_of_a_command_are_these(command, capsys):
    assert exit_code(command, "--help") == 0
    words, _, options = capsys.readouterr().out.partition("options:")
    found = [n.split()[0] for n in options.splitlines() if n.startswith("  --")]
    assert [name.removeprefix("--") for name in found] == COMMANDS[command]
    found = re.findall(r"^  ([A-Z_]+)", words, re.MULTILINE)
    assert found == POSITIONALS.get(command, [])


def test_the_help_is_the_settings_docstrings(capsys):
    helps = field_docstrings()
    assert list(helps) == ["stage", *OPTIONS]
    assert helps["grad_clip"] == "Largest norm of the gradient; 0 disables clipping."
    exit_code("pretrain", "--help")
    # argparse breaks lines at blanks and hyphens.
    shown = "".join(capsys.readouterr().out.split())
    for name in OPTIONS:
        assert "".join(helps[name].split()) in shown


@pytest.mark.parametrize(
    ("command", "name", "shown"),
    [
        ("sft", "max_seq_len", "--max_seq_len INT"),
        ("sft", "max_seq_len", "(default 1024)"),
        ("plan", "max_seq_len", "(default 512 or 1024, by stage)"),
        ("pretrain", "use_moe", "--use_moe [BOOL]"),
        ("pretrain", "use_moe", "(default False)"),
        ("pretrain", "data_path", "--data_path TEXT|LIST"),
        ("chat", "temperature", "--temperature FLOAT"),
        ("chat", "temperature", "(default 0.8)"),
    ],
)
def test_the_help_has_types_and_defaults(command, name, shown, capsys):
    exit_code(command, "--help")
    _, _, text = capsys.readouterr().out.partition(f"\n  --{name}")
    text, _, _ = f"--{name}{text}".partition("\n  --")
    assert shown in " ".join(text.split())


def test_the_help_of_a_chat_begins_with_what_one_sets_in_a_chat(capsys):
    exit_code("chat", "--help")
    shown = capsys.readouterr().out
    titles = re.findall(r"^(\w.*):$", shown, re.MULTILINE)
    assert titles[:3] == ["positional arguments", "options", "answers"]
    assert shown.index("\nanswers:") < shown.index("--temperature")
    assert shown.index("--max_new_tokens") < shown.index("\nweights:")
    assert titles[-1] == "shape, if preset or weights do not say it"


def test_the_main_help_lists_the_commands(capsys):
    assert exit_code("--help") == 0
    shown = capsys.readouterr().out
    listed = shown.partition("COMMAND\n")[2].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("    ")] == [
        *COMMANDS
    ]


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
    ("arguments", "settings"),
    [
        ("--use_wandb --epochs 2", {"use_wandb": True, "epochs": 2}),
        ("--epochs 2 --use_moe", {"use_moe": True, "epochs": 2}),
        ("--use_moe 0 --use_wandb 1", {"use_moe": False, "use_wandb": True}),
        ("--use_moe=false --use_wandb=false", {"use_moe": False, "use_wandb": False}),
    ],
)
def test_a_boolean_alone_is_true(arguments, settings, train):
    exit_code("pretrain", *arguments.split())
    assert train.configs == [TrainConfig(**settings)]


@pytest.mark.parametrize("given", [["--ddp"], ["--ddp", "true"], ["--ddp=0"]])
def test_ddp_is_taken_and_said_to_be_always_on(given, train, capsys):
    assert exit_code("sft", *given, "--epochs", "2") == 0
    assert train.configs == [TrainConfig(stage="sft", epochs=2)]
    assert capsys.readouterr().err == (
        "minimind-nb: --ddp is always on: one process per GPU, or --num_processes of "
        "them\n"
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--use_moe maybe", "argument --use_moe: 'maybe' is neither true nor false"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--epochs two", "argument --epochs: invalid int value: 'two'"),
        ("--dropout x", "argument --dropout: invalid float value: 'x'"),
        ("--hiden_size 512", "; did you mean --hidden_size?"),
        ("--hiden-size=512", "; did you mean --hidden_size?"),
        ("--epoch 1", "; did you mean --epochs?"),
        ("--logging_steps=10", "; did you mean --log_interval?"),
        ("--lr 1e-3", "; did you mean --learning_rate?"),
        ("--bf16", "; did you mean --dtype?"),
        ("--data-path a", "; did you mean --data_path?"),
        ("--qqq 1", "unknown option '--qqq'"),
        ("corpus.jsonl", "; name it, as in --data_path FILE"),
    ],
)
def test_an_option_that_cannot_be_is_explained(arguments, text, train, capsys):
    assert exit_code("pretrain", *arguments.split()) == 2
    assert text in capsys.readouterr().err
    assert not train.configs


def test_a_command_must_be_known(capsys):
    assert exit_code("pretrian") == 2
    text = "unknown command 'pretrian'; did you mean pretrain? (--help lists them)"
    assert text in capsys.readouterr().err
    assert exit_code("--mode", "tune") == 2
    assert "unknown command 'tune'" in capsys.readouterr().err


def test_without_a_command_the_commands_are_listed(capsys):
    assert exit_code() == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {command} " in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        (
            "--mode pretrain --epochs 5 --batch_size 32 --learning_rate 2e-4 "
            "--warmup_iters 2000 --accumulation_steps 1",
            {"epochs": 5, "learning_rate": 2e-4, "warmup_iters": 2000}
            | {"batch_size": 32, "accumulation_steps": 1},
        ),
        (
            "--mode pretrain --epochs 2 --batch_size 32 --learning_rate 5e-4 "
            "--hidden_size 512 --pretrain_data_path ./dataset/pretrain_hq.jsonl",
            {"epochs": 2, "batch_size": 32, "learning_rate": 5e-4, "hidden_size": 512}
            | {"data_path": "./dataset/pretrain_hq.jsonl"},
        ),
        (
            "--mode sft --epochs 2 --batch_size 16 --learning_rate 5e-7 "
            "--hidden_size 512 --sft_data_path ./dataset/sft_data.jsonl",
            {"stage": "sft", "epochs": 2, "batch_size": 16, "learning_rate": 5e-7}
            | {"hidden_size": 512, "data_path": "./dataset/sft_data.jsonl"},
        ),
        (
            "--mode pretrain --use_moe True --hidden_size 512",
            {"use_moe": True, "hidden_size": 512},
        ),
        ("--mode pretrain --ddp --batch_size 32", {"batch_size": 32}),
    ],
)
def test_the_founding_documents_lines_work(line, settings, train):
    assert exit_code(*line.split()) == 0
    assert train.configs == [TrainConfig(**settings)]


def test_the_data_of_the_other_stage_is_said_to_be_unused(train, capsys):
    both = "--mode sft --pretrain_data_path a.jsonl --sft_data_path b.jsonl"
    assert exit_code(*both.split()) == 0
    assert train.configs == [TrainConfig(stage="sft", data_path="b.jsonl")]
    assert capsys.readouterr().err == (
        "minimind-nb: --pretrain_data_path is for pretrain only, and unused by other "
        "commands\n"
    )


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


def test_an_export_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys):
    shape = MiniMindConfig(hidden_size=32, num_hidden_layers=1)
    torch.save(MiniMindForCausalLM(shape).state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr("minimind_nb.model.export.find_spec", lambda name: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for target, kind, words in (
        ("a.gguf", "gguf", 'which is not installed: pip install "minimind_nb[gguf]"'),
        ("full", "llama", "exists, and is not replaced: use another name"),
        ("new", "qwen3", '--format "qwen3" has no --qk_norm False'),
    ):
        given = (str(tmp_path / "a.pth"), str(tmp_path / target), "--format", kind)
        assert exit_code("export", *given) == 2
        said = capsys.readouterr().err
        assert said.startswith("minimind-nb: ") and words in said
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "full"}


def test_a_reader_who_has_seen_enough_is_no_error():
    code = (
        "import minimind_nb, minimind_nb.cli as cli\n"
        "minimind_nb.doctor = lambda: print('x' * 1_000_000, flush=True)\n"
        "cli.main(['doctor'])"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as doctor:
        assert doctor.stdout and doctor.stderr
        doctor.stdout.read(5)
        doctor.stdout.close()
        assert doctor.stderr.read() == ""
        assert doctor.wait(60) == 128 + signal.SIGPIPE


def test_an_error_of_ours_is_not_hidden(train):
    for error in (AssertionError, TypeError):
        train.ending = error("ours")
        with pytest.raises(error, match="ours"):
            main(["pretrain"])


def test_all_problems_of_a_configuration_are_shown(train, capsys):
    assert exit_code("pretrain", "--epochs", "0", "--dtype", "fp8") == 2
    assert capsys.readouterr().err == (
        "minimind-nb: the configuration has 2 problems:\n"
        "  - --epochs 0 must be at least 1\n"
        "  - --dtype 'fp8' is not one of float16, bfloat16, float32\n"
    )
    assert not train.configs


def test_advice_is_written_as_options(train, capsys):
    train.ending = RuntimeError('resume=False or allow_change=["seed", "beta1"]')
    assert exit_code("pretrain") == 2
    advice = """--resume False or --allow_change '["seed", "beta1"]'"""
    assert capsys.readouterr().err == f"minimind-nb: {advice}\n"


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
    assert "did you mean sft?" in capsys.readouterr().err


def question(number: int) -> dict[str, str]:
    return {"role": "user", "content": f"Is {number} a number?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_plan_names_a_file_that_is_not_there(capsys):
    assert exit_code("plan", "--data_path", "nowhere.jsonl") == 2
    assert "nowhere.jsonl does not exist" in capsys.readouterr().err


def test_doctor_prints_what_this_machine_is(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        minimind_nb, "doctor", lambda **named: asked.append(named) or "a table"
    )
    assert exit_code("doctor") == exit_code("doctor", "--out_dir", "runs") == 0
    assert asked == [{}, {"out_dir": "runs"}]
    assert capsys.readouterr().out == "a table\n" * 2


def keep(monkeypatch, name: str, answer: Any = None) -> list[dict[str, Any]]:
    """Replace a function that a command calls; returns what it is called with."""
    calls = []
    monkeypatch.setattr(
        minimind_nb, name, lambda **named: calls.append(named) or answer
    )
    return calls


def test_eval_prints_the_scores(monkeypatch, capsys):
    calls = keep(monkeypatch, "evaluate", "a table")
    given = "eval out/sft_512 --data_path chats.jsonl"
    more = " --which best --batch_size 4 --num_attention_heads 2 --document_mask"
    assert exit_code(*given.split()) == exit_code(*(given + more).split()) == 0
    settings = {"batch_size": 4, "num_attention_heads": 2, "document_mask": True}
    both = {"source": "out/sft_512", "data_path": "chats.jsonl"}
    assert calls == [both, {**both, "which": "best", **settings}]
    assert capsys.readouterr().out == "a table\n" * 2
    assert exit_code("eval", "out/sft_512") == 2
    assert "required: --data_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text", "settings"),
    [
        (["out/sft_512"], None, {}),
        (["out/sft_512", "--", "--hi"], "--hi", {}),
        (["out/sft_512", "你好"], "你好", {}),
        (["out/sft_512", "--seed", "3", "- so?"], "- so?", {"seed": 3}),
        (
            ["out/sft_512", "hi", "--system", "Be brief.", "--temperature", "0"],
            "hi",
            {"system": "Be brief.", "temperature": 0.0},
        ),
        (
            "out/sft_512 hi --top_p 0.5 --top_k 3 --repetition_penalty 1.1".split(),
            "hi",
            {"top_p": 0.5, "top_k": 3, "repetition_penalty": 1.1},
        ),
        (
            "out/sft_512 hi --max_new_tokens 9 --tokenizer t".split(),
            "hi",
            {"max_new_tokens": 9, "tokenizer": "t"},
        ),
        (["out/sft_512", "hi", "--rope_scaling", "4"], "hi", {"rope_scaling": 4.0}),
        (
            ["out/sft_512", "hi", "--rope_scaling", '{"factor": 4}'],
            "hi",
            {"rope_scaling": {"factor": 4}},
        ),
    ],
)
def test_chat_says_what_is_given(arguments, text, settings, monkeypatch):
    calls = keep(monkeypatch, "chat")
    assert exit_code("chat", *arguments) == 0
    said = {} if text is None else {"text": text}
    assert calls == [{"source": "out/sft_512", **said, **settings}]


def test_chat_loads_weights_of_a_named_shape(monkeypatch):
    loaded = keep(monkeypatch, "load", "a model")
    calls = keep(monkeypatch, "chat")
    shape = {"num_attention_heads": 2, "rope_scaling": 2.0, "tokenizer": "t"}
    named = " ".join(f"--{name} {value}" for name, value in shape.items())
    assert exit_code(*f"chat a.pth hi {named} --seed 3".split()) == 0
    assert loaded == [{"source": "a.pth", **shape}]
    assert calls == [{"source": "a model", "text": "hi", "seed": 3}]


def test_chat_without_a_terminal_first_names_a_missing_folder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert exit_code("chat", "out/nope") == 2
    assert "out/nope does not exist" in capsys.readouterr().err


def test_export_prints_where_it_wrote(monkeypatch, capsys):
    calls = keep(monkeypatch, "export", "hf")
    given = "export out/sft_512 hf --format llama --which best --dtype float16"
    assert exit_code(*given.split()) == 0
    named = {"format": "llama", "which": "best", "dtype": "float16"}
    assert calls == [{"source": "out/sft_512", "folder": "hf", **named}]
    assert capsys.readouterr().out == "hf\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("eval --data_path a", "arguments are required: SOURCE"),
        ("chat --seed 1", "arguments are required: SOURCE"),
        ("export out/sft_512", "arguments are required: FOLDER"),
        ("verify", "arguments are required: RUN_DIR"),
        ("verify out/a out/b", "unknown option 'out/b'"),
        ("chat out/a hi --tempreature 1", "; did you mean --temperature?"),
    ],
)
def test_a_word_too_few_or_too_many_is_explained(arguments, text, capsys):
    assert exit_code(*arguments.split()) == 2
    assert text in capsys.readouterr().err


def test_runs_and_preview_print_what_the_functions_return(monkeypatch, capsys):
    runs = keep(monkeypatch, "runs", "a table")
    preview = keep(monkeypatch, "preview", "two rows")
    assert exit_code("runs", "--out_dir", "runs") == 0
    given = ("preview", "--stage", "sft", "--rows", "3", "--data_path", "a.jsonl")
    assert exit_code(*given) == 0
    cfg = TrainConfig(stage="sft", data_path="a.jsonl")
    assert (runs, preview) == ([{"out_dir": "runs"}], [{"cfg": cfg, "rows": 3}])
    assert capsys.readouterr().out == "a table\ntwo rows\n"


def test_compare_writes_a_picture(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        row = {"kind": "train", "step": 1, "loss": 2.0, "samples": 8, "tokens": 90}
        text = json.dumps({**row, "seconds": 1.0, "learning_rate": 1e-3})
        (tmp_path / name / "metrics.jsonl").write_text(f"{text}\n")
    monkeypatch.chdir(tmp_path)
    assert exit_code("compare", "a", "b", "--y", "perplexity") == 0
    assert capsys.readouterr().out == "compare.png\n"
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("pretrain --data_path corpus.jsnl", "did you mean corpus.jsonl?"),
        ("--mode sft --sft_data_path nope", "nope does not exist, or is no file"),
        ("eval corpus.jsonl --data_path nope", "nope does not exist, or is no file"),
        ("chat nope hi", "nope does not exist: name a run folder, checkpoint"),
    ],
)
def test_a_wrong_path_is_refused_before_torch_is_loaded(line, text, corpus, tmp_path):
    code = (
        "import sys, minimind_nb.cli as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: print([n for n in ('torch', 'matplotlib') if n in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, *line.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert text in answer.stderr
    assert (answer.returncode, answer.stdout) == (2, "[]\n")


def test_verify_tells_by_its_exit_code(monkeypatch, capsys):
    rows = [["checkpoint", "step_00000002", "intact"]]
    found = [Verdict("a", rows), Verdict("b", [["checkpoint", "", "none yet"]])]
    asked = []
    monkeypatch.setattr(
        minimind_nb,
        "verify",
        lambda run_dir: asked.append(run_dir) or found[len(asked) - 1],
    )
    assert [exit_code("verify", "out/a"), exit_code("verify", "out/b")] == [0, 1]
    assert asked == ["out/a", "out/b"]
    assert capsys.readouterr().out.startswith("a\n  what        name           state\n")


def test_verify_names_the_runs_near_a_folder_that_is_none(tmp_path, capsys):
    run = tmp_path / "pretrain_32"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert exit_code("verify", str(tmp_path)) == 2
    assert f"Runs in {tmp_path}: {run}." in capsys.readouterr().err


KERNEL = ["ipykernel_launcher.py", "-f", "/run/kernel-xyz.json"]
KERNEL += ["--HistoryManager.hist_file=:memory:"]


def test_what_jupyter_started_the_kernel_with_disturbs_nobody(monkeypatch, train):
    monkeypatch.setattr(sys, "argv", KERNEL)
    assert TrainConfig(epochs=2).explicit() == {"epochs": 2}
    assert exit_code("pretrain", "--epochs", "2") == 0
    assert train.configs == [TrainConfig(epochs=2)]
    package = Path(inspect.getfile(minimind_nb)).parent
    for module in package.rglob("*.py"):
        as_imported = module.read_text(encoding="utf-8").partition("if __name__ ==")[0]
        assert "argv" not in as_imported, module


def test_tokenizer_trains_a_vocabulary(corpus, tmp_path, capsys):
    out = tmp_path / "vocabulary"
    both = f"{corpus}, {corpus}"
    options = ("--data_path", both, "--out_dir", str(out), "--vocab_size", "280")
    options += ("--special", "<think>,</think>")
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
    assert "; did you mean --epochs?" in answer.stderr
    assert answer.stderr.startswith("usage: minimind-nb plan ")
