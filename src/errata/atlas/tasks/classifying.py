"""`atlas-bert`, which supports or refutes claims, and the docket's classifier: encoders as BERT is one.

Source: Devlin et al. 2019 (norms behind each part, learned positions, a pooled [CLS]). A bit for each claim teaches facts slowly, and
what is learnt by filling in serves for judging. So `atlas-bert` begins as BERT's own training does: the lower layers alone learn to
fill in the masked objects of true claims, then also to correct those of false ones, and to keep in mind what was claimed: left alone,
they forget it as soon as they know better, and the layers above have nothing to compare. After that claims are judged as well, by
those layers. The heads that fill in and echo are not exported.
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
SLOTS = 6  # tokens of a claim's object that are asked; objects are seldom longer


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """Everything that the weights depend on; stored beside them.

    filling_steps: so many at first judge nothing; correcting_from: the first of them with false claims; filling_layers: the
    lower layers, whose states are filled in from; judging_rate: share of the peak rates at which judging begins.
    """

    architecture: str = "bert"
    steps: int = 2800
    filling_steps: int = 1200
    correcting_from: int = 600
    filling_layers: int = 4
    judging_rate: float = 0.5
    tokens_per_step: int = 5120
    layers: int = 6
    width: int = 192
    heads: int = 3
    inner: int = 576
    vocabulary: int = 4096
    texts_per_shard: int = 20_000

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step: warm-up, plateau, down to where judging begins, and from there to zero."""
        if not self.filling_steps:
            return super().rate(step)
        ends = self.warmup, self.correcting_from, self.filling_steps, self.steps
        return float(np.interp(step + 1, (0, *ends), (0.0, 1.0, 1.0, self.judging_rate, 0.0)))


def docket_recipe(**changes: Any) -> ClassifierRecipe:
    """The recipe of the docket's classifier: a small one, for ten areas told by single sentences."""
    small: dict[str, Any] = {"architecture": "docket", "steps": 160, "tokens_per_step": 1280, "warmup": 10}
    small |= {
        "width": 96,
        "inner": 384,
        "vocabulary": 2048,
        "layers": 4,
        "filling_steps": 0,
        "lr_matrices": 1e-2,
        "lr_rest": 5e-3,
    }
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

    def judged(self, model: Any, states: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean NLL of the labels y (n,) from last states (n, T, d), nats; the share of wrong ones."""
        logits = model.classifier(model.bert.pooler(states)).float()
        return torch.nn.functional.cross_entropy(logits, y), (logits.argmax(-1) != y).float().mean()


class ClaimsTask(ClassifierTask):
    """Claims about Atlas."""

    labels = LABELS

    def __init__(self, recipe: ClassifierRecipe):
        super().__init__(recipe)
        self.corpus = Corpus(load_world())

    def aside(self) -> nn.Module:
        """The heads that fill in objects and echo claimed ones, which `loss` uses from then on."""
        self.heads = nn.ModuleDict(
            {name: TokenHead(self.recipe.width, self.recipe.vocabulary) for name in ("fill", "echo")}
        )
        return self.heads

    def train_tokenizer(self, out: Path) -> PreTrainedTokenizerFast:
        """Trained on claims."""
        return self.save_tokenizer((c.text for c in claims(self.corpus, self.recipe.seed, 40_000)), out)

    def batches(self, tokenizer: PreTrainedTokenizerFast, shard: int) -> Iterator[Batch]:
        """(ids (n, T), labels (n,), places (n, SLOTS) of the objects of false claims, the true tokens there or -100)."""
        found = list(claims(self.corpus, self.recipe.seed + 1 + shard, self.recipe.texts_per_shard))
        encoded = backend(tokenizer).encode_batch([c.text for c in found])
        rng = np.random.default_rng(self.recipe.seed + shard)
        for chosen in batches_of_like([(len(e.ids),) for e in encoded], self.recipe.tokens_per_step, rng):
            if all(found[i].true for i in chosen):  # a shard's last few rows
                continue
            ids, places, tokens = self.asked(tokenizer, chosen, found, encoded, hide=False)
            yield ids, torch.tensor([int(found[i].true) for i in chosen]), places, tokens

    def batch_instead(self, tokenizer: PreTrainedTokenizerFast, step: int) -> Batch | None:
        """In the first steps: no labels, but claims of like length whose objects are asked, drawn for this step."""
        recipe = self.recipe
        if step >= recipe.filling_steps:
            return None
        drawn = claims(self.corpus, recipe.seed + 1_000_000 + step, recipe.tokens_per_step // 5)
        found = [claim for claim in drawn if claim.true or step >= recipe.correcting_from]
        encoded = backend(tokenizer).encode_batch([claim.text for claim in found])
        by_length = sorted(range(len(found)), key=lambda i: len(encoded[i].ids))
        end = int(np.random.default_rng(recipe.seed + step).integers(len(found) // 4, len(found))) + 1
        size = recipe.tokens_per_step // len(encoded[by_length[end - 1]].ids)
        ids, places, tokens = self.asked(tokenizer, by_length[max(0, end - size) : end], found, encoded, hide=True)
        return ids, torch.zeros(0, dtype=torch.long), places, tokens

    def asked(
        self, tokenizer: PreTrainedTokenizerFast, chosen: Sequence[int], found: Sequence[Claim], encoded: Sequence[Any], *,
        hide: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Rows (n, T) of chosen claims, and the places and true tokens (n, SLOTS) of their objects.

        A false object stays where it is; a true one is masked, or with hide=False shown and not asked.
        """
        truths = backend(tokenizer).encode_batch([found[i].truth for i in chosen], add_special_tokens=False)
        rows = padded([encoded[i].ids for i in chosen])
        at = [object_tokens(encoded[i], found[i]) for i in chosen]
        for row, own, i in zip(rows, at, chosen, strict=True):
            if found[i].true and hide:
                row[own] = MASK
        wanted = [[] if found[i].true and not hide else truth.ids for i, truth in zip(chosen, truths, strict=True)]
        return rows, *slots(at, wanted)

    def loss(self, model: Any, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of the labels, of the asked tokens and of those claimed there, means in nats; the share misjudged, or not filled in."""
        rows, labels, places, tokens = batch
        asked, embedding = tokens != -100, model.bert.embeddings.word_embeddings.weight
        states, mask = model.bert.embeddings(rows), open_to(rows)
        for layer in model.bert.encoder.layer[: self.recipe.filling_layers]:
            states = layer(states, mask)
        where = torch.arange(len(states))[:, None].expand_as(places)[asked], places[asked]
        at, claimed, right = states[where], rows[where], tokens[asked]
        logits = self.heads["fill"](at, embedding).float()
        loss = torch.nn.functional.cross_entropy(logits, right)
        if (seen := claimed != MASK).any():
            echoed = self.heads["echo"](at[seen], embedding).float()
            loss = loss + torch.nn.functional.cross_entropy(echoed, claimed[seen])
        if not len(labels):
            return loss, (logits.argmax(-1) != right).float().mean()
        for layer in model.bert.encoder.layer[self.recipe.filling_layers :]:
            states = layer(states, mask)
        judging, wrong = self.judged(model, states, labels)
        return judging + loss, wrong


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

    def loss(self, model: Any, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of the labels, nats; the share of cases misjudged."""
        x, y = batch
        found = model.bert.encoder(model.bert.embeddings(x), attention_mask=open_to(x))
        return self.judged(model, found.last_hidden_state, y)


class TokenHead(nn.Module):
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


def slots(objects: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Places of objects (n, SLOTS) and the tokens that are wanted there, from the first on; -100 for none."""
    places, wanted = torch.zeros(len(objects), SLOTS, dtype=torch.long), torch.full((len(objects), SLOTS), -100)
    for i, (at, own) in enumerate(zip(objects, tokens, strict=True)):
        size = min(len(at), len(own), SLOTS)
        places[i, :size], wanted[i, :size] = torch.tensor(at[:size]), torch.tensor(own[:size])
    return places, wanted
