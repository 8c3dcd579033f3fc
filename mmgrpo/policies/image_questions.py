"""An image generator that answers questions about pictures of its own, as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmgrpo.core.seeding import mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.policies.answered_payload import AnswerPayload, with_answers
from mmgrpo.policies.image_grammar import Kind
from mmgrpo.policies.token_payload import EncodedPrompt, TokenPrompts
from mmgrpo.protocols import Prompt

if TYPE_CHECKING:
    from mmgrpo.policies.image_tokens import ImageTokenPolicy


@dataclass(frozen=True)
class Question(Prompt):
    """A question about a picture.

    Attributes:
        picture: the picture's token ids, with those that begin and end it.
    """

    picture: tuple[int, ...] = ()


class AnsweringView:
    """The weights of an :class:`ImageTokenPolicy`; its prompts are questions, its tokens text."""

    def __init__(self, policy: ImageTokenPolicy) -> None:
        self.policy = policy

    def ask(
        self, ids: Tensor, questions: Sequence[Sequence[str]], names: Sequence[tuple[int, ...]]
    ) -> list[Question]:
        """Return every question about the picture of its row, in order.

        Args:
            ids: ``[B, T]`` complete samples.
            questions: for each of the B rows.
            names: of the rows; what is drawn for a question depends on its row's name and its
                number.
        """
        layout = self.policy.layout
        codes = (self.policy.grammar.codes(ids) + layout.code_offset).tolist()
        return [
            Question(
                mix_seed(*name, number), question, picture=(layout.begin_id, *row, layout.end_id)
            )
            for row, name, several in zip(codes, names, questions, strict=True)
            for number, question in enumerate(several)
        ]

    @property
    def forwards(self) -> int:
        """Network calls of the policy so far."""
        return self.policy.forwards

    @property
    def context(self) -> int | None:
        """How many tokens question and answer may have together."""
        return self.policy.context

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self.policy.answer_end_ids

    @property
    def pad_id(self) -> int:
        """Token that fills what follows the end."""
        return self.policy.pad_id

    def encode(self, prompts: Sequence[Question], *, max_new_tokens: int) -> TokenPrompts:
        """Turn questions into tokens, in the layout's ``question_format``."""
        del max_new_tokens  # questions are of the data, and short
        encoded = [EncodedPrompt(torch.tensor(self._ids(prompt))) for prompt in prompts]
        return TokenPrompts.pad(encoded, pad_id=self.pad_id).to(self.policy.device)

    def _ids(self, question: Question) -> list[int]:
        text = self.policy.layout.question_format.replace("{question}", str(question.content))
        before, _, after = text.partition("{image}")
        tokenizer = self.policy.tokenizer
        tail = tokenizer(after, add_special_tokens=False)["input_ids"]
        return [*tokenizer(before)["input_ids"], *question.picture, *tail]

    def begin(self, prompts: TokenPrompts) -> Any:
        """Read encoded questions."""
        return self.policy.begin(prompts)

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the ``[R, V]`` log-probabilities of the next token of an answer."""
        kinds = torch.full(logits.shape[:1], int(Kind.ANSWER), device=logits.device)
        return self.policy.kind_distribution(logits, temperature, kinds)

    def entropy(self, log_p: Tensor, probs: Tensor) -> Tensor:
        """Return the ``[R]`` entropy of ``[R, V]`` log-probabilities."""
        return self.policy.entropy(log_p, probs)

    def payload(
        self, prompts: TokenPrompts, prompt_row: Tensor, ids: Tensor, temperature: float
    ) -> Any:
        """Bind answers to their questions."""
        payload = self.policy.payload(prompts, prompt_row, ids, temperature)
        return AnswerPayload(*(getattr(payload, field.name) for field in fields(payload)))

    def decode(self, ids: Sequence[Sequence[int]], *, special: bool = False) -> list[str]:
        """Turn tokens into text."""
        return self.policy.decode(ids, special=special)

    def bind(
        self,
        drawn: Trajectories,
        answered: Trajectories,
        counts: Sequence[int],
        *,
        width: int,
        room: int,
    ) -> Trajectories:
        """Let the answers be decisions of the pictures' rows; see :func:`with_answers`."""
        return with_answers(drawn, answered, counts, width=width, room=room)
