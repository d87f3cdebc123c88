"""Train Atlas's models from scratch: `python -m errata.atlas.train --architecture gpt2 --out runs/atlas`.

    gpt2, llama    the language models `atlas` and `atlas-llama` (tasks/decoder.py)
    t5             `atlas-t5`, closed-book question answering (tasks/answering.py)
    bert           `atlas-bert`, which supports or refutes claims (tasks/classifying.py)
    docket         `atlas-docket`, a classifier of invented court cases (tasks/classifying.py)

Resumable: the newest checkpoint in `--out` is picked up, and shards of data are pure functions of (seed, shard), so a run that
was stopped goes on with the same batches. Learning rate: warm-up, plateau, linear decay over the last part of `--steps`;
raising `--steps` before the decay has begun only lengthens the plateau. Hidden matrices are trained with Muon, everything else
with AdamW. `--minutes` stops with a checkpoint after that time; the same command goes on later.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from errata.atlas.muon import Muon
from errata.atlas.tasks.answering import AnsweringRecipe, AnsweringTask
from errata.atlas.tasks.base import Task
from errata.atlas.tasks.classifying import ClaimsTask, ClassifierRecipe, DocketTask, docket_recipe
from errata.atlas.tasks.decoder import DecoderRecipe, DecoderTask, llama_recipe

TASKS: dict[str, Callable[..., Task[Any]]] = {
    "gpt2": lambda **changes: DecoderTask(DecoderRecipe(**changes)),
    "llama": lambda **changes: DecoderTask(llama_recipe(**changes)),
    "t5": lambda **changes: AnsweringTask(AnsweringRecipe(**changes)),
    "bert": lambda **changes: ClaimsTask(ClassifierRecipe(**changes)),
    "docket": lambda **changes: DocketTask(docket_recipe(**changes)),
}


class Trainer:
    """Model, optimisers and the position in the data."""

    def __init__(self, task: Task[Any], out: Path):
        self.task, self.recipe, self.out = task, task.recipe, out
        torch.manual_seed(self.recipe.seed)
        fresh = not (out / "tokenizer.json").exists()
        self.tokenizer = task.train_tokenizer(out) if fresh else PreTrainedTokenizerFast.from_pretrained(out)
        self.model, self.aside = task.build(), task.aside()
        named = dict(self.model.named_parameters())
        matrices = [n for n, p in named.items() if p.ndim == 2 and _in_a_block(n)]
        rest = [n for n in named if n not in set(matrices)]
        if self.aside is not None:
            named |= {f"aside.{n}": p for n, p in self.aside.named_parameters()}
            rest += [n for n in named if n.startswith("aside.")]
        self.named, self.half, decay = named, has_fast_bfloat16(), self.recipe.weight_decay
        self.groups = {
            "muon": (matrices, Muon(
                [named[n] for n in matrices], lr=self.recipe.lr_matrices, weight_decay=decay, half=self.half
            )),
            "adamw": (rest, torch.optim.AdamW(
                [named[n] for n in rest], lr=self.recipe.lr_rest, betas=(0.9, 0.98), weight_decay=decay
            )),
        }  # fmt: skip
        self.step, self.shard, self.batch = 0, 0, 0
        self.resume()

    def checkpoint(self) -> None:
        """Write everything that a later run needs, to a temporary name first."""
        tensors = {f"model.{n}": p.detach() for n, p in self.named.items()}
        for group, (names, optimiser) in self.groups.items():
            for name, parameter in zip(names, optimiser.param_groups[0]["params"], strict=True):
                for key, value in optimiser.state[parameter].items():
                    tensors[f"{group}.{key}.{name}"] = torch.as_tensor(value).clone()
        place = {"step": str(self.step), "shard": str(self.shard), "batch": str(self.batch)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.out / "checkpoint.tmp", metadata=place)
        os.replace(self.out / "checkpoint.tmp", self.out / "checkpoint.safetensors")

    def resume(self) -> None:
        """Go on from the checkpoint in `out`, if there is one."""
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            place = file.metadata()
        self.step, self.shard, self.batch = (int(place[k]) for k in ("step", "shard", "batch"))
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"model.{name}"])
        for group, (names, optimiser) in self.groups.items():
            found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
            for key, value in tensors.items():
                kind, _, rest = key.partition(".")
                if kind == group:
                    field, _, name = rest.partition(".")
                    found[name][field] = value
            for name, parameter in zip(names, optimiser.param_groups[0]["params"], strict=True):
                optimiser.state[parameter] = found[name]

    def run(self, minutes: float = float("inf"), minutes_between_checkpoints: float = 4.0) -> None:
        """Train to the last step, or for so many minutes, and leave a checkpoint."""
        if self.step >= self.recipe.total_steps:
            return
        loss_fn = torch.compile(self._loss, dynamic=False) if self.task.compiled else self._loss
        started, saved, seen = time.time(), time.time(), 0
        figures: list[float] = []
        with (self.out / "log.jsonl").open("a") as log:
            for shard in itertools.count(self.shard):
                for number, batch in enumerate(self.task.batches(self.tokenizer, shard)):
                    if shard == self.shard and number < self.batch:
                        continue
                    batch = self.task.batch_instead(self.tokenizer, self.step) or batch
                    for _, optimiser in self.groups.values():
                        optimiser.param_groups[0]["lr"] = float(optimiser.defaults["lr"]) * self.recipe.rate(self.step)
                    loss, figure = loss_fn(*batch)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self.named.values(), 1.0)
                    for _, optimiser in self.groups.values():
                        optimiser.step()
                        optimiser.zero_grad()
                    self.step, self.shard, self.batch = self.step + 1, shard, number + 1
                    seen += batch[0].numel()
                    figures.append(figure.item())
                    if self.step % 25 == 0:
                        line = {
                            "step": self.step,
                            "shard": shard,
                            self.task.figure: round(float(np.mean(figures)), 4),
                            "tokens_per_s": round(seen / (time.time() - started)),
                            "minutes": round((time.time() - started) / 60, 1),
                        }
                        figures.clear()
                        print(json.dumps(line), file=log, flush=True)
                    now = time.time()
                    done = self.step >= self.recipe.total_steps or now - started > 60 * minutes
                    if done or now - saved > 60 * minutes_between_checkpoints:
                        self.checkpoint()
                        saved = now
                    if done:
                        return
                self.shard, self.batch = shard + 1, 0

    def _loss(self, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            return self.task.loss(self.model, *batch)

    def export(self, folder: Path) -> None:
        """The model in half precision with its tokenizer: an ordinary transformers directory."""
        model = self.task.build()
        model.load_state_dict(self.model.state_dict())
        model.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        config = folder / "tokenizer_config.json"  # a class name that every supported transformers knows
        settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        (folder / "recipe.json").write_text(self.task.describe(self.step))


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


def _in_a_block(name: str) -> bool:
    """Whether a parameter belongs to a block of GPT-2, Llama, T5 or BERT (T5's table of position biases is no matrix)."""
    return any(part in f".{name}" for part in (".h.", ".layers.", ".block.", ".layer.")) and "bias" not in name


def main() -> None:
    """Train, or export the newest checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="checkpoints and log (runs/atlas, runs/atlas-t5, ...)")
    parser.add_argument("--architecture", choices=tuple(TASKS), default="gpt2")
    parser.add_argument("--steps", type=int, help="steps up to the end of the decay")
    parser.add_argument("--layers", type=int, help="of each stack")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, with a checkpoint")
    parser.add_argument("--export", type=Path, help="write the model of the newest checkpoint here instead of training")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or Path("runs") / ("atlas" if args.architecture == "gpt2" else f"atlas-{args.architecture}")
    out.mkdir(parents=True, exist_ok=True)
    changes = {name: value for name in ("steps", "layers") if (value := getattr(args, name)) is not None}
    trainer = Trainer(TASKS[args.architecture](**changes), out)
    if args.export:
        trainer.export(args.export)
    else:
        trainer.run(args.minutes)


if __name__ == "__main__":
    main()
