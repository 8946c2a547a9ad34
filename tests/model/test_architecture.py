"""The network against transformers, a plain second implementation, and itself."""

import types

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from minimind_nb.model import architecture
from minimind_nb.model.architecture import (
    YARN_DEFAULTS,
    MiniMindConfig,
    MiniMindForCausalLM,
    lacks_fast_gqa,
    rotary_frequencies,
    rotary_tables,
)

THIRD = {"qk_norm": True, "rms_norm_eps": 1e-6, "num_key_value_heads": 2}
MIXTURE = {"use_moe": True, "aux_loss_alpha": 0.1}
THIRD_MIXTURE = {
    **THIRD,
    **MIXTURE,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
    "seq_aux": False,
}
MINIMIND3 = {**THIRD, "hidden_size": 768, "intermediate_size": 2432}
MINIMIND3 |= {"num_key_value_heads": 4}
KINDS = [{}, THIRD, MIXTURE, THIRD_MIXTURE]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def qwen_fields(config: MiniMindConfig) -> dict:
    names = (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "intermediate_size vocab_size rms_norm_eps max_position_embeddings"
    )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    same = {name: getattr(config, name) for name in names.split()}
    return {**same, "rope_parameters": rope, "tie_word_embeddings": True}


# --- against others


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "theirs", "configuration"),
    [
        ({}, LlamaForCausalLM, LlamaConfig),
        ({**THIRD, "head_dim": 16}, Qwen3ForCausalLM, Qwen3Config),
    ],
)
def test_dense_models_equal_transformers(tiny, ids, fields, theirs, configuration):
    ours = tiny(**fields)
    model = theirs(configuration(**qwen_fields(ours.config))).eval()
    model.load_state_dict(ours.state_dict(), strict=True)
    assert difference(ours(ids).logits, model(ids).logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "fields",
    [*KINDS, {**MIXTURE, "num_experts_per_tok": 1, "n_shared_experts": 2}],
)
def test_model_equals_plain_implementation(
    tiny, ids, reference_logits, fields, training
):
    model = tiny(**fields).train(training)
    expected = reference_logits(model.state_dict(), model.config, ids)
    assert difference(model(ids).logits, expected) <= 1e-5


@torch.no_grad()
def test_eager_attention_equals_sdpa(tiny, ids):
    expected = tiny()(ids).logits
    packed = torch.ones(24, 24, dtype=torch.bool).tril()[None, None]
    model = tiny(attn_implementation="eager")
    assert difference(model(ids).logits, expected) <= 1e-5
    assert difference(model(ids, packed).logits, expected) <= 1e-5


# --- as a model of transformers


@torch.no_grad()
def test_hidden_states_equal_transformers(tiny, ids):
    ours = tiny()
    theirs = LlamaForCausalLM(LlamaConfig(**qwen_fields(ours.config))).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    expected = theirs(ids, output_hidden_states=True).hidden_states
    found = ours(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    assert all(map(lambda a, b: difference(a, b) <= 1e-5, found, expected))
    assert ours(ids).hidden_states is None
    ours.config.output_hidden_states = True
    assert torch.equal(ours.model(ids).hidden_states[1], found[1])


@torch.no_grad()
def test_embeddings_take_the_place_of_ids(tiny, ids):
    model = tiny()
    embedded = model.model.embed_tokens(ids)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for given in ({}, {"attention_mask": mask}):
        found = model(inputs_embeds=embedded, **given).logits
        assert torch.equal(found, model(ids, **given).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    found = model.generate(inputs_embeds=embedded, **greedy)
    assert torch.equal(found, expected[:, ids.shape[1] :])


@pytest.mark.parametrize("fields", [{}, MIXTURE])
def test_gradient_checkpointing_changes_no_gradient(tiny, ids, fields):
    model = tiny(**fields).train()
    calls = []
    model.model.layers[0].input_layernorm.register_forward_hook(
        lambda *_: calls.append(1)
    )

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    expected = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    found = gradients()
    assert len(calls) == 3  # forward, and again in the backward
    assert all(map(torch.equal, found, expected))


# --- loss


def test_loss_shifts_labels_and_ignores_minus_100(tiny, ids):
    model = tiny()
    labels = ids.clone()
    labels[0, 5:9] = -100
    out = model(ids, labels=labels)
    chosen = labels[:, 1:].flatten() != -100
    logits = out.logits[:, :-1].flatten(0, 1)[chosen]
    expected = F.cross_entropy(logits, ids[:, 1:].flatten()[chosen])
    torch.testing.assert_close(out.loss, expected)
    assert out.aux_loss == 0


def test_loss_divides_by_num_items_in_batch(tiny, ids):
    model = tiny()
    mean = model(ids, labels=ids).loss
    total = model(ids, labels=ids, num_items_in_batch=torch.tensor(23)).loss
    torch.testing.assert_close(total, mean * 2)


def test_loss_includes_aux_loss_and_output_keeps_it_apart(tiny, ids):
    model = tiny(**MIXTURE).train()
    with_labels, without = model(ids, labels=ids), model(ids)
    entropy = F.cross_entropy(
        without.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert without.aux_loss > 0.1
    torch.testing.assert_close(with_labels.loss, entropy + without.aux_loss)


def test_autocast_keeps_stream_norms_router_and_loss_in_float32(tiny, ids):
    model = tiny(**MIXTURE).train()
    seen: dict[str, torch.dtype] = {}
    layer = model.model.layers[0]

    def note(name):
        return lambda module, args, out: seen.update(
            {name: (out[1] if isinstance(out, tuple) else out).dtype}
        )

    layer.input_layernorm.register_forward_hook(note("norm"))
    layer.self_attn.register_forward_hook(note("attention"))
    layer.mlp.gate.register_forward_hook(note("router weights"))
    layer.mlp.experts[0].register_forward_hook(note("expert"))
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].dtype))
    model.model.norm.register_forward_hook(note("stream"))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
        out.loss.backward()
    low = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert low == {"attention", "expert"}
    assert len(seen) == 6
    assert out.loss.dtype == out.aux_loss.dtype == torch.float32
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())


@torch.no_grad()
def test_model_in_bfloat16_stays_close_to_float32(tiny, ids):
    model = tiny(**THIRD_MIXTURE)
    expected = model(ids).logits
    logits = model.bfloat16()(ids).logits
    assert logits.dtype == torch.bfloat16
    agree = logits.argmax(-1) == expected.argmax(-1)
    assert agree.float().mean() > 0.8


# --- masks and caches


@torch.no_grad()
@pytest.mark.parametrize("fields", KINDS)
def test_packed_documents_equal_separate_documents(tiny, ids, fields):
    model = tiny(**fields)
    document = torch.tensor([0] * 7 + [1] * 12 + [2] * 5)
    mask = (document[:, None] == document[None]).tril()[None, None]
    packed = model(ids[:1], attention_mask=mask).logits[0]
    for d in range(3):
        alone = model(ids[:1, document == d]).logits[0]
        assert difference(packed[document == d], alone) <= 1e-5


@torch.no_grad()
def test_training_makes_no_mask_tensor_and_no_cache(tiny, ids, monkeypatch):
    seen = []
    whole = F.scaled_dot_product_attention

    def note(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask, is_causal))
        return whole(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    out = tiny()(ids)
    assert seen == [(None, True)] * 2
    assert out.past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunked_prefill_equals_full_forward(tiny, ids, fields, cache):
    model = tiny(**fields)
    past = (
        DynamicCache(config=model.config)
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=32)
    )
    parts, start = [], 0
    for size in (1, 10, 8, 5):
        chunk = ids[:, start : start + size]
        position = torch.arange(start, start + size)
        out = model(chunk, past_key_values=past, cache_position=position)
        parts.append(out.logits)
        start += size
    assert difference(torch.cat(parts, 1), model(ids).logits) <= 1e-5


@pytest.mark.parametrize("fields", KINDS)
def test_greedy_ids_are_equal_for_every_cache(tiny, ids, fields):
    model = tiny(**fields, eos_token_id=None)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **options)
    static = model.generate(ids, cache_implementation="static", **options)
    chunked = model.generate(
        ids,
        prefill_chunk_size=7,
        past_key_values=DynamicCache(config=model.config),
        **options,
    )
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(static, expected)
    assert torch.equal(chunked, expected)
    assert len(expected[0, 24:].unique()) > 2


@torch.no_grad()
def test_batch_with_left_padding_generates_what_each_row_does_alone(tiny, ids):
    model = tiny(eos_token_id=None)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batch = ids.clone()
    batch[0, :6] = 0
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    together = model.generate(batch, attention_mask=mask, **options)[:, 24:]
    alone = model.generate(ids[:1, 6:], **options)[0, 18:]
    assert torch.equal(together[0], alone)


@torch.no_grad()
def test_logits_to_keep_counts_from_the_end_or_lists_positions(tiny, ids):
    model = tiny()
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    listed = model(ids, logits_to_keep=torch.tensor([0, 7])).logits
    torch.testing.assert_close(listed, full[:, [0, 7]])


def test_dense_forward_compiles_to_one_graph(tiny, ids):
    model = tiny().train()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=keep, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert len(graphs) == 1


@torch.no_grad()
def test_keys_are_expanded_where_gqa_has_no_fast_kernel(tiny, ids, monkeypatch):
    model = tiny(num_key_value_heads=2)
    expected = model(ids).logits
    heads = []
    whole = F.scaled_dot_product_attention

    def note(query, key, value, **kwargs):
        heads.append((key.shape[1], kwargs.get("enable_gqa", False)))
        return whole(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    monkeypatch.setattr(architecture, "lacks_fast_gqa", lambda device: True)
    assert torch.equal(model(ids).logits, expected)
    assert heads == [(4, False)] * 2
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    monkeypatch.undo()
    again = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, again)


@pytest.mark.parametrize(
    ("device", "major", "slow"),
    [("cuda", 7, True), ("cuda", 8, False), ("cuda", 9, False), ("cpu", 0, False)],
)
def test_gqa_is_slow_below_capability_8(device, major, slow, monkeypatch):
    properties = types.SimpleNamespace(major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert lacks_fast_gqa(torch.device(device)) is slow


# --- weights and configuration


def test_state_dict_names_are_minimind_s(tiny):
    names = set(tiny(num_hidden_layers=1, **THIRD, use_moe=True).state_dict())
    layer = "model.layers.0"
    experts = [f"mlp.experts.{e}" for e in range(4)] + ["mlp.shared_experts.0"]
    expected = {
        f"{layer}.{e}.{p}_proj" for e in experts for p in ("gate", "up", "down")
    }
    expected |= {f"{layer}.self_attn.{p}_proj" for p in "qkvo"}
    expected |= {f"{layer}.self_attn.{p}_norm" for p in "qk"}
    expected |= {f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"}
    expected |= {f"{layer}.mlp.gate", "model.embed_tokens", "model.norm", "lm_head"}
    assert names == {f"{name}.weight" for name in expected}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 27_402_752),
        ({"intermediate_size": 1408}, 25_829_888),
        ({"intermediate_size": 1408, "use_moe": True}, 95_052_288),
        (
            {"hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2048},
            104_030_976,
        ),
        (
            {"hidden_size": 640, "intermediate_size": 1728, "use_moe": True},
            145_029_760,
        ),
        (MINIMIND3, 63_912_192),
        (
            {**MINIMIND3, **THIRD_MIXTURE, "num_key_value_heads": 4},
            198_416_640,
        ),
    ],
)
def test_parameter_counts_of_the_published_shapes(fields, count):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**fields))
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    assert sum(weight.numel() for weight in model.parameters()) == count


def test_weights_start_normal_and_norms_start_at_one():
    torch.manual_seed(0)
    config = MiniMindConfig(num_hidden_layers=2, use_moe=True, vocab_size=500)
    model = MiniMindForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert weight.eq(1).all(), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(weight.mean().item()) < 2e-3, name


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        *KINDS,
        {"inference_rope_scaling": True, "rope_scaling": {"factor": 4}},
        {"tie_word_embeddings": False},
        {"intermediate_size": 1536, "head_dim": 12, "pad_token_id": None},
    ],
)
def test_saved_model_loads_with_the_same_logits(tiny, ids, fields, tmp_path):
    model = tiny(**fields)
    model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path).eval()
    # Not bit for bit: the file's tensors lie in memory at other alignments.
    assert difference(loaded(ids).logits, model(ids).logits) <= 1e-5
    saved, again = model.config.to_dict(), loaded.config.to_dict()
    for name in ("architectures", "_name_or_path", "dtype", "torch_dtype"):
        saved.pop(name, None)
        again.pop(name, None)
    assert again == saved
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied is model.config.tie_word_embeddings


@torch.no_grad()
def test_half_precision_copy_keeps_rotary_angles_exact(tiny):
    model = tiny(max_position_embeddings=32768)
    far = torch.tensor([[30_001, 30_002]])
    before = rotary_tables(model.config, far)
    model.half()
    assert torch.equal(rotary_tables(model.config, far)[0], before[0])


def test_the_config_json_of_either_generation_is_understood():
    published = {
        "model_type": "minimind",
        "hidden_size": 768,
        "use_moe": True,
        "flash_attn": True,
        "num_key_value_heads": 4,
        "head_dim": 96,
        "intermediate_size": 2432,
        "rms_norm_eps": 1e-6,
        "inference_rope_scaling": False,
        "rope_scaling": None,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 1216,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 5e-4,
    }
    config = MiniMindConfig.from_dict(published)
    assert config.qk_norm and config.use_moe and not config.seq_aux
    assert (config.n_routed_experts, config.n_shared_experts) == (4, 0)
    assert (config.intermediate_size, config.aux_loss_alpha) == (1216, 5e-4)
    assert published["num_experts"] == 4

    dense = MiniMindConfig.from_dict({"num_experts": 4})
    assert (dense.hidden_size, dense.intermediate_size) == (768, 2432)
    assert (dense.num_key_value_heads, dense.rms_norm_eps) == (4, 1e-6)
    assert MiniMindConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    config = MiniMindConfig.from_dict({"hidden_size": 640, "intermediate_size": 1728})
    assert (config.hidden_size, config.num_key_value_heads) == (640, 2)
    assert not config.qk_norm and config.seq_aux and config.aux_loss_alpha == 0.01


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 500}, "hidden_size 500 is not a multiple of .*set head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3: use a divisor of 8"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'.*'softmax'"),
        (
            {"use_moe": True, "num_experts_per_tok": 5},
            "num_experts_per_tok is 5 with n_routed_experts 4: use 1 to 4",
        ),
        ({"rope_scaling": {"factor": 2}}, "inference_rope_scaling=False"),
        (
            {"inference_rope_scaling": True, "rope_scaling": {"faktor": 2}},
            "'faktor': 2.*it may hold .*'factor'",
        ),
        (
            {"inference_rope_scaling": True, "rope_scaling": {"type": "linear"}},
            "'linear'.*of type 'yarn'",
        ),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MiniMindConfig(**fields)


# --- parts


def test_yarn_frequencies_at_literal_points():
    plain = rotary_frequencies(MiniMindConfig())
    yarn = rotary_frequencies(MiniMindConfig(inference_rope_scaling=True))
    assert plain[[0, 16, 31]].tolist() == pytest.approx(
        [1.0, 1e-3, 1.53993e-6], rel=1e-5
    )
    # Of 32 pairs, the 5 fastest stay, from pair 14 on all turn 16 times slower.
    ratio = (yarn / plain).tolist()
    assert ratio[:6] == [1.0] * 6
    assert ratio[14:] == pytest.approx([1 / 16] * 18)
    assert ratio[10] == pytest.approx(1 - 5 / 9 * 15 / 16)


def test_yarn_is_idle_within_the_original_length_and_every_value_counts():
    idle = MiniMindConfig(inference_rope_scaling=True, max_position_embeddings=2048)
    assert torch.equal(rotary_frequencies(idle), rotary_frequencies(MiniMindConfig()))
    position = torch.arange(50)[None]
    base = MiniMindConfig(inference_rope_scaling=True)
    tables = {tuple(rotary_tables(base, position)[0].flatten().tolist())}
    for name, value in YARN_DEFAULTS.items():
        rope = {"type": "yarn", name: 2 * value}
        config = MiniMindConfig(inference_rope_scaling=True, rope_scaling=rope)
        tables.add(tuple(rotary_tables(config, position)[0].flatten().tolist()))
    assert len(tables) == 6


@torch.no_grad()
def test_dropout_acts_in_training_only(tiny, ids):
    model, plain = tiny(dropout=0.3), tiny()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.train()
    assert difference(model(ids).logits, model(ids).logits) > 1e-3


def test_the_shapes_can_be_computed_without_numbers(tiny):
    logits = (
        tiny().to("meta")(torch.zeros(1, 4, dtype=torch.long, device="meta")).logits
    )
    assert logits.shape[:2] == (1, 4)
