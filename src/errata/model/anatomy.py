"""Where the parts of a transformer are: one table by `config.model_type`, and a structural search for what it lacks.

A path is what `nn.Module.get_submodule` takes. Rows hold paths relative to the model's body (`GPT2Model`,
`LlamaModel`); the body is found inside whatever was given: itself, a model with a head, a classifier, or a wrapper.

An encoder-decoder has two stacks. Its anatomy is that of the decoder, which the head reads, and `encoder` holds the other's;
sites of either may be named in full: "encoder.3", "encoder.final", "decoder.0".
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from errata.errors import AnatomyError

Role = Literal["decoder", "encoder-decoder", "encoder", "classifier"]
Site = int | str  # a layer, or "final"; "encoder.3" or "decoder.final" where there are two stacks


@dataclass(frozen=True)
class Row:
    """One family of the table: paths relative to the body; those below `blocks` are relative to a block.

    Where releases of a family differ, the names to be tried in turn are separated by "|".
    """

    embed: str
    blocks: str
    attention: str
    mlp_in: str
    mlp_out: str
    final_norm: str
    mlp_gate: str | None = None
    mlp_out_transposed: bool = False
    role: Role = "decoder"
    cross_attention: str | None = None
    encoder: "Row | None" = None


_LLAMA = Row("embed_tokens", "layers", "self_attn", "mlp.up_proj", "mlp.down_proj", "norm", mlp_gate="mlp.gate_proj")
_GPTJ = Row("wte", "h", "attn", "mlp.fc_in", "mlp.fc_out", "ln_f")
_BERT = Row(
    "embeddings.word_embeddings",
    "encoder.layer",
    "attention",
    "intermediate.dense",
    "output.dense",
    "",  # the norm stands inside each block
    role="encoder",
)


def _t5(stack: str, ff: str) -> Row:
    """One stack of T5; `ff` is the number of the MLP within a block. Gated in v1.1 (wi_0 is the gate), not in v1.0 (wi)."""
    mlp = f"layer.{ff}.DenseReluDense"
    return Row(
        embed="shared",
        blocks=f"{stack}.block",
        attention="layer.0.SelfAttention",
        mlp_in=f"{mlp}.wi_1|{mlp}.wi",
        mlp_out=f"{mlp}.wo",
        final_norm=f"{stack}.final_layer_norm",
        mlp_gate=f"{mlp}.wi_0",
        role="encoder",
    )


_T5 = replace(
    _t5("decoder", "2"), role="encoder-decoder", cross_attention="layer.1.EncDecAttention", encoder=_t5("encoder", "1")
)
_BART_ENCODER = Row("shared", "encoder.layers", "self_attn", "fc1", "fc2", "", role="encoder")
_BART = replace(
    _BART_ENCODER,
    blocks="decoder.layers",
    role="encoder-decoder",
    cross_attention="encoder_attn",
    encoder=_BART_ENCODER,
)

TABLE: dict[str, Row] = {
    "gpt2": Row("wte", "h", "attn", "mlp.c_fc", "mlp.c_proj", "ln_f", mlp_out_transposed=True),
    "gptj": _GPTJ,
    "codegen": _GPTJ,
    "gpt_neox": Row("embed_in", "layers", "attention", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "final_layer_norm"),
    "opt": Row("decoder.embed_tokens", "decoder.layers", "self_attn", "fc1", "fc2", "decoder.final_layer_norm"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "phi": Row("embed_tokens", "layers", "self_attn", "mlp.fc1", "mlp.fc2", "final_layernorm"),
    "phi3": Row("embed_tokens", "layers", "self_attn", "mlp.gate_up_proj", "mlp.down_proj", "norm"),
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
}


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model, as module paths.

    `blocks`, and where the model has them `attention`, `mlp_in`, `mlp_gate`, `mlp_out`, hold one path per layer; a part
    that the model lacks (a gate in GPT-2, an MLP in a mixture of experts) is an empty tuple. `mlp_in` is the
    up-projection, the gate of a gated MLP is `mlp_gate`, unless the two are stored as one (Phi-3's `gate_up_proj`).
    `mlp_out_transposed`: the weight of `mlp_out` is stored (d_in, d_out), as by GPT-2's Conv1D, not (d_out, d_in).
    `final_norm` is None for models without (OPT-350m; BERT, whose blocks end in one); `head` is None for a bare body, and the
    classification head of a classifier.
    `encoder` is the encoder's anatomy where this is the decoder of an encoder-decoder; `cross_attention` holds its paths.
    """

    family: str
    role: Role
    n_layers: int
    d_model: int
    embed: str
    blocks: tuple[str, ...]
    attention: tuple[str, ...]
    mlp_in: tuple[str, ...]
    mlp_gate: tuple[str, ...]
    mlp_out: tuple[str, ...]
    final_norm: str | None
    head: str | None
    mlp_out_transposed: bool
    cross_attention: tuple[str, ...] = ()
    encoder: "Anatomy | None" = None

    def module(self, model: nn.Module, path: str) -> nn.Module:
        """The module at `path` of `model`. Raises AnatomyError if there is none."""
        return submodule(model, path)

    def stack_of(self, site: Site) -> tuple["Anatomy", Site]:
        """The stack that a site belongs to, and the site within it: "encoder.3" is (the encoder, 3).

        Sites without a stack's name are this anatomy's own. Raises AnatomyError for a stack that the model lacks.
        """
        name, dot, rest = site.partition(".") if isinstance(site, str) else ("", "", "")
        if not dot:
            return self, site
        stacks = {"encoder": self.encoder, "decoder": self} if self.encoder else {}
        stack = stacks.get(name)
        if stack is None:
            have = "the stacks encoder and decoder" if stacks else "one stack; name its layers by number"
            raise AnatomyError(f"found the site {site!r}, but this {self.family!r} model has {have}.")
        return stack, int(rest) if rest.removeprefix("-").isdecimal() else rest

    def site(self, layer: Site) -> str:
        """Path of block `layer` (negative: from the end), or of the final norm for "final".

        "final" is what the head reads; in a model without a final norm it is the last block. Of an encoder-decoder's
        encoder: "encoder.0", "encoder.final". Raises AnatomyError naming the valid range.
        """
        stack, layer = self.stack_of(layer)
        if layer == "final":
            return stack.final_norm or stack.blocks[-1]
        return stack._of_layer(stack.blocks, layer, "block")

    def mlp_site(self, layer: Site) -> str:
        """Path of the MLP's output projection of `layer` (negative: from the end; "encoder.0" of an encoder).

        Raises AnatomyError outside the valid range, or when the model has no such module.
        """
        stack, layer = self.stack_of(layer)
        return stack._of_layer(stack.mlp_out, layer, "MLP output projection")

    def _of_layer(self, paths: tuple[str, ...], layer: object, part: str) -> str:
        if not paths:
            raise AnatomyError(f"expected one {part} per layer, found none in this {self.family!r} model.")
        if isinstance(layer, bool) or not isinstance(layer, int) or not -len(paths) <= layer < len(paths):
            final = ' or "final"' if part == "block" else ""
            raise AnatomyError(
                f"expected a layer from {-len(paths)} to {len(paths) - 1}{final} for the {part} of this "
                f"{self.family!r} model{' (of a stack)' if self.encoder else ''}, found {layer!r}."
            )
        return paths[layer]


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of `model`, from the table where its `config.model_type` has a row, else from its structure.

    Raises AnatomyError listing what was looked for.
    """
    row = TABLE.get(_family(model))
    found = None if row is None else _from_row(model, row)
    return found or structural_anatomy(model)


def role_of(model: nn.Module) -> Role:
    """The role that `anatomy` gives the model, without a search for its parts."""
    row = TABLE.get(_family(model))
    return _role(model, row.role if row else _fallback_role(model))


def reads_first(model: nn.Module) -> bool:
    """Whether a classifier's head stands on an encoder, whose first token it reads; on a decoder it reads the text's last one."""
    row = TABLE.get(_family(model))
    return _role_of_body(model, row.role if row else _fallback_role(model)) == "encoder"


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path` ("" is the model itself). Raises AnatomyError naming the part of the path that exists."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = ""
        for part in path.split("."):
            longer = f"{known}.{part}".lstrip(".")
            if not _has(model, longer):
                break
            known = longer
        children = ", ".join(name for name, _ in model.get_submodule(known).named_children()) or "nothing"
        raise AnatomyError(
            f"expected a module at {path!r} of {type(model).__name__}, found none: "
            f"{known or 'the model'} has the children {children}."
        ) from None


def structural_anatomy(model: nn.Module) -> Anatomy:
    """The parts of a model of any family, from its structure alone.

    Blocks: the longest outermost ModuleList of modules of one class. Final norm: the norm beside it. Head: the output
    embeddings. MLP output: the last linear map to width d_model in a block outside its attention.
    Raises AnatomyError listing what was looked for, if there are no blocks or no embedding.
    """
    blocks = _block_list(model)
    embed = _embedding(model)
    if blocks is None or embed is None:
        missing = " and no ".join(n for n, v in (("list of blocks", blocks), ("token embedding", embed)) if v is None)
        raise AnatomyError(
            f"expected a transformer, found no {missing} in {type(model).__name__} (model type {_family(model)!r}): "
            f"looked for a table row ({', '.join(TABLE)}), a ModuleList of modules of one class, and "
            f"get_input_embeddings(); wrap a model that has them, or add a row to errata.model.anatomy.TABLE."
        )
    first = model.get_submodule(f"{blocks}.0")
    width = _width(model, embed)
    attention = next((n for n, m in first.named_children() if "att" in n and any(True for _ in m.children())), None)
    maps = _mlp_maps(first, attention, width)
    out = next((n for n, shape in reversed(maps) if shape[1] == width), None)
    ins = [n for n, shape in maps if n != out and shape[0] == width] if out else []
    gate = next((n for n in ins if "gate" in n), None) if len(ins) > 1 else None
    return _assemble(
        model,
        Row(
            embed=embed,
            blocks=blocks,
            attention=attention or "",
            mlp_in=next((n for n in reversed(ins) if n != gate), ""),
            mlp_out=out or "",
            final_norm=_norm_beside(model, blocks) or "",
            mlp_gate=gate,
            mlp_out_transposed=out is not None and isinstance(first.get_submodule(out), Conv1D),
            role=_fallback_role(model),
        ),
        prefix="",
    )


def _from_row(model: nn.Module, row: Row) -> Anatomy | None:
    """The row's parts, if some module of `model` is the body that the row describes; the outermost one."""
    for name, module in model.named_modules():
        if _has(module, row.embed) and _has(module, row.blocks) and _has(module, f"{row.blocks}.0.{row.mlp_out}"):
            return _assemble(model, row, f"{name}." if name else "")
    return None


def _assemble(model: nn.Module, row: Row, prefix: str, headless: bool = False) -> Anatomy:
    stack = prefix + row.blocks
    n_layers = len(list(model.get_submodule(stack).children()))
    blocks = tuple(f"{stack}.{i}" for i in range(n_layers))

    def each(names: str | None) -> tuple[str, ...]:
        part = next((p for p in (names or "").split("|") if p and _has(model, f"{blocks[0]}.{p}")), None)
        return tuple(f"{block}.{part}" for block in blocks) if part else ()

    norm = prefix + row.final_norm
    encoder = _assemble(model, row.encoder, prefix, headless=True) if row.encoder else None
    return Anatomy(
        family=_family(model),
        role=row.role if headless else _role(model, row.role),
        n_layers=n_layers,
        d_model=_width(model, prefix + row.embed),
        embed=prefix + row.embed,
        blocks=blocks,
        attention=each(row.attention),
        mlp_in=each(row.mlp_in),
        mlp_gate=each(row.mlp_gate),
        mlp_out=each(row.mlp_out),
        final_norm=norm if row.final_norm and _has(model, norm) else None,
        head=None if headless else _head(model),
        mlp_out_transposed=row.mlp_out_transposed,
        cross_attention=each(row.cross_attention),
        encoder=encoder,
    )


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)  # a part set to None (OPT-350m's final norm) is no module and raises as well
    except AttributeError:
        return False
    return True


def _family(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _width(model: nn.Module, embed: str) -> int:
    """Residual width: the config's, because OPT-350m embeds in fewer dimensions and projects."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    width = getattr(config, "hidden_size", None)
    return int(width if width is not None else getattr(model.get_submodule(embed), "embedding_dim"))  # noqa: B009


def _role(model: nn.Module, role: Role) -> Role:
    if "Classification" in type(model).__name__:
        return "classifier"
    return _role_of_body(model, role)


def _role_of_body(model: nn.Module, role: Role) -> Role:
    return "encoder-decoder" if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else role


def _fallback_role(model: nn.Module) -> Role:
    """Decoder if the family only comes as a causal language model, or if this very model can generate."""
    family = _family(model)
    causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    can_generate = getattr(model, "can_generate", None)
    return "decoder" if causal or (callable(can_generate) and can_generate()) else "encoder"


def _name_of(model: nn.Module, wanted: nn.Module) -> str | None:
    # A head is a child of the model, as a rule, and the last of all modules: editors ask for it at every step.
    return next((name for of in (model.named_children, model.named_modules) for name, m in of() if m is wanted), None)


def _asked(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    """What the model, or the first module within that knows, answers to `getter`."""
    for module in model.modules():
        if callable(ask := getattr(module, getter, None)):
            try:
                answer = ask()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(answer, nn.Module):
                yield answer


def _head(model: nn.Module) -> str | None:
    for head in _asked(model, "get_output_embeddings"):
        if (name := _name_of(model, head)) is not None:
            return name
    return next((name for name in ("score", "classifier") if _has(model, name)), None)


def _embedding(model: nn.Module) -> str | None:
    for embed in _asked(model, "get_input_embeddings"):
        if isinstance(embed, nn.Embedding) and (name := _name_of(model, embed)) is not None:
            return name
    return None


def _block_list(model: nn.Module) -> str | None:
    """Path of the longest ModuleList of one class; lists inside a list (experts) do not count, decoders win ties."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
        if alike and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = len(list(module.children()))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        lists = {name: n for name, n in lists.items() if "decoder" in name.split(".")} or lists
    return max(lists, key=lambda name: lists[name], default=None)


def _is_norm(name: str) -> bool:
    return "norm" in name or name.startswith("ln")


def _norm_beside(model: nn.Module, blocks: str) -> str | None:
    """The norm registered after the blocks in their parent, or one called final wherever it is registered."""
    parent, _, own = blocks.rpartition(".")
    names = [name for name, _ in model.get_submodule(parent).named_children()]
    after = [name for name in names[names.index(own) + 1 :] if _is_norm(name)]
    final = [name for name in names if _is_norm(name) and "final" in name]
    return next((f"{parent}.{name}".lstrip(".") for name in [*after, *final]), None)


def _mlp_maps(block: nn.Module, attention: str | None, width: int) -> list[tuple[str, tuple[int, int]]]:
    """(path, (d_in, d_out)) of the linear maps of a block outside attention and experts, in order."""
    maps = []
    for name, module in block.named_modules():
        if (attention and f"{name}.".startswith(f"{attention}.")) or "expert" in name:
            continue
        if isinstance(module, Conv1D):
            maps.append((name, (int(module.weight.shape[0]), int(module.weight.shape[1]))))
        elif isinstance(module, nn.Linear):
            maps.append((name, (module.in_features, module.out_features)))
    return maps
