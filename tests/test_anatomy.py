"""The parts exist in every family, and are what they are called."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from conftest import tiny_other
from errata.errors import AnatomyError
from errata.model.anatomy import anatomy, role_of, structural_anatomy
from errata.model.hooks import Capture, intervene

Tiny = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 13).reshape(2, 6)


def test_every_path_of_the_table_exists(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    parts = anatomy(model)
    assert (parts.family, parts.role, parts.n_layers, parts.d_model) == (family, "decoder", 2, 32)
    for paths in (parts.blocks, parts.attention, parts.mlp_in, parts.mlp_out):
        assert len(paths) == 2
        assert all(isinstance(parts.module(model, path), nn.Module) for path in paths)
    assert parts.module(model, parts.embed) is model.get_input_embeddings()
    assert parts.head is not None and parts.module(model, parts.head) is model.get_output_embeddings()
    assert parts.final_norm is not None and "Norm" in type(parts.module(model, parts.final_norm)).__name__


def test_orientation_is_stated_and_true(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    parts = anatomy(model)
    module = parts.module(model, parts.mlp_site(-1))
    assert parts.mlp_out_transposed == isinstance(module, Conv1D) == (family == "gpt2")
    weight = module.get_parameter("weight")
    d_out, d_in = weight.shape[::-1] if parts.mlp_out_transposed else weight.shape
    with Capture(model, [parts.mlp_site(-1)], of="input") as keys:
        model(IDS)
    assert (d_out, d_in) == (32, keys[parts.mlp_site(-1)].shape[-1])


def test_mlp_output_enters_the_residual(tiny: Tiny, family: str) -> None:
    """What is added to the MLP's output is added to the block's (Gemma 2 normalises it in between)."""
    model = tiny(family)
    parts = anatomy(model)
    shift = torch.linspace(-1, 1, 32)
    with torch.no_grad(), Capture(model, parts.blocks) as before:
        model(IDS)
    shifted = intervene(model, {parts.mlp_out[0]: lambda v: v + shift})
    with torch.no_grad(), shifted, Capture(model, parts.blocks) as now:
        model(IDS)
    moved = now[parts.blocks[0]] - before[parts.blocks[0]]
    assert before[parts.blocks[0]].shape == (2, 6, 32)
    if family == "gemma2":
        assert moved.abs().max() > 1e-3
    else:
        torch.testing.assert_close(moved, shift.expand(2, 6, 32), atol=1e-5, rtol=0)  # float32 rounding of one sum


def test_final_norm_reads_the_last_block_and_feeds_the_head(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    parts = anatomy(model)
    assert parts.head is not None
    read = Capture(model, [parts.head], of="input")
    with torch.no_grad(), Capture(model, [parts.site("final")]) as out, read as head:
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(out[parts.site("final")], states[-1])
    assert torch.equal(head[parts.head], states[-1])


def test_sites(tiny: Tiny) -> None:
    parts = anatomy(tiny("gpt2", layers=3))
    assert parts.site(0) == parts.site(-3) == "transformer.h.0"
    assert parts.site(-1) == "transformer.h.2"
    assert parts.site("final") == "transformer.ln_f"
    for bad in (3, -4, "last", True):
        with pytest.raises(AnatomyError, match='from -3 to 2 or "final"'):
            parts.site(bad)


def test_structure_alone_finds_what_the_table_says(tiny: Tiny, family: str) -> None:
    assert structural_anatomy(tiny(family)) == anatomy(tiny(family))


def test_the_role_alone_is_the_anatomys(tiny: Tiny, family: str) -> None:
    config = tiny(family).config
    models = [tiny(family), AutoModel.from_config(config), tiny("bloom", n_layer=2, n_head=4)]
    models += [tiny_other(other) for other in ("t5", "bert")]
    for model in models:
        assert role_of(model) == anatomy(model).role, type(model).__name__


@pytest.mark.parametrize(
    ("outsider", "config", "mlp_out"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, "transformer.h.1.mlp.dense_4h_to_h"),
        ("falcon", {}, "transformer.h.1.mlp.dense_4h_to_h"),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}, "transformer.h.1.mlp.c_proj"),
        ("starcoder2", {"num_key_value_heads": 2}, "model.layers.1.mlp.c_proj"),
    ],
)
def test_families_outside_the_table(tiny: Tiny, outsider: str, config: dict[str, object], mlp_out: str) -> None:
    if outsider == "gpt_neo":
        config = {**config, "num_heads": 4}
    model = tiny(outsider, **config)
    parts = anatomy(model)
    assert (parts.role, parts.mlp_site(-1), parts.head) == ("decoder", mlp_out, "lm_head")
    assert not parts.mlp_out_transposed
    with torch.no_grad(), Capture(model, [parts.site("final")]) as out:
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(out[parts.site("final")], states[-1])


def test_mixture_of_experts_has_blocks_but_no_single_mlp_output(tiny: Tiny) -> None:
    model = tiny("mixtral", num_local_experts=4, num_key_value_heads=2)
    parts = anatomy(model)
    assert parts.n_layers == 2 and parts.site(1) == "model.layers.1"
    with pytest.raises(AnatomyError, match="MLP output projection"):
        parts.mlp_site(0)


def test_bare_body_classifier_and_wrapper(tiny: Tiny) -> None:
    config = tiny("llama").config
    body = anatomy(AutoModel.from_config(config))
    assert (body.head, body.role, body.blocks[0]) == (None, "decoder", "layers.0")
    classifier = anatomy(AutoModelForSequenceClassification.from_config(config))
    assert (classifier.head, classifier.role, classifier.blocks[0]) == ("score", "classifier", "model.layers.0")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny("llama")
            self.config = self.inner.config

    wrapped = anatomy(Wrapper())
    assert (wrapped.mlp_out[1], wrapped.head) == ("inner.model.layers.1.mlp.down_proj", "inner.lm_head")


def test_model_without_final_norm(tiny: Tiny) -> None:
    """OPT-350m normalises after each block, not after the last one, and embeds in fewer dimensions."""
    parts = anatomy(tiny("opt", do_layer_norm_before=False, word_embed_proj_dim=16))
    assert parts.final_norm is None and parts.site("final") == "model.decoder.layers.1" and parts.d_model == 32


def test_unknown_model_lists_what_was_looked_for() -> None:
    with pytest.raises(AnatomyError, match=r"no list of blocks and no token embedding.*gpt2.*ModuleList"):
        anatomy(nn.Sequential(nn.Linear(2, 2)))


def test_missing_module_names_what_exists(tiny: Tiny) -> None:
    model = tiny("gpt2")
    with pytest.raises(AnatomyError, match=r"transformer.h.0 has the children ln_1, attn"):
        anatomy(model).module(model, "transformer.h.0.mlpp")
