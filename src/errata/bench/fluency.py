"""Fluency and consistency of what an edited model writes: is it still text, and is it about the new object?

Source: Meng et al. 2022 (ROME), section 3.4. Fluency is the generation entropy, low where a text repeats itself; consistency
(the paper's reference score) is the cosine of TF-IDF vectors of generated and reference texts. Texts begin with their prompt,
which is part of both measures, as in the published code.

Differs: words are runs of word characters and single other signs (the published code: NLTK's), and the sampling has a seed.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log, log2, sqrt
from typing import Any

from errata.errors import ConfigError
from errata.model.attached import asked
from errata.model.generate import sampled
from errata.model.room import check_room
from errata.model.states import evaluating
from errata.model.tokens import pad_id, token_ids

PROTOCOL_FLUENCY = (
    "fluency.entropy: a third of the 2-gram and two thirds of the 3-gram entropy, bits x 100; mean over texts"
)
PROTOCOL_CONSISTENCY = "consistency.tfidf: cosine of TF-IDF vectors of all generated and all reference texts, x 100"
LENGTH, TOP_K = 100, 5  # tokens of a text with its prompt; the likeliest tokens that are sampled from


@dataclass(frozen=True)
class TfIdf:
    """Inverse document frequencies of words, ln((1 + n) / (1 + df)) + 1 over n texts; words of no text count nothing."""

    idf: Mapping[str, float]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "TfIdf":
        """Fitted on texts. Raises ConfigError for texts without words."""
        df, count = Counter[str](), 0
        for text in texts:
            df.update(set(_terms(text)))
            count += 1
        if not df:
            raise ConfigError("expected reference texts with words to fit TF-IDF on, found none.")
        return cls({word: log((1 + count) / (1 + n)) + 1 for word, n in df.items()})

    def vector(self, text: str) -> dict[str, float]:
        """Term counts times idf, of length 1; empty if no word of the text is known."""
        raw = {word: n * self.idf[word] for word, n in Counter(_terms(text)).items() if word in self.idf}
        length = sqrt(sum(value * value for value in raw.values()))
        return {word: value / length for word, value in raw.items()}

    def cosine(self, one: str, other: str) -> float:
        """Cosine of two texts' vectors, 0 if one has no known word."""
        u, v = self.vector(one), self.vector(other)
        return sum(value * v.get(word, 0.0) for word, value in u.items())


def entropy(words: Sequence[str], n: int) -> float:
    """Entropy of a text's n-grams, bits; 0 for a text shorter than one."""
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return -sum(c / total * log2(c / total) for c in grams.values())


def generation_entropy(texts: Sequence[str]) -> float:
    """Mean over texts of H_2 / 3 + 2 H_3 / 3, bits. Raises ConfigError without texts."""
    if not texts:
        raise ConfigError("expected texts to measure the fluency of, found none.")
    words = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    return sum(entropy(own, 2) / 3 + 2 * entropy(own, 3) / 3 for own in words) / len(words)


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, length: int = LENGTH, top_k: int = TOP_K, seed: int = 0
) -> list[str]:
    """One text from each prompt, `length` tokens with it, drawn among the `top_k` likeliest; what is attached acts.

    The end-of-text token is drawn like any other, as published, and left out of the text. NFKD-normalised, paragraphs
    joined. An attached context stands before the prompt and is left out of the text. The global random state, the model and the
    tokenizer stay as they are. Raises RequestError for too long a text.
    """
    said = asked(model, prompts)
    own, rows = token_ids(tokenizer, prompts), token_ids(tokenizer, said)
    new = [max(0, length - len(row)) for row in own]
    for row, text, more in zip(rows, said, new, strict=True):
        check_room(model, [row], [text], new=more)
    lengths = [len(row) + more for row, more in zip(rows, new, strict=True)]
    with evaluating(model):
        done = sampled(model, rows, lengths, padding=pad_id(tokenizer), top_k=top_k, seed=seed)
    texts = [
        tokenizer.decode([*mine, *text[len(row) :]], skip_special_tokens=True)
        for mine, row, text in zip(own, rows, done, strict=True)
    ]
    return [unicodedata.normalize("NFKD", text).replace("\n\n", " ") for text in texts]


def fluency(texts: Sequence[str]) -> float:
    """Generation entropy, bits x 100: the published scale."""
    return 100 * generation_entropy(texts)


def consistency(texts: Sequence[str], references: Sequence[str], tfidf: TfIdf) -> float:
    """Cosine of all generated and all reference texts, x 100: the published scale."""
    return 100 * tfidf.cosine(" ".join(texts), " ".join(references))


def _terms(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())
