"""How likely a model finds given texts, read through an engine's cache while it answers nothing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.prompt import Prompt, Turns
from torchtitan.generation.engine import common_prefix

CHUNK = 256  # tokens a forward: each keeps the logits of so many


class Likelihood(NamedTuple):
    """How likely one choice is."""

    logprob: float  # natural, of all its tokens together
    tokens: int
    greedy: bool  # each of its tokens is the likeliest where it stands


class Reader:
    """Log-probabilities of a prompt's own tokens. Ranks that share the model make the same calls: a rank that
    is done calls `finish`.
    """

    def __init__(self, answering: Answering):
        self.engine = answering.engine
        self.prompter = answering.prompter
        self.cache = answering.engine.cache
        self.forward: Any = answering.engine.forward

    def logprobs(self, prompt: Prompt, begin: int, held: int = 0) -> list[float]:
        """Natural log-probabilities of the tokens from `begin` >= 1 on, each given all before it.

        held: tokens of the prompt that the first sequence of the cache holds already, below `begin`.
        """
        return [logprob for logprob, _ in self._read(prompt, begin, held)]

    @torch.no_grad()
    def _read(self, prompt: Prompt, begin: int, held: int) -> list[tuple[float, bool]]:
        """The log-probability of each of those tokens, and whether it is the likeliest."""
        self.cache.crop(0, held)
        found: list[tuple[float, bool]] = []
        for start in range(held, len(prompt.ids), CHUNK):
            found += self._chunk(prompt, start, begin)
        return found

    def _chunk(self, prompt: Prompt, start: int, begin: int) -> list[tuple[float, bool]]:
        """The same for the tokens that follow those of a chunk."""
        piece = prompt.rest(start, start + CHUNK)
        count, following = len(piece.ids), prompt.ids[start + 1 : start + CHUNK + 1]
        rich = bool(self.engine.agree([1, int(piece.rich)])[1])
        logits = self._call(piece, rich)[0]
        logprobs = logits[: len(following)].float().log_softmax(-1)
        ids = torch.tensor(following, dtype=torch.int64, device=logits.device)
        chosen, greedy = logprobs.gather(1, ids[:, None])[:, 0], logprobs.argmax(-1) == ids
        rows = torch.stack((chosen, greedy.to(chosen.dtype))).T.tolist()  # one copy from the device
        assert len(rows) in (count, count - 1)
        return [(logprob, bool(top)) for logprob, top in rows[max(0, begin - 1 - start) :]]

    def _call(self, piece: Prompt | None, rich: bool) -> torch.Tensor:
        """Logits [1, CHUNK or more, V] of a chunk; None: this rank has none and only runs along."""
        ids = piece.ids if piece else []
        width = self.engine.width(CHUNK)
        where = self.cache.append([0], [len(ids)], width)
        tokens = torch.tensor([[*ids, *[self.engine.tokenizer.pad_id] * (width - len(ids))]])
        return self.forward.of_all(tokens.to(self.cache.device), where, piece, rich)

    @torch.no_grad()
    def finish(self) -> None:
        """Run along until no rank has anything to read."""
        while True:
            more, rich = self.engine.agree([0, 0])
            if not more:
                return
            self._call(None, bool(rich))

    def choices(self, turns: Turns, choices: Sequence[str]) -> list[Likelihood]:
        """The likelihood of each choice as the answer, without what ends it."""
        asked = self.prompter.prompt(turns)
        found, held = [], 0
        for choice in choices:
            whole = self.prompter.answered(turns, choice)
            # A word boundary may fall elsewhere once the answer is there.
            begin = max(1, common_prefix(asked.ids, whole.ids))  # the first token follows nothing
            tokens = self._read(whole, begin, min(held, begin - 1))
            total, greedy = sum(logprob for logprob, _ in tokens), all(top for _, top in tokens)
            found.append(Likelihood(total, len(tokens), greedy))
            held = begin
        return found
