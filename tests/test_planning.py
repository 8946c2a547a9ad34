import json
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
from support.runs import train_here

from minimind_nb import cli, hardware, planning
from minimind_nb.config import TrainConfig, flops_per_token, resolve
from minimind_nb.hardware import Gpu, Hardware
from minimind_nb.monitor.metrics import MetricsLog
from minimind_nb.planning import plan, plan_stages
from minimind_nb.session import Session
from minimind_nb.training import machine, preparation, run_plan

CPU = Hardware((), cpu_cores=2, cpu_native_bf16=False, memory_gib=8.0)


def machine_of(*gpus: Gpu) -> Hardware:
    return Hardware(gpus, cpu_cores=4, cpu_native_bf16=False, memory_gib=30.0)


@pytest.fixture
def settings(tmp_path, monkeypatch) -> dict[str, Any]:
    """A demo run on sixty short documents, on a CPU of known speed."""
    rows = ({"text": f"The cat saw {n} birds and {7 * n} mice."} for n in range(60))
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for module in (planning, machine, preparation):
        monkeypatch.setattr(module, "detect_hardware", lambda: CPU)
    monkeypatch.setattr(run_plan, "current_session", lambda: Session("plain"))
    monkeypatch.setattr(hardware, "_PRODUCT_SECONDS", 0.001)
    return {
        "data_path": path,
        "out_dir": tmp_path / "out",
        "preset": "demo",
        "recipe": "demo",
    }


def test_a_plan_counts_without_starting_a_run(settings, tmp_path):
    facts = plan(TrainConfig(**settings, batch_size=2, epochs=3, max_seq_len=64))
    assert facts.title == "pretrain_128 on 2 CPU cores, 8 GiB of memory"
    assert facts["parameters"] == "1,606,784"
    assert facts["precision"] == "float32 on 1 × cpu"
    documents = re.fullmatch(r"(\d+) to train on, (\d+) held out", facts["documents"])
    assert documents and sum(map(int, documents.groups())) == 60
    epoch = re.fullmatch(
        r"([\d,]+) text tokens in (\d+) rows of 64 \(fill (0\.\d{3})\)",
        facts["an epoch"],
    )
    assert epoch
    tokens, rows = (int(text.replace(",", "")) for text in epoch.groups()[:2])
    assert tokens / (rows * 64) == pytest.approx(float(epoch[3]), abs=1e-3)
    assert facts["global batch"] == (
        "2 rows = batch_size 2 × accumulation_steps 1 × num_processes 1"
    )
    steps = -(-3 * rows // 2)
    assert (
        facts["steps"] == f"{steps:,} optimizer steps, about {3 * tokens:,} text tokens"
    )
    assert facts["checkpoints"] == "0.02 GiB each, 2 to 4 kept"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cache"]


def test_max_steps_caps_the_plan(settings):
    facts = plan(TrainConfig(**settings, batch_size=1, max_seq_len=64, max_steps=2))
    steps, tokens = re.findall(r"\d+", facts["steps"])
    assert steps == "2"
    assert 0 < int(tokens) <= 2 * 64


def test_a_mixture_says_what_a_token_uses(settings):
    facts = plan(TrainConfig(**settings, use_moe=True))
    assert facts.title.startswith("pretrain_128_moe on ")
    assert facts["parameters"] == "3,968,128, 2,788,480 active for a token"


def test_memory_grows_with_the_batch(settings):
    def gib(batch_size: int) -> float:
        facts = plan(TrainConfig(**settings, batch_size=batch_size))
        found = re.search(r"with ([\d.]+) GiB of memory, of 8\.", facts["in short"])
        assert found
        return float(found[1])

    assert gib(16) < gib(64) < 5 * gib(16)


def test_the_speed_of_an_earlier_run_is_believed(settings):
    own = {**settings, "preset": None, "hidden_size": 32, "num_hidden_layers": 1}
    own |= {"max_steps": 4, "max_seq_len": 64, "sample_tokens": 0}
    assert "(expected)" in plan(TrainConfig(**own))["in short"]
    _, run = train_here(own, stop_at=3)
    with MetricsLog(run.metrics_file) as log:
        log.append("train", step=3, tokens_per_second=0.001)
    short = plan(TrainConfig(**own))["in short"]
    assert re.search(
        r"about \d+ hours, at 0 text tokens/s \(as the existing run\),", short
    )


def test_a_plan_names_the_run_that_exists_and_refuses_other_data(settings, tmp_path):
    own = {**settings, "preset": None, "hidden_size": 32, "num_hidden_layers": 1}
    own |= {"max_steps": 2, "max_seq_len": 64, "sample_tokens": 0}
    _, run = train_here(own)
    facts = plan(TrainConfig(**own))
    assert facts["existing run"] == f"{run.root}, finished at step 2 of 2"
    assert "in short" not in facts
    with settings["data_path"].open("a") as file:
        file.write('{"text": "More."}\n')
    with pytest.raises(RuntimeError, match="content of data_path"):
        plan(TrainConfig(**own))


def test_a_known_gpus_speed_is_expected(settings, monkeypatch):
    t4 = Gpu("Tesla T4", (7, 5), 14.6)
    monkeypatch.setattr(planning, "detect_hardware", lambda: machine_of(t4, t4))
    facts = plan(TrainConfig(**settings))
    assert facts["precision"] == "float16 on 2 × cuda"
    # A card takes 10,427,136 FLOP a token at 24 TFLOP/s, and 9,400 x 512 + 880 x 6400
    # at 3; both make Muon's update, 31 x 128 x 787,584 a step of 4 x 256 tokens.
    token = (10_427_136 / 24e12 + 10_444_800 / 3e12) / 2
    speed = 1 / (token + 31 * 128 * 787_584 / 24e12 / 1024)
    assert f"at {speed:,.0f} text tokens/s" in facts["in short"]


def test_validations_and_start_up_take_time(settings, monkeypatch):
    monkeypatch.setattr(hardware, "measure_products", lambda *_: 1e12)
    own = {**settings, "eval_interval": 1, "sample_tokens": 0, "max_seq_len": 32}
    cfg = TrainConfig(**{**own, "max_steps": 3})
    estimate = planning.Estimate(planning.draft(cfg), CPU)
    assert (estimate.steps, estimate.validations) == (3, 4)
    tokens = estimate.tokens + 4 * estimate.held_out / 3
    assert estimate.seconds() == pytest.approx(8 + tokens / estimate.speed)
    longer = planning.Estimate(planning.draft(replace(cfg, sample_tokens=9)), CPU)
    assert longer.seconds() == pytest.approx(estimate.seconds() + 4 * 0.5)


def test_reduced_precision_has_its_own_rate(settings, monkeypatch):
    rates = {"float32": 1e11, "bfloat16": 4e11}
    monkeypatch.setattr(hardware, "measure_products", lambda _, kind, *__: rates[kind])
    fp32, bf16 = (
        planning.expected_speed(resolve(TrainConfig(preset="demo", dtype=kind)), CPU)
        for kind in rates
    )
    assert 1.3 * fp32 < bf16 < 4 * fp32


def test_a_plan_of_a_stopped_run_is_of_what_is_left(settings):
    own = {**settings, "preset": None, "hidden_size": 32, "num_hidden_layers": 1}
    own |= {"max_steps": 4, "max_seq_len": 64, "sample_tokens": 0}
    whole = plan(TrainConfig(**own))
    train_here(own, stop_at=3)
    facts = plan(TrainConfig(**own))
    assert facts["steps"].startswith("1 of 4 optimizer steps left, about ")
    learns = [each["in short"].partition(". ")[2] for each in (facts, whole)]
    assert learns[0] == learns[1]


def test_a_plan_needs_no_out_dir(settings, tmp_path, monkeypatch):
    kaggle = Session("kaggle", scratch=tmp_path / "temp")
    monkeypatch.setattr(run_plan, "current_session", lambda: kaggle)
    assert " and fits this machine, " in plan(TrainConfig(**settings))["in short"]
    assert not settings["out_dir"].exists()


def test_a_plan_ends_in_whether_it_fits_and_learns(settings, monkeypatch):
    cfg = TrainConfig(**settings, max_seq_len=64, batch_size=1, epochs=50)
    short = plan(cfg)["in short"]
    assert list(plan(cfg))[-1] == "in short"
    assert re.fullmatch(
        r"This run takes about \d+ (second|minute)s, at [\d,]+ text tokens/s \(expected\), "
        r"and fits this machine, with \d\.\d GiB of memory, of 8\. It sees 0\.0\d+ "
        "tokens a parameter; 20 are best: expect fluent nonsense, or raise epochs or take a "
        r"smaller preset\.",
        short,
    )
    few = plan(replace(cfg, max_steps=2))["in short"]
    assert few.endswith("of 8. 2 steps teach it hardly anything: raise max_steps.")
    large = plan(replace(cfg, batch_size=4096, max_seq_len=1024))["in short"]
    assert "GiB of memory, of 8: lower batch_size. " in large
    over = plan(replace(cfg, max_session_hours=1e-9))["in short"]
    assert "outlasts the session: it saves, and the same call resumes" in over
    monkeypatch.setattr(machine, "free_bytes", lambda _: 0)
    assert " does not fit the disk: " in plan(cfg)["in short"]
    assert "Free some space there. It sees" in plan(cfg)["in short"]
    t4 = Gpu("no figure", (7, 5), 14.6)
    monkeypatch.setattr(planning, "detect_hardware", lambda: machine_of(t4))
    monkeypatch.setattr(machine, "free_bytes", lambda _: 1 << 50)
    assert plan(cfg)["in short"].startswith("This run has a speed known after")


def test_the_demo_is_told_apart_from_other_texts(settings):
    demo = TrainConfig(**{**settings, "data_path": "demo"})
    short = plan(demo)["in short"]
    assert short.endswith("of 8. It learns what is in its data, and nothing else.")


SMALL, MEDIUM, LARGE = 1_606_784, 25_829_888, 104_034_816


@pytest.mark.parametrize(
    ("speeds", "hours", "corpus", "chosen"),
    [
        # Two T4 and a large corpus, then a small one, then little time.
        ((300_000, 60_000, 14_000), 40, 1e10, "large"),
        ((300_000, 60_000, 14_000), 10, 1e10, "medium"),
        ((300_000, 60_000, 14_000), 10, 3e7, "small"),
        # Two cores: what comes nearest if none gets enough.
        ((9_000, 600, 120), 1, 1e10, "small"),
        ((9_000, 600, 120), 0.1, 1e10, "small"),
    ],
)
def test_the_largest_shape_that_gets_enough_tokens_is_chosen(
    speeds, hours, corpus, chosen
):
    numbers = zip((SMALL, MEDIUM, LARGE), speeds, strict=True)
    sizes: dict[str, tuple[int, float]]
    sizes = dict(zip(("small", "medium", "large"), numbers, strict=True))
    assert planning.choose(sizes, hours * 3600, int(corpus)) == chosen


@pytest.fixture
def slow(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "measure_products", lambda *_: 1e8)


def test_hours_choose_a_preset_and_a_length_that_fit(settings, slow):
    own = {"data_path": settings["data_path"], "out_dir": settings["out_dir"]}
    own |= {"max_seq_len": 32, "batch_size": 1, "epochs": 40}
    facts = plan(TrainConfig(**own), hours=1.5)
    assert facts["parameters"] == "1,606,784"
    found = re.search(r"about (\d+) minutes", facts["in short"])
    assert found and 0.9 * 90 < int(found[1]) <= 0.96 * 90
    cfg = eval(facts["in Python"].replace("mm.", ""), {"TrainConfig": TrainConfig})
    assert cfg.preset == "demo" and 100 < cfg.max_steps < 200
    assert plan(cfg)["steps"] == facts["steps"]
    words = shlex.split(facts["in a shell"])
    options = vars(cli._parse(words[1:]))
    assert options.pop("command") == "pretrain"
    assert TrainConfig(**options) == cfg


def test_hours_leave_a_shape_that_is_set_and_a_corpus_that_ends_sooner(settings, slow):
    own = {**settings, "max_steps": None, "hidden_size": 64, "max_seq_len": 32}
    facts = plan(TrainConfig(**own, batch_size=2), hours=1000)
    assert facts.title.startswith("pretrain_64 on ")
    assert "hidden_size=64, " in facts["in Python"]
    assert "preset='demo'" in facts["in Python"] and "epochs=4" in facts["in Python"]


def test_too_few_hours_are_refused_with_what_is_enough(settings, slow):
    own = {**settings, "max_seq_len": 32, "batch_size": 1, "recipe": None}
    with pytest.raises(ValueError, match="is too little for a useful run") as refused:
        plan(TrainConfig(**own), hours="0.01")  # pyright: ignore
    enough = re.search(r"100 steps take hours=([\d.]+)$", str(refused.value))
    assert enough
    assert plan(TrainConfig(**own), hours=1.1 * float(enough[1]))["steps"]


def test_hours_extend_a_run_that_hours_planned(settings, monkeypatch):
    own = {**settings, "max_steps": 3, "epochs": 1000, "max_seq_len": 32}
    _, run = train_here(own)
    own |= {"max_steps": None, "recipe": None, "preset": None}
    facts = plan(TrainConfig(**own), hours=0.05)
    assert run.root.name in facts.title
    found = re.search(r"max_steps=(\d+)", facts["in Python"])
    assert found and int(found[1]) > 3
    other = machine_of(Gpu("Tesla T4", (7, 5), 14.6))
    monkeypatch.setattr(planning, "detect_hardware", lambda: other)
    assert "(expected)" in plan(TrainConfig(**own))["in short"], (
        "not the CPU run's speed"
    )


def test_hours_need_a_speed(settings, monkeypatch):
    new = Gpu("Z9000", (12, 0), 96.0)
    monkeypatch.setattr(planning, "detect_hardware", lambda: machine_of(new))
    with pytest.raises(ValueError, match="hours=2: the speed is known after the first"):
        plan(TrainConfig(**settings), hours=2)


def test_of_an_unknown_gpu_nothing_is_promised(settings, monkeypatch):
    new = Gpu("Z9000", (12, 0), 96.0)
    monkeypatch.setattr(planning, "detect_hardware", lambda: machine_of(new))
    facts = plan(TrainConfig(**settings))
    assert facts["precision"] == "bfloat16 on 1 × cuda"
    speed = "a speed known after the first steps: no figure for this GPU and fits"
    assert speed in facts["in short"]


@pytest.mark.parametrize(
    ("settings", "operations"),
    [
        ({"preset": "demo", "max_seq_len": 256}, 10_427_136),
        ({"preset": "minimind2-small"}, 167_562_240),
        ({"preset": "minimind2-small", "use_moe": True}, 375_278_592),
    ],
)
def test_operations_of_a_token_count_parameters_in_use_and_attention(
    settings, operations
):
    assert flops_per_token(vars(resolve(TrainConfig(**settings)))) == operations


def test_what_train_would_refuse_is_refused(settings, tmp_path):
    with pytest.raises(ValueError, match='data_path is not set: .* data_path="demo"'):
        plan(TrainConfig())
    with pytest.raises(TypeError, match=r"expected a TrainConfig, found dict"):
        plan({"data_path": "demo"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        plan(TrainConfig(data_path=str(tmp_path / "nowhere.jsonl")))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def chat_settings(settings, tmp_path) -> dict[str, Any]:
    """Sixty conversations, the last one's second answer longer than a row of 64."""
    rows = [[user(f"Is {n} a number?"), answer(f"Yes, {n}.")] for n in range(60)]
    rows[-1] += [user("More?"), answer("word " * 80)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    own = {"stage": "sft", "data_path": path, "recipe": "demo-sft", "max_seq_len": 64}
    return {**settings, **own, "init_from": "none", "val_fraction": 0.0}


@pytest.fixture
def pair_settings(chat_settings, tmp_path) -> dict[str, Any]:
    rows = (
        {
            "chosen": [user(f"Is {n} a number?"), answer("Yes.")],
            "rejected": [user(f"Is {n} a number?"), answer("No, never.")],
        }
        for n in range(60)
    )
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"stage": "dpo", "data_path": path, "recipe": "demo-dpo"}
    return {**chat_settings, **own, "val_fraction": 0.1}


def test_a_plan_of_fine_tuning_tells_what_is_learned_from_and_what_is_cut(
    chat_settings,
):
    facts = plan(TrainConfig(**chat_settings))
    assert facts.title.startswith("sft_128 on ")
    assert facts["documents"] == "60 to train on, 0 held out"
    assert facts["too long"] == (
        "of the conversations longer than max_seq_len=64, 1 are truncated at a turn "
        "and 0 dropped because no whole answer fits"
    )
    epoch = re.fullmatch(
        r"([\d,]+) text tokens in (\d+) rows of 64 \(fill (0\.\d{3})\), (\d+) in "
        r"the loss",
        facts["an epoch"],
    )
    assert epoch
    tokens, rows = int(epoch[1].replace(",", "")), int(epoch[2])
    assert tokens / (rows * 64) == pytest.approx(float(epoch[3]), abs=1e-3)
    assert 60 * 5 < int(epoch[4]) < tokens / 2
    assert "begins from" not in facts
    assert facts["global batch"].startswith("4 rows = batch_size 4 × ")


def test_a_plan_of_preferences_counts_pairs(pair_settings):
    facts = plan(TrainConfig(**pair_settings, epochs=3))
    found = re.fullmatch(r"(\d+) to train on, (\d+) held out", facts["pairs"])
    assert found
    trained, held_out = map(int, found.groups())
    assert trained + held_out == 60 and held_out > 0
    assert re.fullmatch(
        rf"[\d,]+ text tokens in {trained} pairs, [\d,]+ in the loss",
        facts["an epoch"],
    )
    assert facts["global batch"].startswith("8 pairs = batch_size 8 × ")
    steps = min(60, -(-3 * trained // 8))
    assert facts["steps"].startswith(f"{steps} optimizer steps, ")
    assert "too long" not in facts and "documents" not in facts


def test_two_stages_share_the_hours_before_there_are_weights(
    settings, chat_settings, slow
):
    shared = {"out_dir": settings["out_dir"], "max_seq_len": 32, "batch_size": 1}
    text = TrainConfig(data_path=settings["data_path"], epochs=400, **shared)
    path = chat_settings["data_path"]
    chats = TrainConfig(stage="sft", data_path=path, epochs=400, **shared)
    facts, *planned = plan_stages(text, chats, hours=3)
    minutes = [
        int(re.findall(r"about (\d+) (?:minutes)", t)[0]) for t in facts.values()
    ]
    assert list(facts) == ["pretrain_128", "sft_128"]
    assert minutes == [pytest.approx(0.95 * m, rel=0.05) for m in (120, 60)]
    assert planned[1].init_from == str(settings["out_dir"] / "pretrain_128")
    assert [cfg.preset for cfg in planned] == ["demo", None]
    assert plan(planned[0])["steps"] in facts["pretrain_128"]


def test_a_stage_with_a_run_keeps_its_length(settings, chat_settings):
    own = {**settings, "max_seq_len": 32, "max_steps": 2, "sample_tokens": 0}
    _, run = train_here(own)
    train_here(own | {"preset": None, "hidden_size": 32, "run_name": "another"})
    text = TrainConfig(**{**own, "max_steps": None, "recipe": None})
    chats = TrainConfig(
        stage="sft", data_path=chat_settings["data_path"], out_dir=own["out_dir"]
    )
    facts, again, _ = plan_stages(text, chats, hours=1)
    assert again == text and "finished at step 2 of 2" in facts[run.root.name]
    assert "optimizer steps" in facts["sft_128"]


def test_a_plan_says_what_the_run_would_begin_from(settings, chat_settings):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "max_steps": 1}
    own = {**settings, "preset": None, **small, "sample_tokens": 0, "max_seq_len": 32}
    _, folder = train_here(own)
    del chat_settings["preset"]
    chat_settings["init_from"] = "auto"
    facts = plan(TrainConfig(**chat_settings))
    assert facts["begins from"] == str(folder.root)
    assert facts.title.startswith("sft_32 on ")
    assert not (folder.root.parent / "sft_32").exists()
    with pytest.raises(FileNotFoundError, match="has no run of stage='sft' and no "):
        plan(TrainConfig(**{**chat_settings, "stage": "dpo", "recipe": "demo-dpo"}))
