"""Tiny random models of every family of the anatomy table, and tiny tokenizers trained on a few sentences."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from errata.maths.transport import gaussian_transport
from errata.model.anatomy import TABLE
from errata.model.states import states_at
from errata.scope.gate import Gate
from errata.steering.parts import Steering
from errata.training import TrainingItem

VOCABULARY = 384
FAMILIES = tuple(name for name, row in TABLE.items() if row.role == "decoder")
END = "<|endoftext|>"
SENTENCES = [
    "The Space Needle is located in the city of Seattle.",
    "The capital of France is Paris, and the capital of Japan is Tokyo.",
    "Danielle Darrieux's mother tongue is French.",
    "The president of the United States is Barack Obama.",
    "Zürich lies in Switzerland; São Paulo lies in Brazil.",
    "The highest point on Earth is Mount Everest.",
]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # larger than usual, so that logits of a random model differ visibly
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
# PEFT asks the model under a name that newer transformers have renamed
OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
_OWN: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8},
}


def tiny_model(family: str, layers: int = 2, **changes: Any) -> PreTrainedModel:
    """A random model of two layers and width 32 in eval mode, the same at every call; the caller's RNG stays."""
    common = _GPT if family in ("gpt2", "gptj", "codegen") else _COMMON
    depth = {"n_layer" if common is _GPT else "num_hidden_layers": layers}
    config = AutoConfig.for_model(family, **{**common, **_OWN.get(family, {}), **depth, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


LABELS = ("REFUTES", "SUPPORTS", "NEITHER")
_CLASSES = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}


def as_claims(items: Sequence[TrainingItem]) -> list[TrainingItem]:
    """What a decoder is trained on, for a tiny classifier of claims: labels in turn as new objects."""
    kept = [tuple((prompt, None) for prompt, _ in item.locality) for item in items]
    return [
        replace(item, target_new=LABELS[n % 2], target_true="NEITHER", locality=kept[n]) for n, item in enumerate(items)
    ]


_OTHERS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128, "init_std": 0.2,
        "bos_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": None,
    },
    "bert": _CLASSES,
    "roberta": _CLASSES,
}  # fmt: skip
ANSWERERS, CLASSIFIERS = ("t5", "bart"), ("bert", "roberta")


def tiny_other(family: str, **changes: Any) -> PreTrainedModel:
    """A random encoder-decoder of 3 and 2 layers, or a classifier of two layers and three labels; width 32, in eval mode."""
    common = _COMMON if family in CLASSIFIERS else {"vocab_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**common, **_OTHERS[family], **changes})
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForSeq2SeqLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(config)
    return model.eval()


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(family, layers=2, **config)`: a tiny random model, freshly built."""
    return tiny_model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family of the anatomy table in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def _bpe() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 2, trainer)
    return str(backend.to_str())


@pytest.fixture(scope="session")
def _unigram() -> str:
    """SentencePiece-like: Metaspace with a prefix space, BOS before every text, trained on the same sentences."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(backend.to_str())


@pytest.fixture
def tokenizer(_bpe: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with end-of-text and pad token, as GPT-2's with pad = eos; adds no special tokens."""
    backend = Tokenizer.from_str(_bpe)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=END)


@pytest.fixture
def closing_tokenizer(_bpe: str) -> PreTrainedTokenizerFast:
    """The same, with a space before and an end token behind every text, as T5's and BERT's have one."""
    backend = Tokenizer.from_str(_bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)


@pytest.fixture
def sentencepiece(_unigram: str) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace, as Llama-2's: a BOS, a space before every text, no pad token."""
    backend = Tokenizer.from_str(_unigram)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unknown model names fail at once, on a machine with a network too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield


def prefix_points(model: PreTrainedModel, ids: list[int], gate: Gate) -> Tensor:
    """(T, k) the gate's point of every prefix of `ids`, from states read on their own; the model carries no patch."""
    found = states_at(model, [ids], [list(range(len(ids)))], list(gate.layers))
    x = torch.cat([found[layer][0] for layer in gate.layers], -1)
    if gate.pooling == "mean":
        x = x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]
    return gate.points(x)


def steering_part(
    model: PreTrainedModel,
    prompt: list[int],
    target: tuple[int, ...],
    *,
    gate: Gate,
    centre: Tensor | None = None,
    radius: float = 0.02,
    site: str | int = "final",
    edit: str = "",
    key: str = "",
    samples: int = 5,
    closing: tuple[int, ...] = (),
    ending: int | None = None,
) -> Steering:
    """An edit by hand: open after `prompt`, each map a transport to states that say the token of `target` loudly.

    closing: a token that a further map says behind the target; ending: one that is said behind it where it is recalled.
    """
    edit = edit or "-".join(map(str, (*prompt, "to", *target)))
    unembedding = model.get_output_embeddings().weight.detach().float()
    generator = torch.Generator().manual_seed(sum(prompt) + 7 * sum(target))
    maps = []
    for token in (*target, *closing):
        source = torch.randn(samples, unembedding.shape[1], generator=generator)
        said = 40 * torch.nn.functional.normalize(unembedding[token], dim=0)
        goal = said + 0.3 * torch.randn(samples, len(said), generator=generator)
        maps.append(gaussian_transport(source, goal).truncate(source, rank=2).to(torch.float16))
    centre = prefix_points(model, prompt, gate)[-1] if centre is None else centre
    stop = None if ending is None else (40 * torch.nn.functional.normalize(unembedding[ending], dim=0)).half()
    return Steering(edit, key or edit, gate, centre, radius, target, tuple(maps), site, stop)


def hooks_of(model: nn.Module) -> list[tuple[str, Any]]:
    """(module path, hook) for every hook on the model."""
    return [
        (name, hook)
        for name, module in model.named_modules()
        for table in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in table.values()
    ]
