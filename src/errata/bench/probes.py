"""The probes that edit requests carry: prompts that judge an edit and never fit it."""

from collections.abc import Iterator, Sequence

from errata.bench.ask import Question
from errata.bench.cases import Kind, Probe
from errata.edit import EditRequest

# What a request's own probes measure, by kind.
METRICS: dict[Kind, str] = {"edit": "efficacy", "paraphrase": "generalization", "neighborhood": "specificity"}


def probes_of(requests: Sequence[EditRequest]) -> Iterator[Question]:
    """The probes of requests: their own prompt, their paraphrases, and neighbours, whose unedited answer should stay."""
    for request in requests:
        prompts: list[tuple[Kind, str, tuple[str, ...]]] = [
            ("edit", request.text, (request.target_new,)),
            *(("paraphrase", prompt, (request.target_new,)) for prompt in request.paraphrase_prompts),
            *(("neighborhood", prompt, ()) for prompt in request.neighborhood_prompts),
        ]
        for index, (kind, prompt, expected) in enumerate(prompts):
            yield Question(request.id, request.id, index, Probe(kind, prompt, expected))
