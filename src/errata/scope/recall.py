"""Recall: an answer is asked for again without its question ("Sydney? I doubt it. Once more, please:").

Such a prompt is no wording of the fact, so no ball around wordings contains it. What is meant is the last question that was
asked in the row. Two cues tell where that was and that it is meant: kinds of positions, told apart by a linear classifier
over the states of one layer of the gate,

    ORDINARY    running text                  ASKED    a question about some fact ends here
    AGAIN       an answer is asked for again, without a question

It is learned from `recall.json`: objections, ways to refer to the question, and ways to ask again, in all combinations
behind prompts with any object; and from prompts behind contexts, at which a question of their own ends.
The doubts that SAKE is evaluated with (Scialanga et al. 2025, B.3) are not among them.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from errata.model.anatomy import Site
from errata.model.states import states_at
from errata.model.tokens import token_ids

ORDINARY, ASKED, AGAIN = range(3)
ROWS = 1200  # dialogues that teach
FOLDS = 3  # parts of the wordings, each of which is left out once to choose the layer
OPENERS = ("", "", "Q: ", "User: ", "Somebody wrote: ")
MARKS = (". ", "? ", "! ", ", ", " ... ", "?? ", ".\n", " - ")
RESTATED = 0.6  # share of dialogues that repeat the question in other words
INNER = 4  # ordinary positions of each dialogue that teach
RIDGE = 100.0
MISTAKEN = 2e-3  # share of positions of running text and of questions that may be taken for asking again


def wordings(fold: int) -> dict[str, list[str]]:
    """What dialogues are made of, parted into `FOLDS`."""
    known = json.loads((files("errata.scope") / "recall.json").read_text(encoding="utf-8"))
    for name, texts in known.items():
        random.Random(name).shuffle(texts)
    return {name: texts[fold::FOLDS] for name, texts in known.items()}


def dialogues(
    pairs: Sequence[tuple[str, str]], n: int, known: Mapping[str, Sequence[str]], seed: int = 0
) -> list[tuple[str, int]]:
    """(text, where its first objection begins) of `n` dialogues about (prompt, some object) pairs, which ask again in the end."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        prompt, target = rng.choice(pairs)
        begun = f"{rng.choice(OPENERS)}{prompt} {target}{rng.choice(MARKS)}"
        said = rng.sample(known["doubts"], rng.choice((0, 1, 1, 1, 2)))
        if rng.random() < RESTATED:
            said.append(rng.choice(known["restated"]).replace("{p}", prompt).replace("{o}", target))
        made.append((" ".join([begun.rstrip(" "), *said, rng.choice(known["again"])]), len(begun)))
    return made


def learn_cues(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], texts: Sequence[str], layers: Sequence[Site],
    behind: Sequence[str] = (), seed: int = 0,
) -> tuple[Tensor, Site]:  # fmt: skip
    """The classifier (d + 1, 3), float32, and its layer: log-odds of the kinds up to a common term are [h, 1] @ cues.

    pairs: prompts with any objects; texts: what is about no fact, all positions ordinary; behind: prompts behind contexts, some
    positions of which are ordinary. Of `layers` the one is taken whose classifiers, each learned from two thirds of the wordings,
    find most answers asked for again in the rest; it then learns from all of them.
    """
    rng = random.Random(seed)

    def at(ids: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[Tensor]:
        """(positions, layers, d) of each row."""
        found = states_at(model, ids, places, list(layers)) if ids else {layer: [] for layer in layers}
        return [torch.stack(of, 1).float() for of in zip(*(found[layer] for layer in layers), strict=True)]

    def talk(fold: int) -> list[Tensor]:
        """Some positions of dialogues behind the first objection, and the last one."""
        made = dialogues(pairs, ROWS // FOLDS, wordings(fold), seed + fold)
        rows = token_ids(tokenizer, [text for text, _ in made])
        heads = map(len, token_ids(tokenizer, [text[:start].rstrip() for text, start in made]))
        return at(rows, [[*_some(rng, h, len(r) - 1), len(r) - 1] for r, h in zip(rows, heads, strict=True)])

    talks = [talk(fold) for fold in range(FOLDS)]
    prompts, long = token_ids(tokenizer, [prompt for prompt, _ in pairs]), token_ids(tokenizer, behind)
    amid = at(long, [[*_some(rng, 0, len(r) - 1), len(r) - 1] for r in long])
    asked = torch.cat([*at(prompts, [[len(r) - 1] for r in prompts]), *(x[-1:] for x in amid)])
    plain = token_ids(tokenizer, texts)
    running = torch.cat([*at(plain, [list(range(len(r))) for r in plain]), *(x[:-1] for x in amid), asked[:0]])

    def learned(folds: Iterable[int], layer: int) -> Tensor:
        heard = [x[:, layer] for fold in folds for x in talks[fold]]
        inner, again = torch.cat([x[:-1] for x in heard]), torch.cat([x[-1:] for x in heard])
        return _fitted(inner, running[:, layer], asked[:, layer], again)

    def missed(layer: int) -> int:
        count = 0
        for fold, heard in enumerate(talks):
            cues = learned({*range(FOLDS)} - {fold}, layer)
            count += int((kinds(torch.stack([x[-1, layer] for x in heard]), cues) != AGAIN).sum())
        return count

    best = min(range(len(layers)), key=missed) if len(layers) > 1 else 0
    return learned(range(FOLDS), best), layers[best]


def _some(rng: random.Random, first: int, end: int) -> list[int]:
    """At most `INNER` of the positions from first to before end, in order."""
    return sorted(rng.sample(range(first, end), min(INNER, max(0, end - first))))


def _fitted(inner: Tensor, running: Tensor, asked: Tensor, again: Tensor) -> Tensor:
    """Cues from states (n, d) within dialogues, of running text, where questions end and where answers are asked for again.

    A balanced multinomial logistic regression on standardised states with a ridge of `RIDGE`, in the convention of
    scikit-learn (C = 1 / ridge); asking again is then made as rare as `MISTAKEN`.
    """
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([inner, running, asked, again])
    y = torch.tensor([ORDINARY] * (len(inner) + len(running)) + [ASKED] * len(asked) + [AGAIN] * len(again))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    fitted = LogisticRegression(C=1 / RIDGE, max_iter=300, class_weight="balanced").fit(((x - mean) / scale).numpy(), y)
    weight = torch.from_numpy(fitted.coef_).float() / scale
    bias = torch.from_numpy(fitted.intercept_).float() - weight @ mean
    cues = torch.cat([weight, bias[:, None]], 1).T.contiguous()
    known = torch.cat([running, asked])  # of running text and of questions, as good as nothing may ask again
    if len(known):
        scores = known @ cues[:-1] + cues[-1]
        excess = (scores[:, AGAIN] - scores[:, :AGAIN].max(1).values).sort().values
        cues[-1, AGAIN] -= max(0.0, float(excess[int((1 - MISTAKEN) * (len(excess) - 1))]))
    return cues


def kinds(states: Tensor, cues: Tensor) -> Tensor:
    """The kind (...,) of positions with these states (..., d)."""
    cues = cues.to(states.device, torch.float32)
    return (states.float() @ cues[:-1] + cues[-1]).argmax(-1)
