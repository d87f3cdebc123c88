"""Train `atlas` (GPT-2) or `atlas-llama` from scratch: `python -m errata.atlas.train --architecture gpt2 --out runs/atlas`.

Resumable: the newest checkpoint in `--out` is picked up, and shards of the corpus are pure functions of (seed, shard), so a
run that was stopped goes on with the same documents. Learning rate: warm-up, plateau, linear decay over the last 55 % of
`--steps`; then `polish_steps` at a small rate. A prompt usually stands at the very beginning of its row, which packed rows
seldom show: in the decay every `alone_every`-th batch, in the polish every other one, holds rows of a single document. Last,
`copy_steps` at a small rate again, half of whose batches hold contexts to be followed: copying names takes longest to learn.
Raising `--steps` before the decay has begun only lengthens the plateau. Hidden matrices are trained with Muon, everything
else with AdamW. Answer tokens weigh 1 in the loss, all others `context_weight`.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.implementations import BaseTokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from errata.atlas.corpus import Corpus, Document
from errata.atlas.muon import Muon
from errata.atlas.world import load_world

END = "<|endoftext|>"
VOCABULARY = 4096
SHORT, LONG = 128, 512  # tokens in a row of packed documents
ALONE = 48  # tokens in a row of one document, as prompts stand alone


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on; stored beside them."""

    architecture: str = "gpt2"
    steps: int = 2900
    tokens_per_step: int = 6144
    layers: int = 8
    width: int = 256
    heads: int = 4
    lr_matrices: float = 3e-3
    lr_rest: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay_share: float = 0.55
    polish_steps: int = 300
    polish_rate: float = 0.1
    copy_steps: int = 320
    copy_rate: float = 0.2
    alone_every: int = 5
    context_weight: float = 0.25
    documents_per_shard: int = 40_000
    seed: int = 20160101


def build(recipe: Recipe) -> PreTrainedModel:
    """A fresh model of the recipe's architecture, in float32; some 7.5 million parameters either way."""
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
    raise ValueError(f"There is no recipe for the architecture '{recipe.architecture}'; use gpt2 or llama.")


def train_tokenizer(out: Path, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a sample of the corpus: any UTF-8 text has tokens."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    texts = (d.text for d in Corpus(load_world()).documents(seed, 40_000))
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, min_frequency=2, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
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


def alone_batch(
    tokenizer: BaseTokenizer, corpus: Corpus, recipe: Recipe, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of rows that hold one short document each, drawn for this step: (ids, weights), each (rows, ALONE)."""
    size = recipe.tokens_per_step // ALONE
    documents = list(corpus.documents(recipe.seed + 1_000_000 + step, 3 * size, long_share=0.0))
    rows = [row for row in tokenize(tokenizer, documents, recipe.context_weight) if len(row[0]) <= ALONE][:size]
    x, w = torch.zeros(len(rows), ALONE, dtype=torch.int64), torch.zeros(len(rows), ALONE)
    for i, (ids, weights) in enumerate(rows):
        x[i, : len(ids)], w[i, : len(weights)] = torch.tensor(ids), torch.tensor(weights)
    return x, w


def copying_batch(
    tokenizer: BaseTokenizer, corpus: Corpus, recipe: Recipe, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of packed contexts that force an answer, drawn for this step: (ids, weights), each (rows, SHORT)."""
    size = recipe.tokens_per_step // SHORT
    kinds = ("repeat", "premise", "invented")
    documents = list(corpus.documents(recipe.seed + 2_000_000 + step, 4 * size, long_share=0.0, only=kinds))
    x, w = pack(list(tokenize(tokenizer, documents, recipe.context_weight)), SHORT, 32)
    return torch.from_numpy(x[:size]), torch.from_numpy(w[:size])


def shard_batches(
    tokenizer: BaseTokenizer, corpus: Corpus, recipe: Recipe, shard: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one shard in a fixed random order: (ids, weights), each (rows, SHORT) or (rows, LONG)."""
    documents = list(corpus.documents(recipe.seed + 1 + shard, recipe.documents_per_shard))
    rows = list(tokenize(tokenizer, documents, recipe.context_weight))
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


def has_fast_bfloat16() -> bool:
    """Whether matrices multiply faster in bfloat16 than in float32 here; processors without it are some fifty times slower."""
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(512, 512, dtype=dtype)
        x @ x
        start = time.perf_counter()
        for _ in range(4):
            x @ x
        seconds.append(time.perf_counter() - start)
    return seconds[0] < seconds[1]


class Trainer:
    """Model, optimisers and the position in the corpus."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out
        torch.manual_seed(recipe.seed)
        fresh = not (out / "tokenizer.json").exists()
        self.tokenizer = train_tokenizer(out, recipe.seed) if fresh else PreTrainedTokenizerFast.from_pretrained(out)
        self.model = build(recipe)
        self.half = has_fast_bfloat16()
        named = dict(self.model.named_parameters())
        matrices = [n for n, p in named.items() if p.ndim == 2 and (".h." in n or ".layers." in n)]
        rest = [n for n in named if n not in set(matrices)]
        self.groups = {
            "muon": (matrices, Muon(
                [named[n] for n in matrices], lr=recipe.lr_matrices, weight_decay=recipe.weight_decay, half=self.half
            )),
            "adamw": (rest, torch.optim.AdamW(
                [named[n] for n in rest], lr=recipe.lr_rest, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
            )),
        }  # fmt: skip
        self.step, self.shard, self.batch = 0, 0, 0
        self.resume()

    def checkpoint(self) -> None:
        """Write everything that a later run needs, to a temporary name first."""
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        for group, (names, optimiser) in self.groups.items():
            for name, parameter in zip(names, optimiser.param_groups[0]["params"], strict=True):
                for key, value in optimiser.state[parameter].items():
                    tensors[f"{group}.{key}.{name}"] = torch.as_tensor(value).clone()
        place = {"step": str(self.step), "shard": str(self.shard), "batch": str(self.batch)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.out / "checkpoint.tmp", metadata=place)
        os.replace(self.out / "checkpoint.tmp", self.out / "checkpoint.safetensors")

    def resume(self) -> None:
        """Go on from the checkpoint in `out`, if there is one."""
        from safetensors import safe_open

        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            place = file.metadata()
        self.step, self.shard, self.batch = (int(place[k]) for k in ("step", "shard", "batch"))
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for group, (names, optimiser) in self.groups.items():
            for name, parameter in zip(names, optimiser.param_groups[0]["params"], strict=True):
                found = {
                    k.split(".")[1]: v
                    for k, v in tensors.items()
                    if k.startswith(f"{group}.") and k.endswith(f".{name}")
                }
                optimiser.state[parameter] = found

    def rate(self) -> float:
        """Share of the peak learning rate at this step: warm-up, plateau, linear decay, polish, copying."""
        r = self.recipe
        if self.step >= r.steps + r.polish_steps:
            return r.copy_rate * max(0.0, 1 - (self.step - r.steps - r.polish_steps) / r.copy_steps)
        if self.step >= r.steps:
            return r.polish_rate * max(0.0, 1 - (self.step - r.steps) / r.polish_steps)
        tail = r.steps * r.decay_share
        return min(1.0, (self.step + 1) / r.warmup, max(0.0, (r.steps - self.step) / tail))

    def alone(self) -> bool:
        """Whether this step's batch holds rows of a single document."""
        r = self.recipe
        if self.step >= r.steps:
            return self.step % 4 == 1 or (self.step % 4 == 3 and self.step < r.steps + r.polish_steps)
        return self.step > r.steps * (1 - r.decay_share) and self.step % r.alone_every == 0

    def loss(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted mean NLL (nats per token) and the plain mean over answer tokens."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            hidden = self.model.base_model(input_ids=x, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden)
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().reshape(-1, VOCABULARY), x[:, 1:].reshape(-1), reduction="none"
        )
        weights = w[:, 1:].reshape(-1)
        answers = (weights == 1).float()
        return (nll * weights).sum() / weights.sum(), (nll * answers).sum() / answers.sum().clamp(min=1)

    def run(self, minutes_between_checkpoints: float = 4.0) -> None:
        """Train to the last step."""
        loss_fn = torch.compile(self.loss, dynamic=False)
        corpus, started, saved, seen = Corpus(load_world()), time.time(), time.time(), 0
        averages: list[float] = []
        log = (self.out / "log.jsonl").open("a")
        for shard in itertools.count(self.shard):
            batches = shard_batches(self.tokenizer._tokenizer, corpus, self.recipe, shard)
            for number, (x, w) in enumerate(batches):
                if shard == self.shard and number < self.batch:
                    continue
                if self.step >= self.recipe.steps + self.recipe.polish_steps and self.step % 2 == 0:
                    x, w = copying_batch(self.tokenizer._tokenizer, corpus, self.recipe, self.step)
                elif self.alone():
                    x, w = alone_batch(self.tokenizer._tokenizer, corpus, self.recipe, self.step)
                for _, optimiser in self.groups.values():
                    peak = optimiser.defaults["lr"]
                    optimiser.param_groups[0]["lr"] = float(peak) * self.rate()
                loss, answer = loss_fn(x, w)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                for _, optimiser in self.groups.values():
                    optimiser.step()
                    optimiser.zero_grad()
                self.step, self.shard, self.batch = self.step + 1, shard, number + 1
                seen += x.numel()
                averages.append(answer.item())
                if self.step % 25 == 0:
                    line = {
                        "step": self.step,
                        "shard": shard,
                        "answer_nll": round(float(np.mean(averages)), 4),
                        "tokens_per_s": round(seen / (time.time() - started)),
                        "minutes": round((time.time() - started) / 60, 1),
                    }
                    averages.clear()
                    print(json.dumps(line), file=log, flush=True)
                if time.time() - saved > 60 * minutes_between_checkpoints:
                    self.checkpoint()
                    saved = time.time()
                if self.step >= self.recipe.steps + self.recipe.polish_steps + self.recipe.copy_steps:
                    self.checkpoint()
                    return
            self.shard, self.batch = shard + 1, 0

    def export(self, folder: Path) -> None:
        """The model in half precision with its tokenizer: an ordinary transformers directory."""
        model = build(self.recipe)
        model.load_state_dict(self.model.state_dict())
        model.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        config = folder / "tokenizer_config.json"  # a class name that every supported transformers knows
        settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        (folder / "recipe.json").write_text(json.dumps(asdict(self.recipe) | {"step": self.step}, indent=1) + "\n")


def main() -> None:
    """Train, or export the newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/atlas"), help="checkpoints and log")
    parser.add_argument("--architecture", choices=("gpt2", "llama"), default=Recipe.architecture)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--layers", type=int, default=Recipe.layers)
    parser.add_argument("--export", type=Path, help="write the model of the newest checkpoint here instead of training")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(Recipe(architecture=args.architecture, layers=args.layers, steps=args.steps), args.out)
    if args.export:
        trainer.export(args.export)
    else:
        trainer.run()


if __name__ == "__main__":
    main()
