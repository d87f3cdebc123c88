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
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from errata.model.states import states_at
from errata.model.tokens import token_ids

ORDINARY, ASKED, AGAIN = range(3)
ROWS = 1200  # dialogues that teach
OPENERS = ("", "", "Q: ", "User: ", "Somebody wrote: ")
MARKS = (". ", "? ", "! ", ", ", " ... ", "?? ", ".\n", " - ")
RESTATED = 0.6  # share of dialogues that repeat the question in other words
INNER = 4  # ordinary positions of each dialogue that teach
RIDGE = 100.0
MISTAKEN = 2e-3  # share of positions of running text and of questions that may be taken for asking again


def dialogues(pairs: Sequence[tuple[str, str]], n: int = ROWS, seed: int = 0) -> list[tuple[str, int]]:
    """(text, where its first objection begins) of `n` dialogues about (prompt, some object) pairs, which ask again in the end."""
    rng = random.Random(seed)
    known = json.loads((files("errata.scope") / "recall.json").read_text(encoding="utf-8"))
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
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], texts: Sequence[str], layer: int | str,
    behind: Sequence[str] = (), seed: int = 0,
) -> Tensor:  # fmt: skip
    """The classifier (d + 1, 3), float32: log-odds of the kinds up to a common term are [h, 1] @ cues.

    pairs: prompts with any objects; texts: what is about no fact, all positions ordinary; behind: prompts behind contexts, some
    positions of which are ordinary. A balanced multinomial logistic regression on standardised states with a ridge of
    `RIDGE`, in the convention of scikit-learn (C = 1 / ridge); asking again is then made as rare as `MISTAKEN`.
    """
    from sklearn.linear_model import LogisticRegression

    made = dialogues(pairs, seed=seed)
    rng = random.Random(seed)
    rows = token_ids(tokenizer, [text for text, _ in made])
    heads = [len(ids) for ids in token_ids(tokenizer, [text[:start].rstrip() for text, start in made])]
    inner = [
        sorted(rng.sample(range(h, len(r) - 1), min(INNER, max(0, len(r) - 1 - h))))
        for r, h in zip(rows, heads, strict=True)
    ]
    talk = states_at(model, rows, [[*i, len(r) - 1] for r, i in zip(rows, inner, strict=True)], [layer])[layer]
    prompts = token_ids(tokenizer, [prompt for prompt, _ in pairs])
    asked = states_at(model, prompts, [[len(r) - 1] for r in prompts], [layer])[layer]
    long = token_ids(tokenizer, behind)
    places = [[*sorted(rng.sample(range(len(r) - 1), min(INNER, len(r) - 1))), len(r) - 1] for r in long]
    amid = states_at(model, long, places, [layer])[layer] if long else []
    asked = [*asked, *(t[-1:] for t in amid)]
    plain = token_ids(tokenizer, texts)
    running = states_at(model, plain, [list(range(len(r))) for r in plain], [layer])[layer] if plain else []
    running = [*running, *(t[:-1] for t in amid)]
    x = torch.cat([*(t[:-1] for t in talk), *running, *asked, *(t[-1:] for t in talk)]).float()
    ordinary = sum(len(t) - 1 for t in talk) + sum(map(len, running))
    y = torch.tensor([ORDINARY] * ordinary + [ASKED] * len(asked) + [AGAIN] * len(talk))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    fitted = LogisticRegression(C=1 / RIDGE, max_iter=300, class_weight="balanced").fit(((x - mean) / scale).numpy(), y)
    weight = torch.from_numpy(fitted.coef_).float() / scale
    bias = torch.from_numpy(fitted.intercept_).float() - weight @ mean
    cues = torch.cat([weight, bias[:, None]], 1).T.contiguous()
    known = torch.cat([*running, *asked])  # of running text and of questions, as good as nothing may ask again
    if len(known):
        scores = known.float() @ cues[:-1] + cues[-1]
        excess = (scores[:, AGAIN] - scores[:, :AGAIN].max(1).values).sort().values
        cues[-1, AGAIN] -= max(0.0, float(excess[int((1 - MISTAKEN) * (len(excess) - 1))]))
    return cues


def kinds(states: Tensor, cues: Tensor) -> Tensor:
    """The kind (...,) of positions with these states (..., d)."""
    cues = cues.to(states.device, torch.float32)
    return (states.float() @ cues[:-1] + cues[-1]).argmax(-1)
