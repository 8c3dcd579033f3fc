"""Policies that draw: a causal language model whose vocabulary holds the codes of a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmgrpo.config.image_layout import ImageLayout, read_layout
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ModelError
from mmgrpo.policies.answered_payload import AnsweredPayload, AnswerPayload
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.image_decoder import FOLDER, check_decoder, decode_images, load_decoder
from mmgrpo.policies.image_grammar import ImageGrammar, Kind
from mmgrpo.policies.image_questions import AnsweringView
from mmgrpo.policies.token_logits import (
    TILE_ELEMENTS,
    Head,
    TokenReading,
    read_hidden,
    read_tokens,
)
from mmgrpo.policies.token_payload import EncodedPrompt, TokenPayload
from mmgrpo.policies.used_decisions import PLAIN_REQUEST
from mmgrpo.protocols import Evaluation, Prompt, Request


@dataclass(frozen=True)
class Parts:
    """A model that is already loaded, in place of its folder."""

    model: Any
    tokenizer: Any
    layout: ImageLayout
    decoder: Any


class ImageTokenPolicy(AutoregressivePolicy):
    """An autoregressive image generator: text in, perhaps a plan in words, then a grid of codes.

    The distribution of a token is the softmax over the tokens that its place allows, in the rollout
    and in the evaluation: image codes in the picture, text in the plan. There is no classifier-free
    guidance.
    """

    modality = "image_tokens"

    def __init__(
        self, source: str | Path | Parts, *, plan_tokens: int | None = None, **options: Any
    ) -> None:
        """Load the model, its layout and its decoder.

        Args:
            source: a local folder with the model, ``image_tokens.json`` and ``vq``; or its parts.
            plan_tokens: most tokens of the plan; None: as the folder says, 0: no plan.
            **options: see :class:`AutoregressivePolicy`.

        Raises:
            ModelError: something is missing in the folder, or its parts do not fit.
            ConfigError: an option that does not fit.
        """
        layout = source.layout if isinstance(source, Parts) else read_layout(source)
        self.layout = layout.with_plan(plan_tokens)
        self.decoder = self._open_decoder(source)
        super().__init__(
            (source.model, source.tokenizer) if isinstance(source, Parts) else source, **options
        )
        if self.context is not None and self.layout.room >= self.context:
            raise ModelError(
                f"a sample has up to {self.layout.room} tokens, and the model's context of "
                f"{self.context} must also hold the prompt."
            )

    def _open_decoder(self, source: str | Path | Parts) -> Any:
        """Return what turns codes into pictures."""
        decoder = source.decoder if isinstance(source, Parts) else load_decoder(source)
        check_decoder(decoder, self.layout)
        return decoder

    # -- tokens -----------------------------------------------------------------------------------

    @property
    def _size(self) -> int:
        """Tokens of the vocabulary, codes among them."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def _tables(self) -> ImageGrammar:
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return ImageGrammar(
            self.layout,
            size=self._size,
            ordinary=(i for i in range(len(self.tokenizer)) if i not in special),
            end_ids=self.answer_end_ids,
        )

    @property
    def grammar(self) -> ImageGrammar:
        """Which tokens may stand where, on the model's device."""
        return self._tables.to(self.device)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """None: a sample ends with its last code."""
        return ()

    @property
    def answer_end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer in words."""
        return super().eos_ids

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        text = self.layout.prompt_format.replace("{prompt}", self._render(prompt))
        opening = self.layout.opening
        ids = self.tokenizer(text)["input_ids"] + ([] if opening is None else [opening])
        return EncodedPrompt(torch.tensor(ids, dtype=torch.int64))

    def kinds(self, ids: Tensor, place: Tensor) -> Tensor:
        """Return what places in samples are for; see :meth:`ImageGrammar.kinds`."""
        return self.grammar.kinds(ids, place)

    def kind_distribution(self, logits: Tensor, temperature: float, kinds: Tensor) -> Tensor:
        """Return the ``[R, V]`` float32 log-probabilities of tokens of the kinds ``[R]``."""
        scaled = logits.float() / temperature
        return scaled.masked_fill(~self.grammar.allowed[kinds], -torch.inf).log_softmax(dim=-1)

    # -- samples ----------------------------------------------------------------------------------

    def draw(self, ids: Tensor) -> list[Image.Image]:
        """Return the pictures in complete samples ``ids [B, T]``."""
        self.decoder.to(self.device)
        return decode_images(self.decoder, self.grammar.codes(ids), self.layout.grid)

    def plans(self, ids: Tensor) -> list[str | None]:
        """Return the plans in samples ``ids [B, T]``; None where the model makes none."""
        if not self.layout.plan_tokens:
            return [None] * len(ids)
        ends = (self.grammar.first_code(ids) - 1).tolist()
        return [*self.decode([row[:n] for row, n in zip(ids.tolist(), ends, strict=True)])]

    def answering(self) -> AnsweringView:
        """Return the same model as one that answers questions about its pictures."""
        return AnsweringView(self)

    # -- evaluation -------------------------------------------------------------------------------

    def evaluate(self, trajectories: Trajectories, request: Request = PLAIN_REQUEST) -> Evaluation:
        """Evaluate the decisions in pictures, and those in answers where these are decisions.

        Raises:
            MethodError: a divergence or a prediction is requested.
        """
        payload, evaluate = trajectories.payload, super().evaluate
        if not isinstance(payload, AnsweredPayload):
            return evaluate(trajectories, request)
        drawn, answered = (evaluate(part, request) for part in payload.split(trajectories))
        return payload.joined(drawn, answered, trajectories.mask.shape[1])

    def _read_kept(
        self,
        states: Tensor,
        payload: TokenPayload,
        keep: Tensor,
        start: int,
        entropy: bool,
        tiled: bool,
    ) -> TokenReading:
        """Read the kept positions, those of each kind by themselves."""
        kinds = self._kinds_kept(payload, keep, start)
        ids, temperature = payload.at(keep, start)
        log_prob = torch.zeros(ids.shape, device=ids.device)
        entropies = log_prob if entropy else None
        for kind in torch.unique(kinds).tolist():
            rows = (kinds == kind).nonzero().squeeze(1)
            read = self._kind_reader(kind, tiled)
            reading = read(states[rows], ids[rows], temperature[rows], with_entropy=entropy)
            log_prob = log_prob.index_put((rows,), reading.log_prob)
            if entropies is not None and reading.entropy is not None:
                entropies = entropies.index_put((rows,), reading.entropy)
        return TokenReading(log_prob, entropies)

    def _kinds_kept(self, payload: TokenPayload, keep: Tensor, start: int) -> Tensor:
        """``[N]`` what the kept positions are for."""
        if isinstance(payload, AnswerPayload):
            return torch.full_like(payload.completion_ids[:, :1], Kind.ANSWER).expand_as(keep)[keep]
        place = torch.arange(keep.shape[1], device=keep.device) + start
        return self.kinds(payload.completion_ids, place)[keep]

    def _kind_reader(self, kind: int, tiled: bool) -> Callable[..., TokenReading]:
        """What reads tokens of a kind: the softmax over the tokens it allows."""
        forbidden = self.grammar.forbidden[kind]
        if not tiled:
            return partial(read_tokens, forbidden=forbidden)
        head = self.model.get_output_embeddings()
        rows = self._tile_rows or max(1, TILE_ELEMENTS // self.grammar.allowed.shape[1])
        of_codes = self._code_head(head) if kind == Kind.IMAGE else None
        if of_codes is not None:
            return partial(self._read_codes, of_codes, rows)
        whole = partial(_finished, head, self._finish)
        return partial(read_hidden, forbidden=forbidden, head=whole, rows=rows)

    def _code_head(self, head: nn.Module) -> Head | None:
        """That part of the output head which is the codes', where it can be told."""
        if type(head) is not nn.Linear:
            return None
        rows = slice(self.layout.code_offset, self.layout.code_offset + self.layout.num_codes)

        def of_codes(hidden: Tensor) -> Tensor:
            bias = None if head.bias is None else head.bias[rows]
            return nn.functional.linear(hidden, head.weight[rows], bias)

        return of_codes

    def _read_codes(
        self,
        of_codes: Head,
        rows: int,
        hidden: Tensor,
        ids: Tensor,
        temperature: Tensor,
        *,
        with_entropy: bool,
    ) -> TokenReading:
        """Read image codes without the logits of other tokens."""
        return read_hidden(
            hidden,
            ids - self.layout.code_offset,
            temperature,
            ids[:0],
            head=partial(_finished, of_codes, self._finish),
            rows=rows,
            with_entropy=with_entropy,
        )

    def _probe_payload(self) -> TokenPayload:
        """Tokens that the grammar allows: a picture's beginning."""
        payload, layout = super()._probe_payload(), self.layout
        inside = torch.arange(9, device=self.device).view(3, 3) % layout.num_codes
        ids = inside + layout.code_offset
        if layout.plan_tokens:
            ids[:, 0] = layout.begin_id
        return replace(payload, completion_ids=ids)

    def _save_processing(self, directory: Path) -> None:
        super()._save_processing(directory)
        self.layout.write(directory)
        if self.decoder is not None:
            self.decoder.save_pretrained(Path(directory) / FOLDER)


def _finished(head: Head, finish: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return finish(head(hidden))
