"""Text to tokens and back, with a small byte-level BPE tokenizer trained here."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tests.fakes import LetterTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shoal.errors import InvalidRequest, PromptTooLong
from shoal.wire import GenerationRequest, SamplingParams
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.sequence import SampledToken, Sequence, SequenceKey, TokenLogprobs
from shoal_worker.text import MIN_LOGPROB, TextCodec, TextStream

EOS_TOKEN = "<|endoftext|>"
SENTENCES = (
    "Once upon a time there was a shoal of fish in the sea, and the sea was deep.",
    "Über den Wolken müssen die Größe und die Süße grenzenlos sein.",
    "L'été dernier, le garçon a mangé des crêpes à la crème brûlée.",
    "北京是中国的首都。今天天气很好,我们去公园吧。",
    "吾輩は猫である。名前はまだ無い。",
    "🐟🐠🐡 swim, 👩‍👩‍👧 watch, and 🎉🎉 follow.",
)
TABLE = LaneTable([LaneSpec("interactive", 2, 64), LaneSpec("bulk", 4, 4096)])


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Trained on the sentences above; every byte is a token, so that all text has tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS_TOKEN)


@lru_cache
def codec() -> TextCodec:
    return TextCodec(tokenizer(), frozenset({eos()}), len(tokenizer()), TABLE)


def eos() -> int:
    return token_id(EOS_TOKEN)


def token_id(symbol: str) -> int:
    found = tokenizer().convert_tokens_to_ids(symbol)
    assert isinstance(found, int)
    return found


def encode(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


@lru_cache
def byte_tokens() -> list[int]:
    """The token of each single byte, by its value."""
    ids = [-1] * 256
    for symbol in pre_tokenizers.ByteLevel.alphabet():
        ids[_byte_of(symbol)] = token_id(symbol)
    assert min(ids) >= 0
    return ids


def _byte_of(symbol: str) -> int:
    # GPT-2's table: printable bytes stand for themselves, the others follow from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    if ord(symbol) in printable:
        return ord(symbol)
    return [byte for byte in range(256) if byte not in printable][ord(symbol) - 256]


def bytewise(text: str) -> list[int]:
    """One token a byte: the hardest way to make a text."""
    return [byte_tokens()[byte] for byte in text.encode()]


def sequence(prompt: list[int], **sampling: Any) -> Sequence:
    return Sequence(
        SequenceKey("job", 0, 0),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**{"max_tokens": 10_000, **sampling}),
        seed=0,
        stop_token_ids=frozenset({eos(), *sampling.get("stop_token_ids", [])}),
    )


def stream_of(
    one: Sequence, tokens: list[int], chunks: list[int], using: TextCodec | None = None
) -> tuple[TextStream, list[str]]:
    """Let a sequence make these tokens, so many at once, as the loop would: the stream, its takes.

    It ends as `length` when the tokens are used up.
    """
    stream, takes, at = TextStream(using or codec(), one), [], 0
    sizes = iter(chunks)
    while not one.is_finished:
        for token in tokens[at : (at := at + next(sizes, 1))]:
            if not one.is_finished:
                one.append(SampledToken(token))
        if at >= len(tokens) and not one.is_finished:
            one.finish_reason = "length"
        stream.advance()
        if stream.stopped:
            one.truncate(stream.num_tokens)
            one.finish_reason = "stop"
        takes.append(stream.take())
    return stream, takes


def generated(text: str, prompt: str = "Once", **sampling: Any) -> tuple[TextStream, list[str]]:
    """The stream of a sequence that makes this text, in its usual tokens, one at a time."""
    return stream_of(sequence(encode(prompt), **sampling), encode(text), [])


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12) | st.sampled_from(
    [*SENTENCES, " ", "\n", "🐟", "é", "e\u0301", "\u200d", "北京", "a\ufffd", "\ufffd"]
)
TEXTS = st.lists(TEXT, min_size=1, max_size=3).map("".join)
CHUNKS = st.lists(st.integers(1, 5), max_size=20)


@st.composite
def _tokens_of(draw: st.DrawFn, text: str) -> list[int]:
    """Tokens of a text: some of its pieces as the tokenizer would, others byte by byte."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [
        token
        for piece in pieces
        for token in (encode(piece) if draw(st.booleans()) else bytewise(piece))
        if piece
    ]


@settings(deadline=None)
@given(TEXTS, TEXTS, st.data())
def test_tokens_behind_any_prompt_add_the_very_text_they_were_made_from(
    prompt: str, text: str, data: st.DataObject
) -> None:
    tokens = data.draw(_tokens_of(text))

    assert codec().decode_after(encode(prompt), tokens) == text
    assert codec().decode_after(encode(prompt)[-6:], tokens) == text
    assert codec().decode_after([], tokens) == text


@settings(deadline=None)
@given(TEXTS, st.data())
def test_a_character_begun_in_the_prompt_belongs_to_the_completion(
    text: str, data: st.DataObject
) -> None:
    tokens = bytewise(text)
    cut = data.draw(st.integers(1, len(tokens)))
    whole = text.encode()[:cut].decode(errors="ignore")
    assume("\ufffd" not in text)

    assert codec().decode_after(tokens[:cut], tokens[cut:]) == text.removeprefix(whole) or (
        cut == len(tokens)
    )


def test_a_prompt_that_ends_in_a_replacement_character_does_not_give_it_to_the_completion() -> None:
    assert codec().decode_after(encode("broken \ufffd"), encode(" text")) == " text"
    assert codec().decode_after(encode("\ufffd\ufffd"), encode("\ufffd")) == "\ufffd"
    half = bytewise("北")[:2]
    assert codec().decode_after(encode("\ufffd\ufffd") + half, bytewise("北")[2:]) == "北"


def test_a_leading_space_of_the_first_token_is_kept() -> None:
    stream, takes = generated(" upon a time")

    assert stream.text == " upon a time"
    assert "".join(takes) == " upon a time"


@settings(deadline=None)
@given(TEXTS, TEXTS, CHUNKS, st.data())
def test_the_stream_of_a_text_is_that_text_however_it_comes(
    prompt: str, text: str, chunks: list[int], data: st.DataObject
) -> None:
    one = sequence(encode(prompt))

    stream, takes = stream_of(one, data.draw(_tokens_of(text)), chunks)

    assert stream.text == text
    assert "".join(takes) == text
    assert codec().completion(one).text == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 419), min_size=1, max_size=12), st.data(), CHUNKS)
def test_any_tokens_at_all_stream_to_the_text_of_their_completion(
    tokens: list[int], data: st.DataObject, chunks: list[int]
) -> None:
    tokens = [token % len(tokenizer()) for token in tokens]
    prompt = data.draw(st.lists(st.integers(1, len(tokenizer()) - 1), min_size=1, max_size=9))
    one = sequence(prompt)

    stream, takes = stream_of(one, tokens, chunks)

    assert "".join(takes) == stream.text == codec().completion(one).text


@settings(deadline=None)
@given(TEXTS, CHUNKS, st.data())
def test_an_unfinished_character_is_never_shown(
    text: str, chunks: list[int], data: st.DataObject
) -> None:
    assume("\ufffd" not in text)
    one = sequence(encode("Once"))
    tokens = data.draw(_tokens_of(text))

    _stream, takes = stream_of(one, tokens, chunks)

    assert not any("\ufffd" in take for take in takes)


def test_a_character_that_stays_unfinished_is_shown_at_the_end() -> None:
    stream, takes = stream_of(sequence(encode("Once")), bytewise("a🐟")[:-1], [])

    assert stream.text == "a\ufffd"
    assert takes == ["a", "", "", "\ufffd"]


STOPPY = st.text("ab北\n", min_size=1, max_size=4)


@settings(deadline=None)
@given(st.text("ab北\n", min_size=1, max_size=25), STOPPY, CHUNKS, st.booleans(), st.data())
def test_the_text_ends_before_the_first_stop_string_or_with_it_if_wanted(
    text: str, stop: str, chunks: list[int], include: bool, data: st.DataObject
) -> None:
    one = sequence(encode("Once"), stop=stop, include_stop_str_in_output=include)

    stream, takes = stream_of(one, data.draw(_tokens_of(text)), chunks)

    before, found, _ = text.partition(stop)
    assert stream.text == before + (found if include else "")
    assert "".join(takes) == stream.text
    assert stream.stopped == bool(found)
    assert one.finish_reason == ("stop" if found else "length")


@settings(deadline=None)
@given(
    st.text("ab北\n", min_size=1, max_size=25),
    st.lists(STOPPY, min_size=2, max_size=4),
    CHUNKS,
    st.integers(0, 6),
    st.data(),
)
def test_where_a_text_stops_does_not_depend_on_how_many_tokens_come_at_once(
    text: str, stops: list[str], chunks: list[int], min_tokens: int, data: st.DataObject
) -> None:
    tokens = data.draw(_tokens_of(text))
    single, several = (
        sequence(encode("Once"), stop=stops, min_tokens=min_tokens) for _ in range(2)
    )

    one, _ = stream_of(single, tokens, [])
    other, takes = stream_of(several, tokens, chunks)

    assert other.text == one.text == "".join(takes)
    assert several.output_token_ids == single.output_token_ids
    assert several.finish_reason == single.finish_reason


@settings(deadline=None)
@given(
    st.text("ab北\n", min_size=1, max_size=25),
    st.lists(STOPPY, min_size=2, max_size=4),
    CHUNKS,
    st.data(),
)
def test_of_several_stop_strings_none_is_left_in_the_text(
    text: str, stops: list[str], chunks: list[int], data: st.DataObject
) -> None:
    one = sequence(encode("Once"), stop=stops)

    stream, _takes = stream_of(one, data.draw(_tokens_of(text)), chunks)

    assert not any(stop in stream.text for stop in stops)
    assert text.startswith(stream.text)
    rest = text.removeprefix(stream.text)
    assert any(rest.startswith(stop) for stop in stops) if stream.stopped else rest == ""


def test_of_two_stop_strings_in_one_token_the_earlier_counts() -> None:
    tokens = encode(" the")
    assert len(tokens) == 1
    one = sequence(encode("Once"), stop=["he", "th"])

    stream, _ = stream_of(one, tokens, [])

    assert stream.text == " "


def test_a_stop_string_across_tokens_is_found_and_its_beginning_was_never_shown() -> None:
    one = sequence(encode("Once"), stop="END")

    stream, takes = stream_of(one, bytewise("the END of it"), [])

    assert stream.text == "the "
    assert "".join(takes) == "the "
    assert one.output_token_ids == bytewise("the END")


def test_what_might_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    one = sequence(encode("Once"), stop=["END", "NOT"])

    _stream, takes = stream_of(one, bytewise("ENO NO."), [])

    # "EN" may become END; at "ENO" only "NO" may still become NOT; the space settles it.
    assert takes == ["", "", "E", "NO ", "", "", "NO."]


def test_what_was_held_back_is_shown_when_the_text_ends() -> None:
    stream, takes = stream_of(sequence(encode("Once"), stop="END"), bytewise("an EN"), [])

    assert takes[-1] == "EN"
    assert "".join(takes) == stream.text == "an EN"


def test_a_stop_string_that_is_the_end_of_the_text_leaves_nothing_of_it() -> None:
    one = sequence(encode("Once"), stop="END", max_tokens=3)

    stream, takes = stream_of(one, bytewise("END"), [3])

    assert (stream.text, takes) == ("", [""])
    assert one.finish_reason == "stop"


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    stream, _ = stream_of(sequence(encode("the EN"), stop="END"), bytewise("D of it"), [])

    assert stream.text == "D of it"


@pytest.mark.parametrize("chunks", [[], [2, 3], [100]])
def test_a_stop_string_before_the_least_number_of_tokens_does_not_count(chunks: list[int]) -> None:
    one = sequence(encode("Once"), stop="b", min_tokens=3)

    stream, takes = stream_of(one, bytewise("abcabc"), chunks)

    assert stream.text == "abca"
    assert "".join(takes) == "abca"


@pytest.mark.parametrize("chunks", [[], [9]])
def test_tokens_made_behind_a_stop_string_do_not_count(chunks: list[int]) -> None:
    one = sequence(encode("Once"), stop="b", logprobs=0)
    stream = TextStream(codec(), one)
    for token in bytewise("abcd"):
        one.append(SampledToken(token, TokenLogprobs(-1.0, ())))

    stream.advance()
    one.truncate(stream.num_tokens)

    assert one.output_token_ids == bytewise("ab")
    assert len(one.output_logprobs) == 2


def test_a_stopped_stream_takes_no_more_text() -> None:
    one = sequence(encode("Once"), stop="b")
    stream = TextStream(codec(), one)
    for token in bytewise("abcd"):
        one.append(SampledToken(token))
    stream.advance()

    stream.advance()

    assert stream.text == "a"


def test_the_end_token_adds_no_text() -> None:
    one = sequence(encode("Once"))

    stream, _ = stream_of(one, [*encode(" upon"), eos(), *encode(" more")], [])

    assert one.finish_reason == "stop"
    assert stream.text == codec().completion(one).text == " upon"
    assert one.output_token_ids[-1] == eos()


@pytest.mark.parametrize(("include", "text"), [(False, " upon"), (True, " upon.")])
def test_a_stop_tokens_text_is_left_out_unless_wanted(include: bool, text: str) -> None:
    (dot,) = encode(".")
    one = sequence(encode("Once"), stop_token_ids=[dot], include_stop_str_in_output=include)

    stream, takes = stream_of(one, encode(" upon."), [100])

    assert stream.text == "".join(takes) == codec().completion(one).text == text


def test_an_end_token_as_the_very_first_makes_an_empty_text() -> None:
    one = sequence(encode("Once"))

    stream, takes = stream_of(one, [eos()], [])

    assert (stream.text, takes) == ("", [""])
    assert codec().completion(one).token_ids == [eos()]


@lru_cache
def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: words begin with a mark for the space, unknown characters become bytes."""
    vocab = {"<s>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁b", "th"):
        vocab[piece] = len(vocab)
    bpe = Tokenizer(
        models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("t", "h")], byte_fallback=True, fuse_unk=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")


SPACED = st.text("ab th北é🐟", min_size=1, max_size=12)


@settings(deadline=None)
@given(SPACED, SPACED, CHUNKS)
@example("a北🐟", "é th", [])  # The last six tokens of the prompt begin within a character.
def test_words_and_bytes_of_a_llama_like_tokenizer_stream_to_their_text(
    before: str, text: str, chunks: list[int]
) -> None:
    spaced = TextCodec(spaced_tokenizer(), frozenset(), 400, TABLE)
    prompt = list(spaced_tokenizer()(before)["input_ids"])
    whole = list(spaced_tokenizer()(before + text)["input_ids"])
    assume(whole[: len(prompt)] == prompt)
    one = sequence(prompt)

    stream, takes = stream_of(one, whole[len(prompt) :], chunks, spaced)

    assert "".join(takes) == stream.text == spaced.completion(one).text == text
    assert not any("\ufffd" in take for take in takes)


# --- requests


def sequences(prompt: str | list[int], **fields: Any) -> list[Sequence]:
    service_class = fields.pop("service_class", "interactive")
    deadline = fields.pop("deadline", None)
    request = GenerationRequest(
        prompt=prompt,
        sampling=SamplingParams(**fields),
        service_class=service_class,
        deadline=deadline,
    )
    return codec().sequences(request, "job", 3, now_s=10.0, priority=2)


def test_a_request_becomes_a_sequence_for_each_sample() -> None:
    made = sequences("Once upon", n=3, seed=5, deadline=2.5)

    assert [one.key for one in made] == [SequenceKey("job", 3, sample) for sample in range(3)]
    for one in made:
        assert one.prompt_token_ids == tuple(encode("Once upon"))
        assert (one.seed, one.priority, one.arrival_s, one.deadline_s) == (5, 2, 10.0, 12.5)
        assert one.service_class == "interactive"


def test_token_ids_are_taken_as_they_are() -> None:
    assert sequences([1, 2, 3])[0].prompt_token_ids == (1, 2, 3)


def test_a_request_without_a_seed_has_that_of_its_place_in_its_job() -> None:
    request = GenerationRequest(prompt="Once")

    def seed(job_id: str, index: int) -> int:
        return codec().sequences(request, job_id, index, now_s=0.0, priority=0)[0].seed

    assert seed("a", 0) == seed("a", 0)
    assert len({seed("a", 0), seed("a", 1), seed("b", 0)}) == 3
    assert all(0 <= seed("a", i) < 2**63 for i in range(100))


@pytest.mark.parametrize(
    ("ignore_eos", "stops"), [(False, {0, 7}), (True, {7})], ids=["minded", "ignored"]
)
def test_the_models_end_tokens_end_it_unless_ignored(ignore_eos: bool, stops: set[int]) -> None:
    assert eos() == 0

    (one,) = sequences("Once", stop_token_ids=[7], ignore_eos=ignore_eos)

    assert one.stop_token_ids == stops


def test_a_token_id_past_the_vocabulary_is_refused_with_both_numbers() -> None:
    vocab_size = len(tokenizer())
    assert sequences([vocab_size - 1])

    with pytest.raises(
        InvalidRequest, match=f"token id {vocab_size}; .* vocabulary ends at {vocab_size - 1}"
    ):
        sequences([1, vocab_size, 2])


def test_text_with_tokens_that_the_model_lacks_is_refused() -> None:
    small = TextCodec(tokenizer(), frozenset(), 10, TABLE)

    with pytest.raises(InvalidRequest, match="vocabulary ends at 9"):
        small.sequences(GenerationRequest(prompt="Once"), "job", 0, now_s=0.0, priority=0)


def test_text_without_tokens_is_refused() -> None:
    empty = TextCodec(DeafTokenizer(), frozenset(), 10, TABLE)

    with pytest.raises(InvalidRequest, match="no tokens"):
        empty.sequences(GenerationRequest(prompt="\x00"), "job", 0, now_s=0.0, priority=0)


class DeafTokenizer:
    """A tokenizer that drops all text."""

    chat_template = None

    def apply_chat_template(self, messages: object) -> str:
        raise AssertionError("there is no template")

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return ""


@pytest.mark.parametrize(("service_class", "limit"), [("interactive", 64), ("bulk", 4096)])
def test_a_request_too_long_for_its_class_is_refused_with_both_numbers(
    service_class: str, limit: int
) -> None:
    fits = sequences([1] * (limit - 16), max_tokens=16, service_class=service_class)
    assert fits[0].num_positions == limit

    with pytest.raises(PromptTooLong) as caught:
        sequences([1] * (limit - 15), max_tokens=16, service_class=service_class)

    text = str(caught.value)
    assert f"{limit - 15} tokens and max_tokens is 16, {limit + 1} in all" in text
    assert f"takes {limit}:" in text


# --- completions


def ended(tokens: list[int], **sampling: Any) -> Sequence:
    one = sequence(encode("Once"), **sampling)
    for token in tokens:
        one.append(SampledToken(token, TokenLogprobs(-0.5, ((token, -0.5), (5, -2.0)))))
    one.finish_reason = one.finish_reason or "length"
    return one


def test_a_completion_carries_tokens_reason_and_its_samples_number() -> None:
    one = ended(encode(" upon"))
    one.key = SequenceKey("job", 0, 4)

    completion = codec().completion(one)

    assert (completion.index, completion.finish_reason) == (4, "length")
    assert completion.token_ids == encode(" upon")
    assert completion.logprobs is None


def test_text_up_to_a_stop_string_is_taken_as_it_is() -> None:
    assert codec().completion(ended(encode(" upon")), "").text == ""


def test_log_probabilities_come_as_one_entry_a_token() -> None:
    tokens = encode(" upon a")

    logprobs = codec().completion(ended(tokens, logprobs=2)).logprobs

    assert logprobs is not None
    assert "".join(logprobs.tokens) == " upon a"
    assert logprobs.token_logprobs == [-0.5] * len(tokens)
    first = tokenizer().decode([tokens[0]])
    assert logprobs.top_logprobs[0] == {first: -0.5, tokenizer().decode([5]): -2.0}


def test_of_tokens_with_the_same_text_the_likelier_names_its_log_probability() -> None:
    one = sequence(encode("Once"), logprobs=2)
    halves = [byte_tokens()[0xE5], byte_tokens()[0xE6]]  # Each alone is shown as U+FFFD.
    one.append(SampledToken(halves[0], TokenLogprobs(-0.5, ((halves[0], -0.5), (halves[1], -3.0)))))
    one.finish_reason = "length"

    logprobs = codec().completion(one).logprobs

    assert logprobs is not None
    assert logprobs.top_logprobs == [{"\ufffd": -0.5}]


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e30])
def test_a_log_probability_that_json_cannot_hold_is_a_very_small_one(value: float) -> None:
    one = sequence(encode("Once"), logprobs=1)
    one.append(SampledToken(5, TokenLogprobs(value, ((5, value),))))
    one.finish_reason = "length"

    logprobs = codec().completion(one).logprobs

    assert logprobs is not None
    assert logprobs.token_logprobs == [MIN_LOGPROB]
    assert list(logprobs.top_logprobs[0].values()) == [MIN_LOGPROB]


def chat_request(**fields: Any) -> GenerationRequest:
    messages = [{"role": "user", "content": "hi"}]
    return GenerationRequest.model_validate({"messages": messages, **fields})


def test_a_conversation_becomes_a_prompt_by_the_tokenizer_s_template() -> None:
    codec = TextCodec(LetterTokenizer(), frozenset(), 1000, TABLE)

    (sequence,) = codec.sequences(chat_request(), "j", 0, now_s=0.0, priority=0)

    assert "".join(map(chr, sequence.prompt_token_ids)) == "user: hi\nassistant:"


def test_a_conversation_without_a_template_is_refused() -> None:
    codec = TextCodec(DeafTokenizer(), frozenset(), 1000, TABLE)

    with pytest.raises(InvalidRequest, match="messages need a chat template"):
        codec.sequences(chat_request(), "j", 0, now_s=0.0, priority=0)


@pytest.mark.parametrize("max_tokens", [1, 4000])
def test_a_prompt_that_does_not_fit_loses_its_beginning_if_the_request_allows_it(
    max_tokens: int,
) -> None:
    codec = TextCodec(LetterTokenizer(), frozenset(), 1000, TABLE)
    longest = TABLE.max_positions("bulk")
    request = GenerationRequest(
        prompt="a" + "b" * longest,
        sampling=SamplingParams(max_tokens=max_tokens),
        service_class="bulk",
        on_long="truncate-left",
    )

    (sequence,) = codec.sequences(request, "j", 0, now_s=0.0, priority=0)

    assert sequence.num_positions == longest
    assert sequence.truncated_tokens == 1 + max_tokens
    assert set(sequence.prompt_token_ids) == {ord("b")}


def test_no_cut_makes_room_for_more_new_tokens_than_a_lane_has() -> None:
    codec = TextCodec(LetterTokenizer(), frozenset(), 1000, TABLE)
    sampling = SamplingParams(max_tokens=TABLE.max_positions("bulk"))
    request = GenerationRequest(
        prompt="a", sampling=sampling, service_class="bulk", on_long="truncate-left"
    )

    with pytest.raises(PromptTooLong):
        codec.sequences(request, "j", 0, now_s=0.0, priority=0)
