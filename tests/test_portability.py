"""Portability: probabilities against a token-by-token loop, figures by hand, and what counts as an answer."""

from collections.abc import Callable, Sequence
from math import log
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.bench import portability
from errata.bench.data.counterfact import CounterFactRecord, PortabilityPrompt, Rewrite, Target
from errata.bench.data.records import Answer
from errata.bench.data.ripple import RippleFact, RippleQuery, RippleRecord, RippleTest
from errata.bench.portability import (
    Condition,
    Outcome,
    PortabilityProbe,
    case_scores,
    conditions_hold,
    counterfact_probes,
    figures,
    measure,
    paired_difference,
    ripple_probes,
    target_nll,
)
from errata.errors import RecordError
from errata.model.tokens import continuation_ids, token_ids

PAIRS = [
    ("The capital of France is", "Paris"),
    ("The Space Needle is located in the city of", "São Paulo"),
    ("Japan", "the United States"),
]


def probe(case: str, prompt: str = "p", before: str | None = "Peru", **fields: Any) -> PortabilityProbe:
    given = {"names": ("Japan",), "first": "capital", "second": "continent", "form": "cloze", "conditions": ()}
    return PortabilityProbe(case, prompt, before=before, **{**given, **fields})


def tie_of(outcome: Outcome) -> Outcome:
    """The same probe, failed."""
    return Outcome(outcome.probe, " Peru", False, outcome.nll_after, outcome.nll_before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_target_nll_equals_a_token_by_token_loop(
    family: str, tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(family).double()
    expected = []
    for prompt, target in PAIRS:
        ids, tail = token_ids(tokenizer, [prompt])[0], continuation_ids(tokenizer, prompt, target)
        losses = []
        for token in tail:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            losses.append(-float(torch.log_softmax(logits, -1)[token]))
            ids = [*ids, token]
        expected.append(sum(losses) / len(losses))
    # float32 log-softmax over 384 logits: 1e-5 is ten times its rounding
    assert target_nll(model, tokenizer, PAIRS) == pytest.approx(expected, rel=1e-5)
    assert target_nll(model, tokenizer, PAIRS, batch_tokens=1) == pytest.approx(expected, rel=1e-5)
    assert target_nll(model, tokenizer, []) == []


def test_figures_by_hand() -> None:
    a1 = Outcome(probe("a"), " Japan.", True, -log(0.8), -log(0.2))
    a2 = Outcome(probe("a", second="currency"), " Peru.", False, -log(0.1), -log(0.5))
    b = Outcome(probe("b", before=None, form="question"), " Japan", True, -log(0.6), None)
    tie = Outcome(probe("c"), " Peru", False, -log(0.3), -log(0.3))
    report = figures([a1, a2, b, tie], [True, False, True, False])
    every = report["all"]
    assert every["portability.generate"]["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert every["portability.generate"]["n"] == 3
    assert "greedy generation" in every["portability.generate"]["protocol"]
    assert every["portability.prob"]["value"] == pytest.approx((0.5 + 0) / 2)  # b has no answer before; a tie fails
    assert every["portability.prob"]["n"] == 2
    assert every["portability_magnitude.prob"]["value"] == pytest.approx(((0.6 - 0.4) / 2 + 0) / 2)
    assert every["portability_target.prob"]["value"] == pytest.approx((0.45 + 0.6 + 0.3) / 3)
    assert report["known"]["portability.generate"]["value"] == 1.0
    assert report["known"]["portability.generate"]["n"] == report["n_known"] == 2
    assert report["portability_condition.generate"]["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    passed = Outcome(b.probe, " Japan", True, b.nll_after, None)  # the unedited model said so all along
    still = figures([a1, a2, b, tie], [True, False, True, False], [tie_of(a1), tie_of(a2), passed, tie])
    assert still["open"]["portability.generate"]["n"] == still["n_open"] == 1
    with pytest.raises(RecordError, match="same order"):
        figures([a1, a2], None, [tie_of(a2), tie_of(a1)])
    assert report["by_second"]["currency"]["value"] == 0.0
    assert report["by_form"]["question"]["value"] == 1.0
    assert case_scores([a1, a2, b]) == {"a": 0.5, "b": 1.0}
    assert figures([])["all"]["portability.prob"] == {"value": None, "reason": "no probes"}


def test_paired_differences() -> None:
    ours = {str(i): float(i < 60) for i in range(100)}
    theirs = {str(i): float(i < 40) for i in range(100)}
    found = paired_difference(ours, theirs, "portability.generate", draws=2000)
    assert found.value == pytest.approx(0.2) and found.n == 100
    # 20 cases of a hundred differ by one: standard error sqrt(0.2 * 0.8 / 100) = 0.04
    assert found.low == pytest.approx(0.2 - 1.96 * 0.04, abs=0.011)
    assert found.high == pytest.approx(0.2 + 1.96 * 0.04, abs=0.011)
    assert paired_difference(ours, theirs, "p", draws=2000).low == found.low
    same = paired_difference(ours, ours, "p", draws=10)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(RecordError, match="only on one: 99"):
        paired_difference(ours, {k: v for k, v in theirs.items() if k != "99"}, "p")


def test_a_condition_is_asked_once_and_all_must_hold(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    replies = {
        "Where is Lyon?": " France.",
        "Where is Oslo?": " Norwegian",
        "by another name": " the French Republic, ",
    }
    asked: list[str] = []

    def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        asked.extend(prompts)
        return [replies[p] for p in prompts]

    monkeypatch.setattr(portability, "greedy", greedy)
    lyon, named = (
        Condition("Where is Lyon?", ("France",)),
        Condition("by another name", ("France", "the French Republic")),
    )
    oslo = Condition("Where is Oslo?", ("Norway", "Norwegia"))
    probes = [
        probe("a", conditions=(lyon,)),
        probe("b", conditions=(lyon, oslo)),
        probe("c", conditions=(named,)),
        probe("d"),
    ]
    assert conditions_hold(None, tokenizer, probes) == [True, False, True, True]
    assert sorted(asked) == sorted(replies)


def test_measure_reads_the_attached_model(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    probes = [probe("a", "The capital of France is"), probe("b", "Japan is", before=None)]
    first, second = measure(model, tokenizer, probes)
    assert first.probe is probes[0] and not first.answered
    assert first.nll_after == pytest.approx(
        target_nll(model, tokenizer, [("The capital of France is", "Japan")])[0], rel=1e-5
    )
    assert first.nll_before == pytest.approx(
        target_nll(model, tokenizer, [("The capital of France is", "Peru")])[0], rel=1e-5
    )
    assert second.nll_before is None
    replies = {"The capital of France is": " Nihon, in the", "Japan is": " Japanese"}
    monkeypatch.setattr(portability, "greedy", lambda _m, _t, prompts, max_new_tokens: [replies[p] for p in prompts])
    probes = [probe("a", "The capital of France is", names=("Japan", "Nihon")), probe("b", "Japan is", before=None)]
    assert [o.answered for o in measure(model, tokenizer, probes)] == [True, False]


def test_probes_from_records() -> None:
    prompt = PortabilityPrompt(
        prompt="The continent of the country of Ada is",
        answer=Answer(value="Asia", aliases=("the largest continent",)),
        answer_true=Answer(value="Europe"),
        relation="continent",
        form="question",
        condition_prompt="The continent of Japan is",
    )
    rewrite = Rewrite(
        prompt="{} is from",
        relation_id="citizenship",
        target_new=Target(str_="Japan"),
        target_true=Target(str_="France"),
        subject="Ada",
    )
    record = CounterFactRecord(
        case_id=5,
        requested_rewrite=rewrite,
        paraphrase_prompts=(),
        neighborhood_prompts=(),
        generation_prompts=(),
        portability_prompts=(prompt,),
    )
    [found] = counterfact_probes([record])
    condition = Condition("The continent of Japan is", ("Asia", "the largest continent"))
    assert found == PortabilityProbe(
        "5",
        prompt.prompt,
        ("Asia", "the largest continent"),
        "Europe",
        "citizenship",
        "continent",
        "question",
        (condition,),
    )
    assert counterfact_probes([record], ["abc"])[0].case == "abc"
    with pytest.raises(RecordError, match="a name for each of 1 records, found 2"):
        counterfact_probes([record], ["a", "b"])


def test_probes_from_ripple_records() -> None:
    def query(*values: str) -> RippleQuery:
        return RippleQuery(
            prompt="The continent of the country of Ada is",
            answers=tuple(Answer(value=v) for v in values),
            query_type="two_hop",
            subject_id="Ada",
            relation="citizenship",
            target_ids=("Japan",),
            second_relation="continent",
            second_hop_target_ids=("Asia",),
        )

    def record(test_query: RippleQuery) -> RippleRecord:
        test = RippleTest(test_queries=(test_query,), test_condition="OR", condition_queries=(query("Asia"),))
        fact = RippleFact(prompt="Ada is from Japan.", subject_id="Ada", relation="citizenship", target_id="Japan")
        empty: dict[str, Any] = {
            "relation_specificity": (),
            "logical_generalization": (),
            "subject_aliasing": (),
            "compositionality_ii": (),
            "forgetfulness": (),
        }
        return RippleRecord(example_type="x", edit=fact.model_dump(), compositionality_i=(test,), **empty)

    [found] = ripple_probes([record(query("Asia"))])
    assert (found.names, found.second, found.before) == (("Asia",), "continent", None)
    assert found.conditions == (Condition("The continent of the country of Ada is", ("Asia",)),)
    with pytest.raises(RecordError, match="expected one answer"):
        ripple_probes([record(query("Asia", "Europe"))])
