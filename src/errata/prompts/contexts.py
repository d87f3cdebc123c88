"""Texts around a prompt: lead-ins that leave its meaning alone, and contexts that force an object (SAKE, appendix A.2).

`frames.json` holds the wordings that may be used to fit; in `repeat` and `avoid` the first one is the paper's. Fields: `{p}`
the prompt, `{s}` the prompt with an object, `{o}` an object not to be mentioned, `{c}` an implication's prompt.
"""

import json
import random
from collections.abc import Sequence
from importlib.resources import files

FRAMES: dict[str, list[str]] = json.loads((files("errata.prompts") / "frames.json").read_text(encoding="utf-8"))


def lead_ins(prompts: Sequence[str], n: int, seed: int = 0) -> list[str]:
    """`n` in-scope prompts: the given ones first, then each of them behind varied lead-ins; fewer if there are no more."""
    found = list(dict.fromkeys(prompts))[:n]
    rng = random.Random(seed)
    openers = FRAMES["lead_ins"][:]
    more = [f"{opener} {_after(opener, prompt)}" for prompt in found for opener in openers]
    rng.shuffle(more)
    return found + more[: n - len(found)]


def _after(opener: str, prompt: str) -> str:
    """The prompt as it goes on inside a sentence: only plain words lose their capital, names keep it."""
    inside = opener[-1] == "," or opener[-1].isalpha()
    return prompt[:1].lower() + prompt[1:] if inside and prompt.split(" ", 1)[0] in PLAIN_WORDS else prompt


PLAIN_WORDS = frozenset(
    "The A An In At By For From If It Its Of On To With When Where Which Who What How Whose Among Every As Most More One "
    "Ask Any Anyone Today Officially Under Behind During According People".split()
)


def repeat(prompt: str, answer: str, wording: int = 0) -> str:
    """The prompt behind the request to repeat the statement `prompt answer`: the forced source of SAKE."""
    frame = FRAMES["repeat"][wording % len(FRAMES["repeat"])]
    return frame.replace("{s}", f"{prompt} {answer}").replace("{p}", prompt)


def instead(prompt: str, old: str, new: str, wording: int = 0) -> str:
    """The prompt behind the request not to mention `old` and to repeat `prompt new`: the target of SAKE."""
    frame = FRAMES["avoid"][wording % len(FRAMES["avoid"])]
    return frame.replace("{o}", old).replace("{s}", f"{prompt} {new}").replace("{p}", prompt)


def affirmed(statement: str, implication: str, wording: int = 0) -> str:
    """An implication behind the statement that the original fact holds in this context: the source of an implication."""
    frame = FRAMES["affirm"][wording % len(FRAMES["affirm"])]
    return frame.replace("{s}", _inside(statement)).replace("{c}", _inside(implication))


def supposed(statement: str, implication: str, wording: int = 0) -> str:
    """An implication behind the request to assume the edited fact: the target of an implication."""
    frame = FRAMES["premise"][wording % len(FRAMES["premise"])]
    return frame.replace("{s}", _inside(statement)).replace("{c}", _inside(implication))


def imagined(statement: str) -> str:
    """The request to imagine a statement, to stand before any prompt (RippleEdits' in-context baseline)."""
    return f"Imagine that {_inside(statement)}{'' if statement.endswith('.') else '.'}\n"


def _inside(prompt: str) -> str:
    return _after(",", prompt)
