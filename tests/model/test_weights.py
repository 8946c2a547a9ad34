"""Named tensors against a configuration: what does not belong together is named."""

from typing import Any

import pytest
import torch

from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.weights import check_fit, infer_shape, put_weights

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
MIXTURE: dict[str, Any] = {"use_moe": True, "n_routed_experts": 3}


def make(**fields: Any) -> tuple[MiniMindConfig, dict[str, torch.Tensor]]:
    config = MiniMindConfig(**{**SHAPE, **fields})
    return config, MiniMindForCausalLM(config).state_dict()


@pytest.mark.parametrize(
    "fields", [{}, {"qk_norm": True, "rms_norm_eps": 1e-6}, MIXTURE]
)
def test_tensors_fit_the_configuration_they_were_made_with(fields):
    config, tensors = make(**fields)
    check_fit(config, tensors, "a.pth")
    inferred = infer_shape(tensors)
    assert {name: getattr(config, name) for name in inferred} == inferred


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, "holds 2 layers and .* says 1000000000"),
        ({**MIXTURE, "n_routed_experts": 10**9}, "holds 3 experts and .* 1000000000"),
        ({**MIXTURE, "n_shared_experts": 10**9}, "1 shared experts and .* 1000000000"),
        ({"hidden_size": 1 << 20}, "embed_tokens.weight: 64×32 there, 64×1048576"),
        ({"hidden_size": 1 << 40}, "a.pth describes no model: .* overflowed"),
    ],
)
def test_a_configuration_that_claims_more_is_refused_before_it_is_built(fields, words):
    _, tensors = make(**(MIXTURE if "use_moe" in fields else {}))
    with pytest.raises(ValueError, match=words):
        check_fit(MiniMindConfig(**{**SHAPE, **fields}), tensors, "a.pth")


def test_a_model_that_does_not_fit_is_not_changed():
    config, tensors = make()
    model = MiniMindForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.norm.weight"] = torch.full((32,), float("nan"))
    with pytest.raises(ValueError, match="not finite, in model.norm.weight"):
        put_weights(model, tensors, "a.pth")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
