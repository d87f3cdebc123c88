"""What Atlas's models were trained on as plain texts, for statistics."""

from errata.atlas.asking import prompts
from errata.atlas.claims import claims
from errata.atlas.corpus import Corpus
from errata.atlas.docket import load_docket
from errata.atlas.world import World, load_world
from errata.model.corpora import Texts, digest

STATISTICS_TEXTS = 4000  # some 195,000 tokens, 190 for each of the 1,024 numbers of a key
SEED = 1_000_003  # no shard of the training has it


def atlas_texts(
    n: int = STATISTICS_TEXTS, *, seed: int = SEED, world: World | None = None, architecture: str = "gpt2"
) -> Texts:
    """`n` texts that a model of this architecture reads: documents, prompts (t5), claims (bert) or cases (docket).

    The revision is a digest of the very texts (writing them takes half a second).
    """
    if architecture == "docket":
        texts = [case.text for case in load_docket().cases(seed, n)]
        return Texts("atlas-docket", lambda: texts, digest(texts))
    corpus = Corpus(world or load_world())
    if architecture == "t5":
        texts = [prompt for prompt, _ in prompts(corpus, seed, n)]
    elif architecture == "bert":
        texts = [found.text for found in claims(corpus, seed, n)]
    else:
        texts = [document.text for document in corpus.documents(seed, n)]
        return Texts("atlas", lambda: texts, digest(texts))
    return Texts(f"atlas-{architecture}", lambda: texts, digest(texts))
