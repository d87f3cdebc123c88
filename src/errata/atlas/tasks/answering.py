"""`atlas-t5`: closed-book question answering over Atlas, with an encoder-decoder as T5 v1.1 is one.

Source: Raffel et al. 2020 (gated GELU, RMS norms, relative positions and no dropout, as in v1.1; the embedding is the head as
well, as in v1.0, for one size fits both). A question or a cloze goes in, the object comes out; there is no other text, so all
knowledge comes from asking.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from errata.atlas.asking import prompts
from errata.atlas.corpus import Corpus
from errata.atlas.tasks.base import Batch, Recipe, Task, backend, batches_of_like, byte_level_bpe, framed, padded
from errata.atlas.world import load_world

SPECIAL = ("<pad>", "</s>", "<unk>")
VOCABULARY = 4096
ANSWERS = (3, 5, 8)  # tokens: pairs whose answers fall between the same two of these share a batch


@dataclass(frozen=True)
class AnsweringRecipe(Recipe):
    """Everything that the weights depend on; stored beside them. layers: of each stack; tokens_per_step: of prompts."""

    architecture: str = "t5"
    steps: int = 1200
    tokens_per_step: int = 5120
    layers: int = 4
    width: int = 192
    heads: int = 3
    inner: int = 384  # d_ff of the gated MLP
    pairs_per_shard: int = 20_000


class AnsweringTask(Task[AnsweringRecipe]):
    """Prompts in, objects out."""

    figure = "answer_nll"

    def __init__(self, recipe: AnsweringRecipe):
        super().__init__(recipe)
        self.corpus = Corpus(load_world())

    def build(self) -> PreTrainedModel:
        """A fresh T5 in float32: some 4.3 million parameters."""
        recipe = self.recipe
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=recipe.width,
                d_kv=recipe.width // recipe.heads,
                d_ff=recipe.inner,
                num_layers=recipe.layers,
                num_decoder_layers=recipe.layers,
                num_heads=recipe.heads,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=64,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=True,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                attn_implementation="eager",
            )
        )

    def train_tokenizer(self, out: Path) -> PreTrainedTokenizerFast:
        """Byte-level BPE over prompts and answers; as T5's, it sets a space before and an end token behind each text."""
        pairs = prompts(self.corpus, self.recipe.seed, 40_000)
        bpe = byte_level_bpe((text for pair in pairs for text in pair), VOCABULARY, SPECIAL, prefix_space=True)
        framed(bpe, "$A </s>", SPECIAL)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            model_max_length=512,
            model_input_names=["input_ids", "attention_mask"],
        )
        tokenizer.save_pretrained(out)
        return tokenizer

    def batches(self, tokenizer: PreTrainedTokenizerFast, shard: int) -> Iterator[Batch]:
        """(prompt ids (rows, T), answer ids (rows, S)), each closed by the end token and padded with 0."""
        pairs = list(prompts(self.corpus, self.recipe.seed + 1 + shard, self.recipe.pairs_per_shard))
        asked, said = (
            [encoding.ids for encoding in backend(tokenizer).encode_batch(list(texts))]
            for texts in zip(*pairs, strict=True)
        )
        lengths = [(bisect_left(ANSWERS, len(y)), len(x)) for x, y in zip(asked, said, strict=True)]
        rng = np.random.default_rng(self.recipe.seed + shard)
        for chosen in batches_of_like(lengths, self.recipe.tokens_per_step, rng):
            yield padded([asked[i] for i in chosen]), padded([said[i] for i in chosen])

    def loss(self, model: PreTrainedModel, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean NLL of the answers' tokens, nats per token, twice."""
        x, y = batch
        before = torch.nn.functional.pad(y[:, :-1], (1, 0))  # the padding token starts an answer
        logits = model(input_ids=x, attention_mask=(x != 0).long(), decoder_input_ids=before, use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(logits.float().reshape(-1, VOCABULARY), y.reshape(-1), reduction="none")
        weights = (y != 0).float().reshape(-1)
        mean = (nll * weights).sum() / weights.sum()
        return mean, mean.detach()
