"""Stand-ins without a model: a clock that is set, an engine of plain ints, one token a letter."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection

from shoal_worker.lanes import LaneSpec
from shoal_worker.scheduler import Decode, Prefill, Row
from shoal_worker.sequence import SampledToken, Sequence

Launch = dict[Sequence, list[SampledToken]]


class FakeClock:
    """A clock that moves only when it is told to."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class FakeEngine:
    """Letters that follow from the prompt and the position alone.

    It fails at the steps in `fail_at` (the first is 0), and it asserts what a real one takes for
    granted: a prompt comes into a free slot, only entered rows decode, a row leaves once. One that
    runs ahead brings its tokens at once all the same; one that waits calls what can be done
    meanwhile until there is nothing left.
    """

    def __init__(
        self,
        clock: FakeClock,
        *,
        step_s: float = 0.5,
        tokens_per_step: int = 1,
        runs_ahead: bool = False,
        waits: bool = False,
        fail_at: Collection[int] = (),
    ) -> None:
        self._clock = clock
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._fail_at = fail_at
        self.slots: set[tuple[str, int]] = set()
        self.steps: list[Prefill | Decode] = []
        self.num_prompt_tokens = 0
        self.runs_ahead = runs_ahead
        self._waits = waits

    def prefill(self, step: Prefill) -> list[list[SampledToken]]:
        for row in step.rows:
            assert (step.lane.name, row.slot) not in self.slots, "the slot is taken"
            self.slots.add((step.lane.name, row.slot))
        self._begin(step)
        self.num_prompt_tokens += sum(len(row.sequence.prompt_token_ids) for row in step.rows)
        return [self._tokens(row, 1) for row in step.rows]

    def decode(
        self, step: Decode, meanwhile: Callable[[], bool] = lambda: False
    ) -> list[list[SampledToken]]:
        for row in step.rows:
            assert (step.lane.name, row.slot) in self.slots, "the row never entered"
        self._begin(step)
        while self._waits and meanwhile():
            pass
        return [self._tokens(row, self._tokens_per_step) for row in step.rows]

    def take_spent(self, _lane: LaneSpec) -> list[int]:
        return []

    def release(self, lane: LaneSpec, slot: int) -> None:
        self.slots.remove((lane.name, slot))

    def _begin(self, step: Prefill | Decode) -> None:
        self._clock.now_s += self._step_s
        self.steps.append(step)
        if len(self.steps) - 1 in self._fail_at:
            raise RuntimeError("as it was told to")

    def _tokens(self, row: Row, num_tokens: int) -> list[SampledToken]:
        prompt, position = row.sequence.prompt_token_ids, len(row.sequence.output_token_ids)
        return [SampledToken(letter(prompt, position + i)) for i in range(num_tokens)]


class AheadEngine(FakeEngine):
    """Brings tokens one call late, as a device that runs ahead does.

    It makes tokens behind a sequence's end too, and gives its slot up with the launch of its last.
    """

    def __init__(self, clock: FakeClock, *, tokens_per_step: int) -> None:
        super().__init__(clock, tokens_per_step=tokens_per_step, runs_ahead=True, waits=True)
        self._launches: defaultdict[LaneSpec, deque[Launch]] = defaultdict(deque)
        self._num_launched: dict[Sequence, int] = {}
        self._spent: defaultdict[LaneSpec, list[int]] = defaultdict(list)

    def prefill(self, step: Prefill) -> list[list[SampledToken]]:
        super().prefill(step)
        self._launch(step, 1)
        return [[] for _ in step.rows]

    def decode(
        self, step: Decode, meanwhile: Callable[[], bool] = lambda: False
    ) -> list[list[SampledToken]]:
        super().decode(step, meanwhile)
        left = [
            row.sequence.sampling.max_tokens - self._num_launched[row.sequence] for row in step.rows
        ]
        num_steps = min(max(left, default=0), self._tokens_per_step)
        if num_steps > 0:
            self._launch(step, num_steps)
        brought: dict[Sequence, list[SampledToken]] = {}
        launches = self._launches[step.lane]
        while len(launches) > int(num_steps > 0):
            for sequence, tokens in launches.popleft().items():
                brought.setdefault(sequence, []).extend(tokens)
        return [brought.get(sequence, []) for sequence in step.sequences]

    def take_spent(self, lane: LaneSpec) -> list[int]:
        spent = self._spent.pop(lane, [])
        for slot in spent:
            self.release(lane, slot)
        return spent

    def _launch(self, step: Prefill | Decode, num_tokens: int) -> None:
        made = {}
        for row in step.rows:
            sequence, before = row.sequence, self._num_launched.get(row.sequence, 0)
            prompt = sequence.prompt_token_ids
            made[sequence] = [SampledToken(letter(prompt, before + i)) for i in range(num_tokens)]
            self._num_launched[sequence] = before + num_tokens
            if before < sequence.sampling.max_tokens <= before + num_tokens:
                self._spent[step.lane].append(row.slot)
        self._launches[step.lane].append(made)


def letter(prompt: tuple[int, ...], position: int) -> int:
    """The token at a position of the completion of a prompt."""
    return ord("a") + (sum(prompt) * 7 + position * position * 5 + position) % 26


def text_after(prompt: str, num_tokens: int) -> str:
    """What the engine continues a prompt with."""
    tokens = tuple(map(ord, prompt))
    return "".join(chr(letter(tokens, position)) for position in range(num_tokens))


class LetterTokenizer:
    """One token a character, by its code point; 0 is a special token without text."""

    chat_template: str | None = "role: content"

    def __call__(self, text: str, **_options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: bool) -> str:
        turns = [f"{one['role']}: {one['content']}\n" for one in messages]
        return "".join([*turns, "assistant:"])

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return "".join(chr(token) for token in token_ids if token)
