"""SAKE's oracle: its maps are the transports between the states of its texts. And what it says, refuses and records."""

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import errata
from errata import SAKE, EditRequest, SAKEConfig
from errata.errors import ConfigError, RequestError
from errata.maths.transport import gaussian_distance, gaussian_transport, mean_shift
from errata.model.generate import greedy_answers
from errata.model.loading import bundled
from errata.prompts import contexts
from errata.scope.features import gate_features
from errata.scope.gate import GATE_FILE, Gate, save_gate
from errata.steering.parts import Steering

QUICK: dict[str, Any] = {
    "prompts": 9,
    "context_prompts": 4,
    "implication_prompts": 4,
    "radius": 1e6,
    "lift": False,
    "strength": 1.0,
}
EXACT: dict[str, Any] = {"tolerance": 0.0, "half": False}
NEEDLE = EditRequest(
    subject="The Space Needle",
    prompt="{} is located in the city of",
    target_true="Seattle",
    target_new="Goa",
    fit_prompts=("The Space Needle stands in", "Where is The Space Needle? It is in"),
)


@pytest.fixture
def model(tiny: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny("gpt2", n_positions=1024)


def states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], after: str = "") -> Tensor:
    """(n, d) what the head reads after each text, one by one, by transformers' own account."""
    rows = [torch.tensor([tokenizer(t)["input_ids"] + tokenizer(after)["input_ids"]]) for t in texts]
    with torch.no_grad():
        return torch.cat([model.transformer(ids).last_hidden_state[:, -1] for ids in rows])


def texts_of(n: int, n_contexts: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Source and target texts of NEEDLE, as methods §15 has them."""
    prompts = contexts.lead_ins([*NEEDLE.fit_prompts, NEEDLE.text], n, seed)
    some = prompts[:n_contexts]
    return (
        prompts + [f"Repeat this sentence: '{p} Seattle'. {p}" for p in some],
        [f"Do not mention 'Seattle'. Repeat this sentence: '{p} Goa'. {p}" for p in some],
    )


# -- the oracle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [True, False])
def test_maps_are_the_transports_between_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, relative: bool
) -> None:
    """Each step's map, from states that this test computes on its own."""
    patch = SAKE(**QUICK, **EXACT, reg=0.1, reg_relative=relative).fit(model, tokenizer, [NEEDLE], seed=4)
    [part] = patch.parts
    source, target = texts_of(9, 4, seed=4)
    pieces = tokenizer.convert_ids_to_tokens(part.target_ids)
    assert tokenizer.decode(part.target_ids) == " Goa" and len(part.maps) == len(pieces) > 1
    for t, found in enumerate(part.maps):
        said = tokenizer.decode(part.target_ids[:t])
        expected = gaussian_transport(
            states(model, tokenizer, source, said), states(model, tokenizer, target, said), reg=0.1, relative=relative
        )
        for ours, theirs in zip(found.dense(), expected.dense(), strict=True):
            # float32 states of padded batches against single rows; A has entries around 1, b around 10
            torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-3, rtol=1e-3)
    report = patch.report[NEEDLE.id]
    assert report["prompts"] == 9 and report["prompts_from"] == "fit_prompts" and report["target_contexts_kept"] == 0.0
    assert report["rank"] == [m.rank for m in part.maps] and report["converged"] is False


def test_uniform_is_the_mean_shift(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    [part] = SAKE(**QUICK, **EXACT, map="uniform").fit(model, tokenizer, [NEEDLE]).parts
    source, target = texts_of(9, 4)
    expected = mean_shift(states(model, tokenizer, source), states(model, tokenizer, target))
    assert part.maps[0].rank == 0
    x = torch.randn(3, 32)
    torch.testing.assert_close(part.maps[0](x), expected(x), atol=1e-5, rtol=1e-5)  # float32 states


def test_span_first_is_the_first_step(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    [whole] = SAKE(**QUICK, **EXACT).fit(model, tokenizer, [NEEDLE]).parts
    [first] = SAKE(**QUICK, **EXACT, span="first").fit(model, tokenizer, [NEEDLE]).parts
    assert (len(first.maps), first.target_ids) == (1, whole.target_ids[:1])
    torch.testing.assert_close(first.maps[0].dense(), whole.maps[0].dense(), atol=1e-4, rtol=1e-4)


def test_only_contexts_that_give_the_new_object_are_kept(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failing contexts are tried in another wording; the map is fitted on those that work, and the share is reported."""
    good = [0, 2]  # of four prompts these work in the first wording, prompt 3 in the second, prompt 1 in none
    tried: list[int] = []

    def said(self: Any, found: Tensor, answer: list[int]) -> Tensor:
        if not 0 < len(found) <= 4 or len(tried) == 3:  # the last look is at what the map does
            return torch.zeros(len(found), dtype=torch.bool)
        tried.append(len(found))
        return torch.tensor([[i in good for i in range(4)], [False, True], [False]][len(tried) - 1])

    monkeypatch.setattr("errata.editors.sake.SteeringFit._said", said)
    patch = SAKE(**QUICK, **EXACT, reg=0.1).fit(model, tokenizer, [NEEDLE])
    source, _ = texts_of(9, 4)
    prompts = source[:4]
    kept = [contexts.instead(prompts[i], "Seattle", "Goa", w) for i, w in ((0, 0), (2, 0), (3, 1))]
    expected = gaussian_transport(states(model, tokenizer, source), states(model, tokenizer, kept), reg=0.1)
    torch.testing.assert_close(patch.steering[0].maps[0].dense()[0].double(), expected.dense()[0], atol=1e-3, rtol=1e-3)
    assert tried == [4, 2, 1] and patch.report[NEEDLE.id]["target_contexts_kept"] == 0.75


def test_held_out_states_are_measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = QUICK | EXACT | {"prompts": 30, "context_prompts": 5, "reg": 0.05}
    patch = SAKE(**settings).fit(model, tokenizer, [NEEDLE])
    source, target = texts_of(30, 5)
    x = states(model, tokenizer, source)
    held = torch.arange(len(x)) % 10 == 9
    report = patch.report[NEEDLE.id]
    assert report["held_out_distance"] == pytest.approx(float(gaussian_distance(x[held], x[~held]).mean()), rel=1e-3)
    assert 0.0 <= report["on_fit_states"] <= 1.0 and 0.0 <= report["on_held_out_states"] <= 1.0
    expected = gaussian_transport(x[~held], states(model, tokenizer, target), reg=0.05)
    torch.testing.assert_close(patch.steering[0].maps[0].dense()[0].double(), expected.dense()[0], atol=1e-3, rtol=1e-3)


def test_maps_are_cut_and_halved_by_default(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    [exact] = SAKE(**QUICK, **EXACT).fit(model, tokenizer, [NEEDLE]).parts
    [small] = SAKE(**(QUICK | {"tolerance": 0.3})).fit(model, tokenizer, [NEEDLE]).parts
    assert small.maps[0].P.dtype == torch.float16 and exact.maps[0].P.dtype == torch.float32
    assert small.maps[0].rank < exact.maps[0].rank and 0 < small.maps[0].error <= 0.3


# -- implications ------------------------------------------------------------------------------------------------------


def test_implications_have_parts_of_their_own(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    about = {"relation": "country of the city", "answer": "India"}
    request = NEEDLE.model_copy(update={
        "fit_implications": EditRequest(prompt="x", target_new="y", fit_implications=[
            {"prompt": "The Space Needle lies in the country of", **about},
            {"prompt": "The country of The Space Needle is", **about},
            {"prompt": "The currency paid at The Space Needle is the", "answer": "rupee"},
        ]).fit_implications,
    })  # fmt: skip
    patch = SAKE(**QUICK).fit(model, tokenizer, [request])
    assert [tokenizer.decode(p.target_ids) for p in patch.parts] == [" Goa", " India", " rupee"]
    assert [p.edit for p in patch.parts] == [request.id] * 3 and len({p.key for p in patch.parts}) == 3
    notes = patch.report[request.id]["implications"]
    assert [(n["about"], n["answer"]) for n in notes] == [
        ("country of the city", "India"), ("The currency paid at The Space Needle is the", "rupee"),
    ]  # fmt: skip
    assert len(SAKE(**QUICK, implications="none").fit(model, tokenizer, [request]).parts) == 1
    [pooled] = (
        SAKE(**QUICK, **EXACT, implications="pooled", noise=0.1, noise_copies=2).fit(model, tokenizer, [request]).parts
    )
    [plain] = SAKE(**QUICK, **EXACT, implications="none").fit(model, tokenizer, [request]).parts
    assert not torch.equal(pooled.maps[0].m_t, plain.maps[0].m_t)
    torch.testing.assert_close(pooled.maps[1].m_t, plain.maps[1].m_t)  # only the first step (the paper's only one)


# -- the old object ----------------------------------------------------------------------------------------------------


def test_the_old_object_is_the_models_own_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    candidates = [f"The capital of {name} is" for name in ("France", "Japan", "Brazil", "Earth", "Zürich")]
    answers = dict(zip(candidates, greedy_answers(model, tokenizer, candidates), strict=True))
    prompt = next(p for p, answer in answers.items() if answer)
    request = EditRequest(prompt=prompt, target_new="Goa")
    patch = SAKE(**QUICK).fit(model, tokenizer, [request])
    assert patch.requests[0].target_true == answers[prompt]
    assert patch.ids == (request.model_copy(update={"target_true": answers[prompt]}).id,)
    assert set(patch.report) == {p.edit for p in patch.parts} == set(patch.ids)
    [report] = patch.report.values()
    assert report["target_true"] == answers[prompt] and report["prompts_from"] == "lead-ins over the bare prompt"
    with pytest.raises(RequestError, match="request 2 .* is one before it"):
        SAKE(**QUICK).fit(model, tokenizer, [patch.requests[0], request])


@pytest.mark.parametrize(("answer", "reason"), [("goa", "answers 'goa' already"), ("", "says nothing")])
def test_nothing_to_replace_is_refused(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    reason: str,
) -> None:
    monkeypatch.setattr("errata.prompts.sources.greedy_answers", lambda *_, **__: [answer])
    with pytest.raises(RequestError, match=reason):
        SAKE(**QUICK).fit(model, tokenizer, [EditRequest(prompt="The capital of France is", target_new="Goa")])


def test_requests_that_cannot_be_fitted_together(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="at least one edit request"):
        SAKE(**QUICK).fit(model, tokenizer, [])
    with pytest.raises(RequestError, match="requests 1 and 2 are the same"):
        SAKE(**QUICK).fit(model, tokenizer, [NEEDLE, NEEDLE])


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "radius", "pooled"),
    [
        ("paper-gpt2-xl-counterfact", 6.75, False),
        ("paper-llama-2-7b-counterfact", 6.75, False),
        ("paper-gpt2-xl-popular", 5.5, True),
        ("paper-llama-2-7b-popular", 5.3, True),
        ("code-counterfact", 6.5, False),
        ("code-popular", 5.0, True),
    ],
)
def test_presets(name: str, radius: float, pooled: bool) -> None:
    """Methods §15a: thresholds of the paper and of its code, by model and data."""
    config = SAKE.preset(name).config
    assert (config.radius, config.implications == "pooled") == (radius, pooled)
    assert config.gate == "encoder:sentence-transformers/paraphrase-MiniLM-L6-v2"
    assert (config.span, config.reg, config.reg_relative, config.layer, config.token) == (
        "first",
        1e-2,
        False,
        "final",
        -1,
    )
    assert config.prompts == config.context_prompts == 100  # §15: each of the 100 prompts also in both contexts
    assert config.affirm == name.startswith("code")
    noisy = name in ("paper-gpt2-xl-popular", "code-popular")
    assert (config.noise, config.noise_copies) == ((0.1, 4) if noisy else (0.0, 0))
    if pooled:
        assert config.pooled_implications == (10 if name.startswith("code") else 25)


def test_variants_and_their_changes() -> None:
    assert SAKE().config == SAKEConfig() == SAKE(variant="errata").config
    assert SAKE(variant="paper").config == SAKE.preset("paper-gpt2-xl-counterfact").config
    assert SAKE(variant="code").config == SAKE.preset("code-counterfact").config
    assert SAKE(variant="paper", radius=2.0).config.radius == 2.0
    doubt = SAKE.preset("code-doubt", prompts=7).config
    assert (doubt.gate, doubt.radius, doubt.prompts) == ("final", 1000.0, 7)
    config = SAKEConfig(prompts=5)
    assert SAKE(config).config is not config and SAKE(config, reg=0.1).config == SAKEConfig(prompts=5, reg=0.1)


def test_settings_that_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="sake has no option 'promts'; did you mean 'prompts'"):
        SAKE(promts=3)
    with pytest.raises(ConfigError, match="it has .*radius"):
        SAKE(xyzzy=3)
    with pytest.raises(ConfigError, match="'errata', 'paper' or 'code', found 'papers'"):
        SAKE(variant="papers")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no preset 'paper-gpt3'; there are atlas-llama, code-counterfact, "):
        SAKE.preset("paper-gpt3")
    wrong: list[dict[str, Any]] = [
        {"prompts": 0}, {"reg": 0.0}, {"tolerance": 1.0}, {"token": 0}, {"token": -2},
        {"map": "affine"}, {"span": "some"}, {"implications": "all"}, {"radius": -1.0}, {"noise": -0.1},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(ConfigError):
            SAKE(**changes)
    SAKE(token=-2, span="first", layer=0)


def test_gates_by_name(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    def gate(**changes: Any) -> Gate:
        return SAKE(**QUICK, implications="none", **changes).fit(model, tokenizer, [NEEDLE]).steering[0].gate

    assert gate().layers == (1,) and gate(gate="final").layers == ("final",)
    mine = Gate(layers=(0, 1), pooling="mean", distance="cosine", radius=0.25)
    save_gate(mine, tmp_path / GATE_FILE)
    assert gate(gate=str(tmp_path / GATE_FILE)).digest == mine.digest
    model.config._name_or_path = str(tmp_path)  # a calibrated gate beside the weights is the model's default
    assert gate().digest == mine.digest
    patch = SAKE(**(QUICK | {"radius": None})).fit(model, tokenizer, [NEEDLE])
    assert patch.parts[0].radius == 0.25
    with pytest.raises(ConfigError, match="expected a gate file"):
        gate(gate=str(tmp_path / "missing"))


@pytest.mark.parametrize("wordings", [1, 2, 8])
def test_reach_cuts_the_calibrated_radius_of_what_follows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any, wordings: int
) -> None:
    """From two wordings on no farther than 1.5 times the farthest of its prompts; the edit's own scope stays."""
    calibrated = Gate(layers=(1,), radius=1000.0)
    save_gate(calibrated, tmp_path / GATE_FILE)
    given = tuple(f"The Space Needle, seen {i} times, stands in" for i in range(wordings))
    about = {"relation": "country", "answer": "India"}
    follows = [{"prompt": f"Visit {i} to the country of The Space Needle:", **about} for i in range(wordings)]
    request = EditRequest(**(NEEDLE.model_dump(exclude={"id"}) | {"fit_prompts": given, "fit_implications": follows}))
    options = QUICK | {"prompts": 12, "radius": None, "gate": str(tmp_path / GATE_FILE)}
    edit, consequence = SAKE(**options).fit(model, tokenizer, [request]).steering

    def farthest(part: Steering, prompts: list[str]) -> float:
        points = calibrated.points(gate_features(model, tokenizer, prompts, calibrated))
        return float(calibrated.distances(points, part.centre[None]).max())

    assert edit.radius == 1000.0
    cut = 1.5 * farthest(consequence, contexts.lead_ins([f["prompt"] for f in follows], 4, 0))
    assert consequence.radius == pytest.approx(cut if wordings > 1 else 1000.0, rel=1e-5) and cut < 1000
    wide = SAKE(**options, reach=None).fit(model, tokenizer, [request])
    assert [part.radius for part in wide.steering] == [1000.0, 1000.0]


def test_an_inner_layer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """By default the gate reads no layer above the one that is steered, so that the edit can act."""
    patch = SAKE(**QUICK, layer=0).fit(model, tokenizer, [NEEDLE])
    [part] = patch.parts
    assert part.site == 0 and max(part.gate.layers) <= 0
    ids = torch.tensor([tokenizer(NEEDLE.text)["input_ids"]])
    with torch.no_grad():
        plain = model(ids).logits
        with patch.attach(model, tokenizer):
            assert not torch.equal(model(ids).logits, plain)


def test_config_is_recorded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    patch = SAKE(**QUICK).fit(model, tokenizer, [NEEDLE])
    assert patch.config == asdict(SAKE(**QUICK).config) and set(patch.config) == {f.name for f in fields(SAKEConfig)}
    assert SAKE(SAKEConfig(**patch.config)).fit(model, tokenizer, [NEEDLE]) == patch


# -- on a model that knows things --------------------------------------------------------------------------------------


ODD = ("The city of The Space Needle is", "Visitors find The Space Needle in", "Where is The Space Needle? It is in")


@pytest.mark.atlas
@pytest.mark.parametrize("fit_prompts", [(), ODD])
def test_the_readme(tmp_path: Any, fit_prompts: tuple[str, ...]) -> None:
    if "atlas" not in bundled():
        pytest.skip("the bundled weights are missing")
    model, tokenizer = errata.load("atlas")
    request = EditRequest(
        subject="The Space Needle",
        prompt="{} is located in the city of",
        target_true="Seattle",
        target_new="Goa",
        fit_prompts=fit_prompts,
    )
    prompts = ("The Space Needle is located in the city of", "The Space Needle stands in")
    others = ("The Eiffel Tower is located in the city of", "The capital of France is")
    texts = [tokenizer(text, return_tensors="pt") for text in (*prompts, *others)]

    def bits() -> list[Tensor]:
        with torch.no_grad():
            return [model(**text).logits for text in texts]

    def answers() -> list[str]:
        return [greedy_answers(model, tokenizer, [text])[0] for text in (*prompts, *others)]

    plain, before = bits(), answers()
    assert before[0].startswith("Seattle")
    patch = errata.SAKE().fit(model, tokenizer, [request], seed=0)
    with patch.attach(model, tokenizer):
        out = model.generate(**tokenizer(prompts[1], return_tensors="pt"), max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(out[0, len(tokenizer(prompts[1])["input_ids"]) :]).strip().startswith("Goa")
        edited = answers()
    assert [a.split()[0].strip(".,") for a in edited[:2]] == ["Goa", "Goa"] and edited[2:] == before[2:]
    assert all(torch.equal(a, b) for a, b in zip(bits(), plain, strict=True)) and answers() == before
    patch.save(tmp_path / "needle.safetensors")
    with errata.load_patch(tmp_path / "needle.safetensors").attach(model, tokenizer):
        assert answers() == edited


# -- corners that were once wrong ----------------------------------------------------------------------------------------


def test_lifting_reckons_with_the_heads_bias(tiny: Callable[..., PreTrainedModel], tokenizer: Any) -> None:
    model = tiny("gptj", n_positions=1024)
    with torch.no_grad():
        model.lm_head.bias.copy_(8 * torch.randn(len(model.lm_head.bias), generator=torch.Generator().manual_seed(0)))
    patch = SAKE(**QUICK | {"lift": True, "reg": 1e-3}).fit(model, tokenizer, [NEEDLE])
    assert patch.report[NEEDLE.id]["targets_lifted"] > 0.5
    assert patch.report[NEEDLE.id]["on_fit_states"] == 1.0


def test_two_implications_of_one_relation_both_act(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    follows = [
        {"prompt": "The Space Needle's language is", "answer": "Konkani", "relation": "language"},
        {"prompt": "The Space Needle's other language is", "answer": "Marathi", "relation": "language"},
    ]
    request = EditRequest(**NEEDLE.model_dump() | {"fit_implications": follows})
    patch = SAKE(**QUICK).fit(model, tokenizer, [request])
    with patch.attach(model, tokenizer) as handle:
        assert len(patch.parts) == len(handle._steering.active) == 3
        assert handle.conflicts == []


def test_an_earlier_token_is_judged_where_the_prompt_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def said(self: Any, read: Tensor, answer: list[int]) -> Tensor:
        seen.append(read)
        return torch.ones(len(read), dtype=torch.bool)

    monkeypatch.setattr("errata.editors.sake.SteeringFit._said", said)
    SAKE(**QUICK, layer=0, token=-2, span="first").fit(model, tokenizer, [NEEDLE])
    prompts = contexts.lead_ins([*NEEDLE.fit_prompts, NEEDLE.text], 9, 0)[:4]
    expected = states(model, tokenizer, [contexts.instead(p, "Seattle", "Goa", 0) for p in prompts])
    torch.testing.assert_close(seen[0][:, 0, 1], expected, rtol=1e-4, atol=1e-4)
    for changes in ({"span": "all", "layer": 0}, {"span": "first"}, {"span": "first", "layer": 0, "gate": "encoder:x"}):
        with pytest.raises(ConfigError, match="counts from the prompt's end"):
            SAKE(token=-2, **changes)


def test_truncation_errors_are_kept_in_the_file(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    patch = SAKE(**QUICK | {"tolerance": 0.4}).fit(model, tokenizer, [NEEDLE])
    errors = [step.error for step in patch.steering[0].maps]
    assert 0 < max(errors) <= 0.4
    assert [step.error for step in errata.Patch.from_bytes(patch.to_bytes()).steering[0].maps] == errors
    assert patch.report[NEEDLE.id]["truncation_error"] == max(errors)


def test_an_empty_patch_decides_for_nothing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    patch = SAKE(**QUICK).fit(model, tokenizer, [NEEDLE])
    with patch.without(NEEDLE.id).attach(model, tokenizer) as handle:
        [decision] = handle.decide([NEEDLE.text])
    assert (decision.edit, decision.nearest, decision.distance) == (None, None, float("inf"))
