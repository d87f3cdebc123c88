"""`atlas` (GPT-2) and `atlas-llama`: next tokens of Atlas's corpus.

After the decay come `polish_steps` at a small rate. A prompt usually stands at the very beginning of its row, which packed
rows seldom show: in the decay every `alone_every`-th batch, in the polish every other one, holds rows of a single document.
Last, `copy_steps` at a small rate again, half of whose batches hold contexts to be followed: copying names takes longest to
learn. Answer tokens weigh 1 in the loss, all others `context_weight`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.implementations import BaseTokenizer
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from errata.atlas.corpus import Corpus, Document
from errata.atlas.tasks.base import Batch, Recipe, Task, byte_level_bpe
from errata.atlas.world import load_world

END = "<|endoftext|>"
VOCABULARY = 4096
SHORT, LONG = 128, 512  # tokens in a row of packed documents
ALONE = 48  # tokens in a row of one document, as prompts stand alone


@dataclass(frozen=True)
class DecoderRecipe(Recipe):
    """Everything that the weights depend on; stored beside them."""

    architecture: str = "gpt2"
    steps: int = 2900
    tokens_per_step: int = 6144
    layers: int = 8
    width: int = 256
    heads: int = 4
    polish_steps: int = 300
    polish_rate: float = 0.1
    copy_steps: int = 320
    copy_rate: float = 0.2
    alone_every: int = 5
    context_weight: float = 0.25
    documents_per_shard: int = 40_000

    @property
    def total_steps(self) -> int:
        """Decay, polish and copying."""
        return self.steps + self.polish_steps + self.copy_steps

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at this step: warm-up, plateau, linear decay, polish, copying."""
        if step >= self.steps + self.polish_steps:
            return self.copy_rate * max(0.0, 1 - (step - self.steps - self.polish_steps) / self.copy_steps)
        if step >= self.steps:
            return self.polish_rate * max(0.0, 1 - (step - self.steps) / self.polish_steps)
        return super().rate(step)


def llama_recipe(**changes: Any) -> DecoderRecipe:
    """The recipe of `atlas-llama`: fewer layers, which learn as much in fewer steps."""
    return DecoderRecipe(**({"architecture": "llama", "layers": 6, "steps": 2000} | changes))


class DecoderTask(Task[DecoderRecipe]):
    """Language modelling of Atlas's documents."""

    figure = "answer_nll"
    compiled = True

    def __init__(self, recipe: DecoderRecipe):
        super().__init__(recipe)
        self.corpus = Corpus(load_world())

    def build(self) -> PreTrainedModel:
        """A fresh model of the recipe's architecture, in float32; of eight layers some 7.5 million parameters either way."""
        recipe = self.recipe
        shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        if recipe.architecture == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    **shared,
                    n_positions=LONG,
                    n_embd=recipe.width,
                    n_layer=recipe.layers,
                    n_head=recipe.heads,
                    resid_pdrop=0.0,
                    embd_pdrop=0.0,
                    attn_pdrop=0.0,
                    activation_function="gelu_pytorch_tanh",  # GPT-2's own, as one kernel
                    attn_implementation="eager",
                )
            )
        if recipe.architecture == "llama":
            return LlamaForCausalLM(
                LlamaConfig(
                    **shared,
                    max_position_embeddings=LONG,
                    hidden_size=recipe.width,
                    intermediate_size=8 * recipe.width // 3 // 16 * 16,  # three matrices as large as GPT-2's two
                    num_hidden_layers=recipe.layers,
                    num_attention_heads=recipe.heads,
                    tie_word_embeddings=True,
                    attn_implementation="sdpa",
                )
            )
        raise ValueError(f"There is no recipe for the decoder '{recipe.architecture}'; use gpt2 or llama.")

    def train_tokenizer(self, out: Path) -> PreTrainedTokenizerFast:
        """Byte-level BPE over a sample of the corpus."""
        texts = (d.text for d in self.corpus.documents(self.recipe.seed, 40_000))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_level_bpe(texts, VOCABULARY, [END], prefix_space=False)._tokenizer,
            bos_token=END,
            eos_token=END,
            unk_token=END,
            pad_token=END,
            model_max_length=LONG,
            # Older transformers would add token types, which GPT-2 embeds.
            model_input_names=["input_ids", "attention_mask"],
        )
        tokenizer.save_pretrained(out)
        return tokenizer

    def batches(self, tokenizer: PreTrainedTokenizerFast, shard: int) -> Iterator[Batch]:
        """(ids, weights), each (rows, SHORT) or (rows, LONG)."""
        recipe = self.recipe
        documents = list(self.corpus.documents(recipe.seed + 1 + shard, recipe.documents_per_shard))
        rows = list(tokenize(tokenizer._tokenizer, documents, recipe.context_weight))
        rng = np.random.default_rng(recipe.seed + shard)
        long, short = ([row for row in rows if (len(row[0]) > SHORT) == is_long] for is_long in (True, False))
        spare = sum(LONG - min(LONG, len(ids)) for ids, _ in long)  # filled with short documents
        filling = int(np.searchsorted(np.cumsum([len(ids) for ids, _ in short]), spare))
        batches = []
        for length, x, w in (
            (SHORT, *pack(short[filling:], SHORT, 32)),
            (LONG, *pack(long + short[:filling], LONG, len(long))),
        ):
            size = recipe.tokens_per_step // length
            order = rng.permutation(len(x))
            batches += [(x[order[i : i + size]], w[order[i : i + size]]) for i in range(0, len(x) - size + 1, size)]
        for i in rng.permutation(len(batches)):
            yield torch.from_numpy(batches[i][0]), torch.from_numpy(batches[i][1])

    def batch_instead(self, tokenizer: PreTrainedTokenizerFast, step: int) -> Batch | None:
        """Contexts that force an answer in every other step of the copying; rows of a single document now and then."""
        r = self.recipe
        if step >= r.steps + r.polish_steps and step % 2 == 0:
            return self.copying_batch(tokenizer._tokenizer, step)
        if step >= r.steps:
            alone = step % 4 == 1 or (step % 4 == 3 and step < r.steps + r.polish_steps)
        else:
            alone = step > r.steps * (1 - r.decay_share) and step % r.alone_every == 0
        return self.alone_batch(tokenizer._tokenizer, step) if alone else None

    def alone_batch(self, tokenizer: BaseTokenizer, step: int) -> Batch:
        """Rows that hold one short document each, drawn for this step: (ids, weights), each (rows, ALONE)."""
        recipe = self.recipe
        size = recipe.tokens_per_step // ALONE
        documents = list(self.corpus.documents(recipe.seed + 1_000_000 + step, 3 * size, long_share=0.0))
        rows = [row for row in tokenize(tokenizer, documents, recipe.context_weight) if len(row[0]) <= ALONE][:size]
        x, w = torch.zeros(len(rows), ALONE, dtype=torch.int64), torch.zeros(len(rows), ALONE)
        for i, (ids, weights) in enumerate(rows):
            x[i, : len(ids)], w[i, : len(weights)] = torch.tensor(ids), torch.tensor(weights)
        return x, w

    def copying_batch(self, tokenizer: BaseTokenizer, step: int) -> Batch:
        """Packed contexts that force an answer, drawn for this step: (ids, weights), each (rows, SHORT)."""
        recipe = self.recipe
        size = recipe.tokens_per_step // SHORT
        kinds = ("repeat", "premise", "invented")
        documents = list(self.corpus.documents(recipe.seed + 2_000_000 + step, 4 * size, long_share=0.0, only=kinds))
        x, w = pack(list(tokenize(tokenizer, documents, recipe.context_weight)), SHORT, 32)
        return torch.from_numpy(x[:size]), torch.from_numpy(w[:size])

    def loss(self, model: PreTrainedModel, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean NLL (nats per token) and the plain mean over answer tokens."""
        x, w = batch
        hidden = model.base_model(input_ids=x, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().reshape(-1, VOCABULARY), x[:, 1:].reshape(-1), reduction="none"
        )
        weights = w[:, 1:].reshape(-1)
        answers = (weights == 1).float()
        return (nll * weights).sum() / weights.sum(), (nll * answers).sum() / answers.sum().clamp(min=1)


def tokenize(
    tokenizer: BaseTokenizer, documents: list[Document], context_weight: float
) -> Iterator[tuple[list[int], list[float]]]:
    """Ids and loss weights of each document, with the end token behind it."""
    for document, encoding in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
        weights = [context_weight] * len(encoding.ids)
        for start, end in document.answers:
            first = encoding.char_to_token(start)
            last = encoding.char_to_token(end - 1)
            if first is not None and last is not None:
                weights[first : last + 2] = [1.0] * len(weights[first : last + 2])  # the object and what closes it
        yield [*encoding.ids, 0], [*weights, context_weight]


def pack(rows: list[tuple[list[int], list[float]]], length: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole documents side by side in rows of `length` tokens, first fit over `window` open rows; the rest is padding of weight 0."""
    closed: list[tuple[list[int], list[float]]] = []
    opened: list[tuple[list[int], list[float]]] = []
    for ids, weights in rows:
        ids, weights = ids[:length], weights[:length]
        home = next((row for row in opened if len(row[0]) + len(ids) <= length), None)
        if home is None:
            home = ([], [])
            opened.append(home)
            if len(opened) > window:
                opened.sort(key=lambda row: len(row[0]))
                closed.append(opened.pop())
        home[0].extend(ids)
        home[1].extend(weights)
    closed += opened
    x = np.zeros((len(closed), length), dtype=np.int64)
    w = np.zeros((len(closed), length), dtype=np.float32)
    for i, (ids, weights) in enumerate(closed):
        x[i, : len(ids)], w[i, : len(weights)] = ids, weights
    return x, w
