"""Text to tokens and back: a request becomes sequences, a sequence becomes a completion.

Owns tokenising, the checks that need token counts, detokenising and stop strings. The tokenizer is
passed in; it knows no model, no queue and no clock.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from itertools import chain
from typing import Any, Protocol

from shoal.errors import InvalidRequest, PromptTooLong
from shoal.wire import ChatMessage, Completion, GenerationRequest, Logprobs
from shoal_worker.lanes import LaneTable
from shoal_worker.sequence import Sequence, SequenceKey

# Enough context for a tokenizer to decide about a leading space, as vLLM's detokenizer keeps.
CONTEXT_TOKENS = 6
MAX_CHARACTER_TOKENS = 4  # A character is up to four bytes of UTF-8.
UNFINISHED = "\ufffd"  # What a tokenizer shows for the first bytes of a character.
MIN_LOGPROB = -9999.0  # JSON has no infinity, and no NaN either; vLLM's number.


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer: encoding a text, decoding token ids."""

    # Wide on purpose: transformers' own signatures are unions over everything it ever took.
    @property
    def __call__(self) -> Callable[..., Any]:
        """Encode with the model's own special tokens; the result has `input_ids`."""
        ...

    @property
    def decode(self) -> Callable[..., Any]:
        """The text of these tokens."""
        ...

    @property
    def chat_template(self) -> Any:
        """What makes a prompt of a conversation; None where the model was not made for any."""
        ...

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """A conversation as a prompt, up to where the assistant speaks."""
        ...


class TextCodec:
    """Turns requests into sequences and sequences into completions, for one model.

    Args:
        eos_token_ids: the tokens that end a text in this model.
        vocab_size: token ids in requests must be under it.
        table: the lanes; a request too long for its class's longest lane is refused.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], vocab_size: int, table: LaneTable
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._table = table

    def sequences(
        self, request: GenerationRequest, job_id: str, index: int, *, now_s: float, priority: int
    ) -> list[Sequence]:
        """One sequence a sample of this request.

        Raises:
            InvalidRequest: a token id is not in the vocabulary, the text has no tokens, or there is
                no chat template for messages.
            PromptTooLong: no lane holds prompt and new tokens together.
        """
        whole = self._encode(request)
        prompt = self._fitted(whole, request)
        sampling = request.sampling
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", sampling.logit_bias)
        stops = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops |= self._eos_token_ids
        seed = sampling.seed if sampling.seed is not None else _seed_of(job_id, index)
        sequences = [
            Sequence(
                key=SequenceKey(job_id, index, sample),
                prompt_token_ids=prompt,
                sampling=sampling,
                seed=seed,
                service_class=request.service_class,
                stop_token_ids=stops,
                truncated_tokens=len(whole) - len(prompt),
                priority=priority,
                arrival_s=now_s,
                deadline_s=None if request.deadline is None else now_s + request.deadline,
            )
            for sample in range(sampling.n)
        ]
        if self._table.lane_for(sequences[0]) is None:
            raise PromptTooLong(
                f"the prompt is {len(prompt)} tokens and max_tokens is {sampling.max_tokens}, "
                f"{sequences[0].num_positions} in all; this worker takes "
                f"{self._table.max_positions(request.service_class)}: "
                "shorten the prompt or lower max_tokens"
            )
        return sequences

    def completion(self, sequence: Sequence, stopped_text: str | None = None) -> Completion:
        """The completion of an ended sequence.

        Args:
            stopped_text: the text up to a stop string, where one ended it.
        """
        assert sequence.finish_reason is not None, "only an ended sequence is a completion"
        text = stopped_text if stopped_text is not None else self._text(sequence)
        return Completion(
            index=sequence.key.sample,
            text=text,
            token_ids=list(sequence.output_token_ids),
            finish_reason=sequence.finish_reason,
            logprobs=self._logprobs(sequence),
        )

    def context_of(self, token_ids: Items[int]) -> list[int]:
        """The end of these tokens, from where a character begins.

        Tokenizers with byte fallback show a row of bytes as nothing but U+FFFD if its first
        character lacks its beginning.
        """
        lengths = range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_CHARACTER_TOKENS)
        contexts = (list(token_ids[-length:]) for length in lengths)
        whole = (c for c in contexts if not self._decode(c).startswith(UNFINISHED))
        return next(whole, list(token_ids[-CONTEXT_TOKENS:]))

    def decode_after(self, context: Items[int], token_ids: Items[int]) -> str:
        """The text that these tokens add behind a context, leading spaces included."""
        before = self._decode(context)
        whole = self._decode([*context, *token_ids])
        # A character begun in the context and ended here belongs to the new text.
        while before.endswith(UNFINISHED) and not whole.startswith(before):
            before = before[:-1]
        if whole.startswith(before):
            return whole[len(before) :]
        return self._decode(token_ids)

    def _encode(self, request: GenerationRequest) -> tuple[int, ...]:
        prompt = request.prompt
        if request.messages:
            tokens = self._encode_chat(request.messages)
        elif isinstance(prompt, str):
            tokens = tuple(self._tokenizer(prompt)["input_ids"])
        else:
            tokens = tuple(prompt)
        if not tokens:
            raise InvalidRequest("the prompt has no tokens for this model's tokenizer")
        # Of text too: a tokenizer may have tokens that were added without growing the model.
        self._check_ids("prompt", tokens)
        return tokens

    def _encode_chat(self, messages: Items[ChatMessage]) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise InvalidRequest(
                "messages need a chat template, and this model's tokenizer has none: send a prompt"
            )
        turns = [message.model_dump(exclude_none=True) for message in messages]
        text = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        # The template writes the special tokens itself.
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fitted(self, prompt: tuple[int, ...], request: GenerationRequest) -> tuple[int, ...]:
        """The prompt's end, as much of it as a lane takes, if the request allows that."""
        if request.on_long != "truncate-left":
            return prompt
        most = self._table.max_positions(request.service_class) - request.sampling.max_tokens
        return prompt[-most:] if most > 0 else prompt

    def _check_ids(self, field: str, token_ids: Iterable[int]) -> None:
        largest = max(token_ids, default=0)
        if largest >= self._vocab_size:
            raise InvalidRequest(
                f"{field} holds token id {largest}; the model's vocabulary ends at "
                f"{self._vocab_size - 1}"
            )

    def _text(self, sequence: Sequence) -> str:
        tokens = sequence.output_token_ids
        if sequence.ended_by_token and not sequence.sampling.include_stop_str_in_output:
            tokens = tokens[:-1]
        return self.decode_after(self.context_of(sequence.prompt_token_ids), tokens)

    def _logprobs(self, sequence: Sequence) -> Logprobs | None:
        if sequence.sampling.logprobs is None:
            return None
        entries = sequence.output_logprobs
        return Logprobs(
            tokens=[self._decode([token]) for token in sequence.output_token_ids],
            token_logprobs=[max(MIN_LOGPROB, entry.chosen) for entry in entries],
            top_logprobs=[
                {self._decode([token]): max(MIN_LOGPROB, p) for token, p in reversed(entry.top)}
                for entry in entries
            ],
        )

    def _decode(self, token_ids: Items[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class TextStream:
    """One sequence's text as it grows: for stop strings, and for callers that read along.

    Text is decoded from the last point where it was whole, so a step costs a few tokens however
    long the sequence is.

    Attributes:
        text: all text so far that no further token can change.
        stopped: whether a stop string has ended it; `text` then ends there.
        num_tokens: tokens read; the last of them ended the stop string.
    """

    def __init__(self, codec: TextCodec, sequence: Sequence) -> None:
        self._codec = codec
        self._sequence = sequence
        # In pieces that each begin with a character, so that what is kept of it does, too.
        self._context = deque([codec.context_of(sequence.prompt_token_ids)])
        self._num_decoded = 0
        self.num_emitted = 0
        self.text = ""
        self.stopped = False
        self.num_tokens = 0

    def advance(self) -> None:
        """Read the tokens that the sequence gained since the last call, up to a stop string.

        One at a time, so that the text does not depend on how many came at once.
        """
        num_tokens = len(self._sequence.output_token_ids)
        num_shown = num_tokens - self._hides_last_token()
        while self.num_tokens < num_tokens and not self.stopped:
            self.num_tokens += 1
            self._extend(min(self.num_tokens, num_shown), is_last=False)
        if self._sequence.is_finished and not self.stopped:
            self._extend(num_shown, is_last=True)

    def take(self) -> str:
        """What can be shown now and was not before; the start of a stop string waits."""
        end = len(self.text)
        if not (self.stopped or self._sequence.is_finished):
            end -= self._held_back()
        piece = self.text[self.num_emitted : end]
        self.num_emitted = max(self.num_emitted, end)
        return piece

    def _hides_last_token(self) -> bool:
        return self._sequence.ended_by_token and not (
            self._sequence.sampling.include_stop_str_in_output
        )

    def _extend(self, end: int, *, is_last: bool) -> None:
        """Decode the tokens up to `end`; a character that they leave open waits for the next."""
        fresh = self._sequence.output_token_ids[self._num_decoded : end]
        piece = self._codec.decode_after(list(chain(*self._context)), fresh)
        if piece.endswith(UNFINISHED) and not is_last:
            return
        searched_from = len(self.text)
        self.text += piece
        self._context.append(fresh)
        while sum(map(len, self._context)) - len(self._context[0]) >= CONTEXT_TOKENS:
            self._context.popleft()
        self._num_decoded = end
        if self.num_tokens > self._sequence.sampling.min_tokens:
            self._cut_at_stop(searched_from)

    def _cut_at_stop(self, searched_from: int) -> None:
        sampling = self._sequence.sampling
        found = [
            (at, stop)
            for stop in sampling.stop
            if (at := self.text.find(stop, max(0, searched_from - len(stop) + 1))) >= 0
        ]
        if found:
            at, stop = min(found)
            end = at + len(stop) if sampling.include_stop_str_in_output else at
            self.text = self.text[:end]
            self.stopped = True

    def _held_back(self) -> int:
        return max(
            (
                length
                for stop in self._sequence.sampling.stop
                for length in range(1, len(stop))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )


def _seed_of(job_id: str, index: int) -> int:
    """A seed for a request that has none: the job's, so that a second attempt says the same."""
    digest = hashlib.sha256(f"{job_id}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
