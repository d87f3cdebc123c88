"""Positions on real strings: both padding sides, both spacing conventions, characters of several bytes."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from errata.errors import ConfigError, RequestError, ShapeError, SubjectNotFoundError
from errata.model import tokens

Tiny = Callable[..., PreTrainedModel]
Tokenizer = PreTrainedTokenizerFast
TEXTS = ["The capital of France is", "Zürich", "The Space Needle is located in the city of"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@pytest.fixture(params=["tokenizer", "sentencepiece"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def test_with_space() -> None:
    assert tokens.with_space("Paris") == tokens.with_space(" Paris") == " Paris"


@pytest.mark.parametrize("side", ["right", "left"])
def test_encode(either: Tokenizer, side: tokens.Side) -> None:
    either.padding_side = "left" if side == "right" else "right"
    either.backend_tokenizer.enable_padding(length=50)
    either.backend_tokenizer.enable_truncation(40)
    state = (either.padding_side, either.pad_token, either.backend_tokenizer.to_str())
    batch = tokens.encode(either, TEXTS, "cpu", side)
    assert (either.padding_side, either.pad_token, either.backend_tokenizer.to_str()) == state
    rows = [either(text)["input_ids"] for text in TEXTS]
    assert batch.lengths.tolist() == [len(row) for row in rows]
    assert batch.ids.shape == batch.mask.shape == batch.position_ids.shape == (3, max(map(len, rows)))
    last = tokens.last_positions(batch.mask).tolist()
    for i, row in enumerate(rows):
        real = batch.mask[i].bool()
        assert batch.ids[i][real].tolist() == row
        assert batch.position_ids[i][real].tolist() == list(range(len(row)))
        assert batch.ids[i, last[i]] == row[-1] and real[last[i]] and not real[last[i] + 1 :].any()
        assert bool(real[0 if side == "right" else -1])


def test_special_tokens_are_the_tokenizers_own(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert tokens.encode(sentencepiece, TEXTS).ids[:, 0].tolist() == [1, 1, 1]
    assert tokens.token_ids(sentencepiece, TEXTS, special=False)[0][0] != 1
    assert sentencepiece.pad_token is None and tokens.pad_id(sentencepiece) == 2
    assert [tokenizer.decode(row) for row in tokens.token_ids(tokenizer, TEXTS)] == TEXTS


def test_texts_and_rows_that_cannot_be(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="text 2 of 2"):
        tokens.encode(tokenizer, ["a", ""])
    with pytest.raises(ShapeError, match="at least one row"):
        tokens.encode(tokenizer, [])
    with pytest.raises(ConfigError, match="'right' or 'left'"):
        tokens.encode(tokenizer, ["a"], side="top")  # type: ignore[arg-type]


def test_padding_side_does_not_matter_to_a_model(tiny: Tiny, family: str, tokenizer: Tokenizer) -> None:
    model = tiny(family)
    rows = torch.arange(len(TEXTS))
    logits = {}
    for side in ("right", "left"):
        batch = tokens.encode(tokenizer, TEXTS, side=side)
        with torch.no_grad():
            logits[side] = model(**batch.inputs(model)).logits[rows, tokens.last_positions(batch.mask)]
    torch.testing.assert_close(logits["left"], logits["right"], atol=1e-4, rtol=0)  # sums in another order


@pytest.mark.parametrize(
    ("prompt", "subject", "span"),
    [
        ("The Space Needle is in", "The Space Needle", (0, 16)),
        ("Paris, and again Paris is", "Paris", (17, 22)),
        ("the space needle is in", "The Space Needle", (0, 16)),
        ("France? france is", "France", (0, 6)),
        ("Rome, not Romeo, is", "Rome", (0, 4)),
        ("preRomeo is", "Rome", (3, 7)),
        ("Where is C++ (2011)?", "C++ (2011)", (9, 19)),
        ("İzmir and ZÜRICH are", "Zürich", (10, 16)),
        ("東京の人口は", "東京", (0, 2)),
    ],
)
def test_subject_span(prompt: str, subject: str, span: tuple[int, int]) -> None:
    assert tokens.subject_span(prompt, subject) == span


@pytest.mark.parametrize("subject", ["France", "", " "])
def test_subject_not_found(subject: str) -> None:
    with pytest.raises(SubjectNotFoundError, match=r"expected the subject.*The capital of Franc is"):
        tokens.subject_span("The capital of Franc is", subject)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("The Space Needle is located in", "The Space Needle"),
        ("The capital of France is", "France"),
        ("The mother tongue is Danielle Darrieux's French", "Danielle Darrieux"),
        ("Zürich lies in", "Zürich"),
        ("The city of São Paulo lies in", "São Paulo"),
        ("The president of the United States", "United States"),
    ],
)
def test_subject_tokens_cover_the_subject(either: Tokenizer, prompt: str, subject: str) -> None:
    first, last = tokens.subject_tokens(either, prompt, subject)
    ids = either(prompt)["input_ids"]
    piece = either.decode(ids[first : last + 1]).strip()
    assert piece.startswith(subject) and len(piece) <= len(subject) + 2  # "'s" may be one token with the name
    start, end = tokens.subject_span(prompt, subject)
    assert either.decode(ids[:first], skip_special_tokens=True).strip() == prompt[:start].strip()
    assert either.decode(ids[last + 1 :]).strip() == prompt[end:][len(piece) - len(subject) :].strip()


def test_subject_of_characters_split_over_tokens(tokenizer: Tokenizer) -> None:
    prompt = "In 東京 the 🙂 is"
    ids = tokenizer(prompt)["input_ids"]
    for subject, n_bytes in (("東京", 6), ("🙂", 4), ("京", 3)):
        first, last = tokens.subject_tokens(tokenizer, prompt, subject)
        assert last - first + 1 >= n_bytes  # no merges of these bytes were learnt; a space may be a token of its own
        assert tokenizer.decode(ids[first : last + 1]).strip() == subject


def test_offsets_without_the_leading_space(tokenizer: Tokenizer) -> None:
    """`trim_offsets`: GPT-2's own setting leaves the space out of a token's span; the tokens are the same."""
    from tokenizers.processors import ByteLevel

    prompt = "The capital of France is"
    with_space = tokens.subject_tokens(tokenizer, prompt, "France")
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert tokens.subject_tokens(tokenizer, prompt, "France") == with_space


def test_subject_of_unknown_characters(sentencepiece: Tokenizer) -> None:
    prompt = "The capital of 東京 is"
    first, last = tokens.subject_tokens(sentencepiece, prompt, "東京")
    ids = sentencepiece(prompt)["input_ids"]
    assert sentencepiece.unk_token_id in ids[first : last + 1]
    assert sentencepiece.decode(ids[last + 1 :]).strip() == "is"


@pytest.mark.parametrize("side", ["right", "left"])
def test_subject_position_in_a_padded_batch(either: Tokenizer, side: tokens.Side) -> None:
    prompts = ["The capital of France is", "In France they speak"]
    batch = tokens.encode(either, prompts, side=side)
    for i, prompt in enumerate(prompts):
        first, last = tokens.subject_tokens(either, prompt, "France")
        offset = int(batch.mask.shape[1] - batch.lengths[i]) if side == "left" else 0
        assert either.decode(batch.ids[i, first + offset : last + offset + 1]).strip() == "France"


@pytest.mark.parametrize("target", ["Paris", " Paris", "São Paulo", "東京", "Mount Everest"])
def test_continuation_completes_the_prompt(either: Tokenizer, target: str) -> None:
    if either.unk_token and target == "東京":
        pytest.skip("not in the Unigram vocabulary")
    prompt = "The highest point is"
    ids = tokens.continuation_ids(either, prompt, target)
    joint = tokens.token_ids(either, [f"{prompt} {target.strip()}"])[0]
    assert tokens.token_ids(either, [prompt])[0] + ids == joint


def test_continuation_after_a_line_break_gets_no_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokens.continuation_ids(tokenizer, "[assistant]\n", "Paris")) == "Paris"


def test_continuation_when_the_boundary_merges(either: Tokenizer) -> None:
    """After a trailing space "of " + "Paris" is "of", " Paris": the ids are those of " Paris"."""
    expected = tokens.continuation_ids(either, "the capital of", "Paris")
    assert tokens.continuation_ids(either, "the capital of ", "Paris") == expected


def test_continuation_needs_a_target(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="expected a target"):
        tokens.continuation_ids(tokenizer, "The capital of France is", " ")


def test_chat_keeps_the_subject(either: Tokenizer) -> None:
    either.chat_template = TEMPLATE
    text = tokens.chat(either, "Where is the Space Needle?")
    first, last = tokens.subject_tokens(either, text, "Space Needle")
    ids = tokens.token_ids(either, [text])[0]
    assert either.decode(ids[first : last + 1]).strip() == "Space Needle"
    bos = either.bos_token_id
    assert ids.count(bos) == 1 and ids[0] == bos  # from the template or from the tokenizer, never both
    assert text.endswith("[assistant]\n")


def test_chat_without_template_or_with_one_that_alters(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="chat template, found none"):
        tokens.chat(tokenizer, "Where is it?")
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ConfigError, match="keep the prompt"):
        tokens.chat(tokenizer, "Where is it?")


def test_slow_tokenizers_are_refused_by_name(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ConfigError, match="expected a fast tokenizer"):
        tokens.subject_tokens(tokenizer, "Where is it?", "it")
