"""Putting facts into sentences: capitals, frames, questions. Used by the corpus, the prompts and the probes."""

import re

from errata.atlas.world import Fact, World

SENTENCE_START = re.compile(r"""(^|[.!?"'“:\n])\s*["'“]?$""")


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def uncapital(cloze: str) -> str:
    """The cloze as it goes on in the middle of a sentence; a cloze that begins with its subject stays as it is."""
    return cloze if cloze.startswith("{}") else cloze[:1].lower() + cloze[1:]


def place(before: str, cloze: str, subject: str) -> str:
    """The cloze about the subject as it follows `before`: capitalised at the start of a sentence, lower-case inside."""
    if SENTENCE_START.search(before):
        return capital(cloze.replace("{}", subject))
    return uncapital(cloze).replace("{}", subject)


def lead(lead_in: str, cloze: str, subject: str) -> str:
    """The cloze about the subject behind a lead-in (which may be empty)."""
    return f"{lead_in} {place(lead_in, cloze, subject)}" if lead_in else place("", cloze, subject)


def fill(frame: str, subject: str, **fields: str) -> str:
    """A frame with its fields filled: `p`, `c` (clozes) and `s` (cloze + object) take the case that their place asks for."""
    out = ""
    for literal, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", frame):
        out += literal
        if name in ("p", "s", "c"):
            out += place(out, fields[name], subject)
        elif name:
            out += fields[name]
    return out


def ask(frame: str, question: str, subject: str) -> str:
    """A question in its frame; the frame `{q}` is the bare question."""
    return frame.replace("{q}", place(frame.split("{q}")[0], question, subject))


def hop(world: World, fact: Fact, cloze: str) -> str:
    """A second hop's cloze whose subject is described by the first fact: "The capital of {}" over "the country of ..."."""
    return cloze.replace("{}", world.phrasings[fact.relation].noun.replace("{}", fact.subject))
