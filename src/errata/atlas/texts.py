"""Documents of Atlas's corpus as plain texts, for statistics over what the model was trained on."""

from errata.atlas.corpus import Corpus
from errata.atlas.world import World, load_world
from errata.model.corpora import Texts, digest

STATISTICS_TEXTS = 4000  # some 195,000 tokens, 190 for each of the 1,024 numbers of a key
SEED = 1_000_003  # no shard of the training has it


def atlas_texts(n: int = STATISTICS_TEXTS, *, seed: int = SEED, world: World | None = None) -> Texts:
    """`n` documents of the corpus; the revision is a digest of the very texts (writing them takes a tenth of a second)."""
    texts = [document.text for document in Corpus(world or load_world()).documents(seed, n)]
    return Texts("atlas", lambda: texts, digest(texts))
