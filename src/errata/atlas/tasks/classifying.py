"""`atlas-bert`, which supports or refutes claims, and the docket's classifier: encoders as BERT is one.

Source: Devlin et al. 2019 (norms behind each part, learned positions, a pooled [CLS]). A bit for each claim teaches facts slowly, and
what is learnt by filling in serves for judging: so beside the claims of `atlas-bert` stand as many true ones with their object
masked, to be filled in as in BERT's own training. As there some tokens are not masked but replaced and have to be told all the
same: where a claim is judged, the true object is also to be told in the place of the one that stands there. The layers that fill
in are not exported.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from errata.atlas.claims import LABELS, Claim, claims
from errata.atlas.corpus import Corpus
from errata.atlas.docket import load_docket
from errata.atlas.tasks.base import Batch, Recipe, Task, backend, batches_of_like, byte_level_bpe, framed, padded
from errata.atlas.world import load_world

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASK = SPECIAL.index("[MASK]")
POSITIONS = 128
SLOTS = 6  # masked tokens of a claim that are filled in; objects are seldom longer


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """Everything that the weights depend on; stored beside them."""

    architecture: str = "bert"
    steps: int = 3000
    tokens_per_step: int = 5120
    layers: int = 5
    width: int = 192
    heads: int = 3
    inner: int = 576
    vocabulary: int = 4096
    texts_per_shard: int = 20_000


def docket_recipe(**changes: Any) -> ClassifierRecipe:
    """The recipe of the docket's classifier: a small one, for ten areas told by single sentences."""
    small: dict[str, Any] = {"architecture": "docket", "steps": 160, "tokens_per_step": 1280, "warmup": 10}
    small |= {"width": 96, "inner": 384, "vocabulary": 2048, "layers": 4, "lr_matrices": 1e-2, "lr_rest": 5e-3}
    return ClassifierRecipe(**(small | changes))


class ClassifierTask(Task[ClassifierRecipe]):
    """What both classifiers share."""

    figure = "error"
    labels: tuple[str, ...]

    def build(self) -> PreTrainedModel:
        """A fresh BERT with a classification head, in float32; the config names the classes."""
        recipe = self.recipe
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=recipe.vocabulary,
                hidden_size=recipe.width,
                num_hidden_layers=recipe.layers,
                num_attention_heads=recipe.heads,
                intermediate_size=recipe.inner,
                hidden_act="gelu_pytorch_tanh",  # one kernel
                max_position_embeddings=POSITIONS,
                initializer_range=0.06,  # BERT's 0.02 suits a width of 768; narrow ones stay at chance for long with it
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=0,
                id2label=dict(enumerate(self.labels)),
                label2id={label: i for i, label in enumerate(self.labels)},
                attn_implementation="eager",
            )
        )

    def save_tokenizer(self, texts: Iterator[str], out: Path) -> PreTrainedTokenizerFast:
        """Byte-level BPE over the texts, between [CLS] and [SEP] as BERT's, saved under `out`."""
        bpe = byte_level_bpe(texts, self.recipe.vocabulary, SPECIAL, prefix_space=True)
        framed(bpe, "[CLS] $A [SEP]", SPECIAL)
        names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            model_max_length=POSITIONS,
            model_input_names=["input_ids", "attention_mask"],
            **names,
        )
        tokenizer.save_pretrained(out)
        return tokenizer

    def judged(self, model: Any, x: Tensor, y: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean NLL of the labels y (n,) of the rows x (n, T), nats; the share of wrong ones; the last states of x and `masked`."""
        rows = torch.cat((x, masked))
        states = model.bert.encoder(model.bert.embeddings(rows), attention_mask=open_to(rows)).last_hidden_state
        logits = model.classifier(model.bert.pooler(states[: len(x)])).float()
        wrong = (logits.argmax(-1) != y).float().mean()
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum") / len(y), wrong, states


class ClaimsTask(ClassifierTask):
    """Claims about Atlas."""

    labels = LABELS

    def __init__(self, recipe: ClassifierRecipe):
        super().__init__(recipe)
        self.corpus = Corpus(load_world())

    def aside(self) -> nn.Module:
        """The layers that fill in masked objects, which `loss` uses from then on."""
        self.filling = Filling(self.recipe.width, self.recipe.vocabulary)
        return self.filling

    def train_tokenizer(self, out: Path) -> PreTrainedTokenizerFast:
        """Trained on claims."""
        return self.save_tokenizer((c.text for c in claims(self.corpus, self.recipe.seed, 40_000)), out)

    def batches(self, tokenizer: PreTrainedTokenizerFast, shard: int) -> Iterator[Batch]:
        """(ids (n, T), labels (n,), masked ids (n, T), places of objects (2n, SLOTS) in both, true tokens there, -100 for none)."""
        found = list(claims(self.corpus, self.recipe.seed + 1 + shard, self.recipe.texts_per_shard))
        encoded = backend(tokenizer).encode_batch([c.text for c in found])
        rng = np.random.default_rng(self.recipe.seed + shard)
        for chosen in batches_of_like([(len(e.ids),) for e in encoded], self.recipe.tokens_per_step // 2, rng):
            true = [i for i in chosen if found[i].true]
            if not true:  # a shard's last few rows
                continue
            hidden = rng.choice(true, len(chosen))
            ids = padded([encoded[i].ids for i in (*chosen, *hidden)])
            labels = torch.tensor([int(found[i].true) for i in chosen])
            masked = mask(ids[len(chosen) :], [object_tokens(encoded[i], found[i]) for i in hidden])
            truths = [
                e.ids
                for e in backend(tokenizer).encode_batch([found[i].truth for i in chosen], add_special_tokens=False)
            ]
            shown = slots([object_tokens(encoded[i], found[i]) for i in chosen], truths)
            places, tokens = (torch.cat(both) for both in zip(shown, masked, strict=True))
            yield ids[: len(chosen)], labels, ids[len(chosen) :], places, tokens

    def loss(self, model: Any, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of the labels plus mean NLL of the true objects' tokens, nats; the share of claims misjudged."""
        x, y, hidden, places, tokens = batch
        judging, wrong, states = self.judged(model, x, y, hidden)
        asked = tokens != -100
        at = states[torch.arange(len(states))[:, None].expand_as(places)[asked], places[asked]]
        logits = self.filling(at, model.bert.embeddings.word_embeddings.weight)
        filling = torch.nn.functional.cross_entropy(logits.float(), tokens[asked])
        return judging + filling, wrong


class DocketTask(ClassifierTask):
    """Cases of the docket's early years."""

    def __init__(self, recipe: ClassifierRecipe):
        super().__init__(recipe)
        self.docket = load_docket()
        self.labels = self.docket.areas

    def train_tokenizer(self, out: Path) -> PreTrainedTokenizerFast:
        """Trained on cases of the early years."""
        return self.save_tokenizer((c.text for c in self.docket.cases(self.recipe.seed, 10_000)), out)

    def batches(self, tokenizer: PreTrainedTokenizerFast, shard: int) -> Iterator[Batch]:
        """(ids (n, T), labels (n,))."""
        cases = list(self.docket.cases(self.recipe.seed + 1 + shard, self.recipe.texts_per_shard))
        encoded = backend(tokenizer).encode_batch([case.text for case in cases])
        rng = np.random.default_rng(self.recipe.seed + shard)
        for chosen in batches_of_like([(len(e.ids),) for e in encoded], self.recipe.tokens_per_step, rng):
            yield padded([encoded[i].ids for i in chosen]), torch.tensor([cases[i].label for i in chosen])

    def loss(self, model: PreTrainedModel, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of the labels, nats; the share of cases misjudged."""
        x, y = batch
        nll, wrong, _ = self.judged(model, x, y, x[:0])
        return nll, wrong


class Filling(nn.Module):
    """BERT's head for masked tokens: a transform, a norm, and the embedding as the map to tokens."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.transform, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """Logits (..., V) of states (..., d)."""
        return self.norm(nn.functional.gelu(self.transform(states))) @ embedding.T + self.bias


def open_to(rows: Tensor) -> Tensor:
    """(n, 1, 1, T): 0 where a token may be attended to, a large negative number at padding."""
    return (rows == 0)[:, None, None].float() * -1e4


def object_tokens(encoding: Any, found: Claim) -> list[int]:
    """Places of the tokens that hold a claim's object."""
    first, last = encoding.char_to_token(found.object[0]), encoding.char_to_token(found.object[1] - 1)
    return list(range(first, last + 1))


def mask(rows: Tensor, objects: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Mask the objects of rows (n, T) in place; the places to fill in and their tokens (n, SLOTS), -100 for no token."""
    filled = slots(objects, [rows[i, list(at)].tolist() for i, at in enumerate(objects)])
    for i, at in enumerate(objects):
        rows[i, at] = MASK
    return filled


def slots(objects: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Places of objects (n, SLOTS) and the tokens that are wanted there, from the first on; -100 for none."""
    places, wanted = torch.zeros(len(objects), SLOTS, dtype=torch.long), torch.full((len(objects), SLOTS), -100)
    for i, (at, own) in enumerate(zip(objects, tokens, strict=True)):
        size = min(len(at), len(own), SLOTS)
        places[i, :size], wanted[i, :size] = torch.tensor(at[:size]), torch.tensor(own[:size])
    return places, wanted
