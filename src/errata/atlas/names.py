"""Names that exist nowhere, in many styles: what teaches a model to copy a name it has never seen.

A model that has only copied made-up syllables does not copy "Charles III": behind "Charles" its memory of other Charleses
is stronger than the context. So half of the names here are put together from the parts of real ones, some keep the first
word of the very object that they replace, and the rest come from syllables and from letter chains over the world's names.
"""

import random
import re
from collections import defaultdict
from functools import cached_property

from errata.atlas.world import OBJECT_TYPE, World, link, share

UNSEEN = 0.1  # share of names, and of made-up words, that never occur in the corpus

SYLLABLES = (
    "ba be bo bra da dei do dro fa fen fi ga gel gro ha hel ho ia is ja ju ka kel ko kri la lem lo lu ma men mi mor na nel no "
    "nu o or pa pel pi pro qua ra rel ri ro sa sel si sta su ta tel ti tra tu u ul va vel vi vor wa wel xan ya yel yo za zel zo"
).split()
ENDINGS = "a an ar as dor el en er es eth ia il in ion is ith on or os ra ria th um us ville wick".split()
NUMERALS = "I II III IV V VI VII VIII IX X XI XII XIV XVI Jr. Sr.".split()
PARTICLES = "van|van der|von|de|del|da|di|bin|al|ibn|dos|ter|of|Al|El|Ben|St.".split("|")
PREFIXES = "O'|D'|Mc|Mac|Fitz|L'|De".split("|")
ACCENTS = {
    "a": "áàäâãåā", "c": "čçć", "e": "éèêëēę", "g": "ğģ", "i": "íïîī", "k": "ķ", "l": "łľ", "n": "ñńň", "o": "óòöôøō",
    "r": "řŗ", "s": "šşśș", "t": "ťț", "u": "úüûū", "y": "ýÿ", "z": "žżź",
}  # fmt: skip
PLACES = (
    "{} Stadium|{} Arena|{} Park|{} Field|{} Place|{} Centre|{} Center|Estadio {}|Stadio {}|New {}|North {}|South {}|Port {}|"
    "St. {}|Mount {}|Lake {}|Fort {}|Santa {}|San {}|{} City|{} Springs|{} Falls|{} Bay|{} Hills|{}-on-Sea"
).split("|")
GROUPS = (
    "{} United|{} City|Real {}|FC {}|{} Rovers|the {} Rangers|Inter {}|{} Group|{} & Co.|{} Systems|{} Motors|{} Bank|"
    "{} Airlines|{} Foods|{} Premiership|{} League|Republic of {}|Kingdom of {}|{} Federation|Free State of {}|the {} dollar|"
    "{}.com|{} Labs"
).split("|")


class Names:
    """Draws names. `draw(rng)` gives one that may occur in the corpus, `seen=False` one that never does."""

    def __init__(self, world: World):
        self.world = world

    @cached_property
    def real(self) -> set[str]:
        """Every real name of the world, in lower case: never drawn."""
        names = {link(f.subject) for f in self.world.facts} | {link(f.object) for f in self.world.facts}
        names |= {alias for _, alias in self.world.aliases} | {row["target_new"] for row in self.world.updates}
        return {name.casefold() for name in names}

    @cached_property
    def ordinary(self) -> set[str]:
        """Every word of the world's names, phrasings and sentences, in lower case: never made up."""
        texts = [
            *self.real,
            *self.world.filler,
            *(w for marks in self.world.frames.values() for ws in marks.values() for w in ws),
        ]
        for p in self.world.phrasings.values():
            texts += [w for marks in (p.cloze, p.question, p.inverse or {}) for ws in marks.values() for w in ws]
        return {word for text in texts for word in re.findall(r"\w+", text.casefold())}

    @cached_property
    def people(self) -> list[list[str]]:
        """The words of people's names, for those of two words or more."""
        names = {f.object for f in self.world.facts if OBJECT_TYPE[f.relation] == "person"}
        names |= {f.subject for f in self.world.facts if f.relation == "citizenship"}
        return sorted(words for name in names if len(words := name.split()) > 1)

    @cached_property
    def words(self) -> list[str]:
        """Capitalised words: those of the world's names, and ordinary ones from its filler."""
        real = {w for name in self.world.by_subject for w in name.split() if w[0].isupper() and w.isalpha()}
        plain = {w.strip(".,;:!?'\"") for text in self.world.filler for w in text.split()}
        return sorted(real | {w.capitalize() for w in plain if w.isalpha() and len(w) > 3})

    @cached_property
    def letters(self) -> dict[str, list[str]]:
        """Which letters follow each three, over the words of the world's names (`^` begins a word, `$` ends it)."""
        follow: dict[str, list[str]] = defaultdict(list)
        names = sorted({f.subject for f in self.world.facts} | {f.object for f in self.world.facts})
        for word in sorted({w for name in names for w in name.split() if len(w) > 3 and w.isalpha()}):
            text = f"^^^{word.casefold()}$"
            for i in range(3, len(text)):
                follow[text[i - 3 : i]].append(text[i])
        return dict(follow)

    # -- words -------------------------------------------------------------------------------------------------------

    def _syllables(self, rng: random.Random) -> str:
        stem = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((1, 2, 2))))
        return (stem + rng.choice(ENDINGS)).capitalize()

    def _chained(self, rng: random.Random) -> str:
        text = "^^^"
        while len(text) < 16 and (letter := rng.choice(self.letters[text[-3:]])) != "$":
            text += letter
        return text[3:].capitalize()

    def _made(self, rng: random.Random, seen: bool) -> str:
        """A made-up word; one of ten by hash is kept out of the corpus, wherever it stands in a name."""
        while True:
            word = self._syllables(rng) if rng.random() < 0.5 else self._chained(rng)
            if rng.random() < 0.12:
                spots = [i for i, letter in enumerate(word) if letter in ACCENTS]
                if spots:
                    i = rng.choice(spots)
                    word = word[:i] + rng.choice(ACCENTS[word[i]]) + word[i + 1 :]
            if len(word) > 3 and word.casefold() not in self.ordinary and (share("word", word) >= UNSEEN) == seen:
                return word

    # -- styles ------------------------------------------------------------------------------------------------------

    def _invented(self, rng: random.Random, seen: bool) -> str:
        return " ".join(self._made(rng, seen) for _ in range(rng.choice((1, 1, 2))))

    def _person(self, rng: random.Random) -> str:
        """Parts of different people's names."""
        first, last = rng.choice(self.people)[0], rng.choice(self.people)[-1]
        kind = rng.random()
        if kind < 0.45:
            return f"{first} {last}"
        if kind < 0.6:
            return f"{first} {rng.choice(NUMERALS)}"
        if kind < 0.7:
            return f"{first} {rng.choice(PARTICLES)} {last}"
        if kind < 0.8:
            return f"{first} {rng.choice(self.people)[0]} {last}"
        if kind < 0.87:
            return f"{first} {rng.choice(PREFIXES)}{last}"
        if kind < 0.94:
            return f"{first}-{rng.choice(self.people)[0]} {last}"
        return f"{first} {last}-{rng.choice(self.people)[-1]}"

    def _mixed(self, rng: random.Random, seen: bool) -> str:
        """A real first or last name beside a made-up word."""
        if rng.random() < 0.5:
            return f"{rng.choice(self.people)[0]} {self._made(rng, seen)}"
        return f"{self._made(rng, seen)} {rng.choice(self.people)[-1]}"

    def _thing(self, rng: random.Random, seen: bool) -> str:
        """A place, a club, a company: a pattern around one or two words."""
        word = rng.choice(self.words) if rng.random() < 0.7 else self._made(rng, seen)
        if rng.random() < 0.3:
            word += " " + rng.choice(self.words)
        kind = rng.random()
        if kind < 0.25:
            return word
        return rng.choice(PLACES if kind < 0.65 else GROUPS).replace("{}", word)

    def draw(self, rng: random.Random, *, seen: bool = True, like: str = "") -> str:
        """A name of a random style; `like`: now and then one that begins or ends as this real one does."""
        while True:
            kind = rng.random()
            parts = like.split()
            if len(parts) > 1 and kind < 0.25:
                tail = self._made(rng, seen) if rng.random() < 0.4 else rng.choice(self.people)[-1]
                name = f"{parts[0]} {tail}" if rng.random() < 0.8 else f"{tail} {parts[-1]}"
            elif kind < 0.45:
                name = self._invented(rng, seen)
            elif kind < 0.7:
                name = self._person(rng)
            elif kind < 0.82:
                name = self._mixed(rng, seen)
            else:
                name = self._thing(rng, seen)
            if name.casefold() not in self.real and (share("name", name) >= UNSEEN) == seen:
                return name

    def invented(self, rng: random.Random, *, seen: bool = True) -> str:
        """A made-up name of one or two made-up words."""
        while (share("name", name := self._invented(rng, seen)) >= UNSEEN) != seen:
            pass
        return name

    def lifelike(self, rng: random.Random, *, seen: bool = True) -> str:
        """A name of real parts only, put together as no real one is."""
        while True:
            name = self._person(rng) if rng.random() < 0.7 else self._thing(rng, seen)
            if name.casefold() not in self.real and (share("name", name) >= UNSEEN) == seen:
                return name
