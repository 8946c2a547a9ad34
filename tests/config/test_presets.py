import pytest

from minimind_nb.config import (
    CHANGEABLE_ON_RESUME,
    PRESETS,
    RECIPES,
    SHAPE_FIELDS,
    STAGES,
    TrainConfig,
    count_parameters,
    fit_batch,
    kinds,
    resolve,
)


def count(**settings) -> dict[str, int]:
    return count_parameters(resolve(TrainConfig(**settings)).shape())


@pytest.mark.parametrize(
    ("settings", "total", "active"),
    [
        ({}, 27_402_752, 27_402_752),
        ({"preset": "minimind2-small"}, 25_829_888, 25_829_888),
        ({"preset": "minimind2-small", "use_moe": True}, 95_052_288, 60_449_280),
        ({"preset": "minimind2"}, 104_030_976, 104_030_976),
        ({"preset": "minimind2-moe"}, 145_029_760, 91_945_600),
        ({"preset": "minimind-3"}, 63_912_192, 63_912_192),
        ({"preset": "minimind-3-moe"}, 198_416_640, 63_936_768),
    ],
)
def test_known_shapes_have_their_known_parameters(settings, total, active):
    assert count(**settings) == {"total": total, "active": active}


def test_a_head_dim_of_its_own_counts():
    # 8 layers x 512 wide x 10 heads read and written, 64 wider: 2 x 512 x 64 x 10 x 8.
    assert count(head_dim=128)["total"] - count()["total"] == 5_242_880


def test_the_plain_default_is_the_second_generations_small_shape():
    assert resolve(TrainConfig()).shape() == {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 6400,
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "dropout": 0.0,
        "qk_norm": False,
        "use_moe": False,
        "n_routed_experts": None,
        "num_experts_per_tok": None,
        "n_shared_experts": None,
        "aux_loss_alpha": None,
        "seq_aux": None,
        "norm_topk_prob": None,
        "inference_rope_scaling": False,
    }


def test_a_mixture_has_the_second_generations_defaults():
    cfg = resolve(TrainConfig(use_moe=True))
    assert (cfg.n_routed_experts, cfg.num_experts_per_tok) == (4, 2)
    assert (cfg.n_shared_experts, cfg.aux_loss_alpha) == (1, 0.01)
    assert (cfg.seq_aux, cfg.norm_topk_prob) == (True, True)


def test_the_stage_fills_what_nobody_set():
    cfg = resolve(TrainConfig())
    assert (cfg.batch_size, cfg.learning_rate, cfg.beta2) == (32, 3e-3, 0.95)
    assert (cfg.device, cfg.num_processes, cfg.dtype) == ("cpu", 1, "float32")


def test_each_stage_has_defaults_of_its_own():
    pretrain, sft, dpo = (resolve(TrainConfig(stage=stage)) for stage in STAGES)
    assert (sft.batch_size, sft.epochs, sft.max_seq_len) == (16, 2, 1024)
    assert (dpo.epochs, dpo.max_seq_len, dpo.dpo_beta) == (1, 1024, 0.1)
    begins = [cfg.init_from for cfg in (pretrain, sft, dpo)]
    assert begins == ["none", "auto", "auto"]
    masks = [cfg.document_mask for cfg in (pretrain, sft, dpo)]
    assert masks == [False, True, True]
    assert [cfg.run_name for cfg in (sft, dpo)] == ["sft_512", "dpo_512"]
    assert pretrain.dpo_beta is sft.dpo_beta is None
    historical = resolve(TrainConfig(stage="sft", recipe="minimind-sft"))
    assert (historical.learning_rate, historical.batch_size) == (5e-7, 16)


def test_the_shape_of_the_weights_goes_before_the_stage_and_a_preset_before_it():
    there = {"hidden_size": 96, "use_moe": True, "n_routed_experts": 3}
    cfg = resolve(TrainConfig(stage="sft"), **there)
    assert (cfg.hidden_size, cfg.n_routed_experts) == (96, 3)
    assert cfg.run_name == "sft_96_moe"
    assert resolve(TrainConfig(stage="sft", preset="demo"), **there).hidden_size == 128


def test_the_machine_goes_before_the_stage():
    cfg = resolve(TrainConfig(), num_processes=2, dtype="float16", device="cuda")
    assert (cfg.device, cfg.num_processes, cfg.dtype) == ("cuda", 2, "float16")
    assert resolve(TrainConfig(), vocab_size=9000).vocab_size == 9000


def test_the_preset_goes_before_machine_and_stage():
    cfg = resolve(TrainConfig(preset="demo"), hidden_size=256)
    assert (cfg.hidden_size, cfg.num_hidden_layers, cfg.head_dim) == (128, 4, 32)


def test_the_recipe_goes_before_the_preset(monkeypatch):
    monkeypatch.setitem(RECIPES, "demo", {"hidden_size": 64, "batch_size": 3})
    cfg = resolve(TrainConfig(preset="demo", recipe="demo"), batch_size=5)
    assert (cfg.hidden_size, cfg.batch_size) == (64, 3)
    assert cfg.num_hidden_layers == 4


def test_an_explicit_value_goes_before_everything():
    cfg = resolve(
        TrainConfig(preset="demo", recipe="demo", hidden_size=192, batch_size=7),
        hidden_size=512,
        batch_size=9,
    )
    assert (cfg.hidden_size, cfg.batch_size) == (192, 7)
    assert cfg.learning_rate == 3e-3


def test_derived_values_follow_what_was_resolved():
    cfg = resolve(TrainConfig(hidden_size=640, learning_rate=1e-3, recipe="minimind"))
    assert (cfg.intermediate_size, cfg.head_dim) == (1920, 80)
    assert cfg.min_learning_rate == pytest.approx(1e-4)
    assert cfg.run_name == "pretrain_640"


def test_tables_speak_of_fields_only():
    known = kinds().keys()
    for table in (PRESETS, RECIPES, STAGES):
        for defaults in table.values():
            assert defaults.keys() <= known
    assert known >= CHANGEABLE_ON_RESUME | set(SHAPE_FIELDS)
    assert all(preset.keys() <= set(SHAPE_FIELDS) for preset in PRESETS.values())


def test_a_resumed_run_may_change_its_length_and_display_but_not_its_model():
    assert {"epochs", "max_steps", "log_interval", "use_wandb"} <= CHANGEABLE_ON_RESUME
    fixed = {*SHAPE_FIELDS, "seed", "global_batch", "learning_rate", "max_seq_len"}
    assert not fixed & CHANGEABLE_ON_RESUME


@pytest.mark.parametrize(
    ("tokens", "width", "processes", "batch"),
    [
        (1000, 256, 1, (2, 2, 1)),
        (600_000, 256, 1, (4, 4, 1)),
        (600_000, 256, 2, (4, 2, 1)),
        (600_000, 256, 3, (6, 2, 1)),
        (3_000_000, 256, 1, (8, 8, 1)),
        (300_000_000, 512, 1, (64, 32, 2)),
        (10**9, 512, 3, (132, 22, 2)),
        (300_000_000, 512, 2, (64, 32, 1)),
    ],
)
def test_the_batch_follows_from_the_tokens_of_a_corpus(tokens, width, processes, batch):
    cfg = resolve(TrainConfig(max_seq_len=width), num_processes=processes)
    names = ("global_batch", "batch_size", "accumulation_steps")
    assert fit_batch(vars(cfg), (), tokens) == dict(zip(names, batch, strict=True))


@pytest.mark.parametrize(
    "asked",
    [{"batch_size": 4}, {"global_batch": 16}, {"recipe": "demo"}, {"stage": "dpo"}],
)
def test_a_batch_that_is_set_stays(asked):
    cfg = resolve(TrainConfig(**asked))
    found = fit_batch(vars(cfg), asked, 10**9)
    assert found == {name: getattr(cfg, name) for name in found}


def test_the_founding_recipe_is_the_documents_table():
    names = """epochs batch_size accumulation_steps learning_rate warmup_iters grad_clip
        max_seq_len save_interval log_interval hidden_size num_hidden_layers""".split()
    pretrain = resolve(TrainConfig(recipe="founding"))
    found = [getattr(pretrain, name) for name in names]
    assert found == [2, 32, 1, 5e-4, 0, 1.0, 512, 500, 100, 512, 8]
    tuned = resolve(TrainConfig(stage="sft", recipe="founding-sft"))
    assert [getattr(tuned, n) for n in names] == [2, 16, 1, 5e-7, *found[4:]]
    assert (pretrain.optimizer, pretrain.schedule) == ("adamw", "cosine")
    third = resolve(TrainConfig(stage="sft", recipe="minimind-3-sft"))
    assert (third.learning_rate, third.max_seq_len) == (1e-5, 768)
