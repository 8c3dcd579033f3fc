"""Masked diffusion language models: a decision is the unmasking of a token, or a random view."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmgrpo.core.masked_diffusion import Views
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import MethodError, ModelError
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.masked_payload import MaskedPayload
from mmgrpo.policies.token_logits import TokenReading, read_tokens
from mmgrpo.policies.token_payload import TokenPrompts
from mmgrpo.policies.used_decisions import PLAIN_REQUEST, refuse_predictions
from mmgrpo.protocols import Evaluation, Request


class MaskedTextPolicy(AutoregressivePolicy):
    """A language model that sees both sides and fills in masked tokens (LLaDA, arXiv:2502.09992).

    Any decoder folder of transformers will do whose weights were trained without the causal mask
    and whose tokenizer has a mask token: attention runs in both directions here.
    :func:`mmgrpo.policies.llada.convert_llada` turns the published LLaDA weights into one.
    """

    modality = "masked_text"

    def _forbidden_ids(self, model: Any) -> tuple[int, ...]:
        """The mask itself is never an answer.

        Raises:
            ModelError: the tokenizer has no mask token, or the attention cannot be two-sided.
        """
        if self.tokenizer.mask_token_id is None:
            raise ModelError(
                "a masked diffusion model needs a tokenizer with a mask token, and this one has "
                "none; set mask_token in tokenizer_config.json."
            )
        attention = model.config._attn_implementation  # noqa: SLF001 - there is no other way
        if attention not in ("sdpa", "eager"):
            raise ModelError(
                f"attention '{attention}' cannot look in both directions here; expected sdpa or "
                "eager."
            )
        return (self.tokenizer.mask_token_id,)

    @property
    def mask_id(self) -> int:
        """Token id of the mask."""
        return int(self.tokenizer.mask_token_id)

    def masked_payload(
        self,
        prompts: TokenPrompts,
        prompt_row: Tensor,
        response_ids: Tensor,
        temperature: float,
        views: Views,
        *,
        by_token: bool,
    ) -> MaskedPayload:
        """Bind ``[B, L]`` responses to their prompts and views."""
        scale = torch.full(prompt_row.shape, temperature, device=prompt_row.device)
        return MaskedPayload(prompts, prompt_row, response_ids, scale, *views, by_token)

    def states(
        self, prompts: TokenPrompts, prompt_row: Tensor, responses: Tensor, keep: Tensor
    ) -> Tensor:
        """Return the ``[M, V]`` logits at the M tokens of ``keep [N, L]``, after one network call.

        Args:
            prompts: P prompts.
            prompt_row: ``[N]`` the prompt of each response.
            responses: ``[N, L]`` token ids, hidden ones being the mask.
            keep: ``[N, L]`` bool.
        """
        self.forwards += 1
        mine = prompts.select(prompt_row)
        mask = torch.cat([mine.mask, torch.ones_like(keep)], dim=1)
        seen = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
        seen = seen.masked_fill(~mask, torch.finfo(seen.dtype).min)[:, None, None]
        if self.network.training != self._checkpointing:
            self.network.train(self._checkpointing)
        wanted = torch.cat([torch.zeros_like(mine.mask), keep], dim=1)
        with self._head.keeping(wanted if self._selective else None):
            logits = self.network(
                input_ids=torch.cat([mine.ids, responses], dim=1),
                attention_mask=seen.expand(-1, 1, mask.shape[1], -1),
                position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
            ).logits
        found: Tensor = logits[0] if self._selective else logits[wanted]
        return found

    def evaluate(self, trajectories: Trajectories, request: Request = PLAIN_REQUEST) -> Evaluation:
        """Return the log-probabilities of the decisions in the mask, ``[B, T]`` float32.

        Raises:
            MethodError: a divergence or a prediction is requested, or the entropy of random views.
        """
        payload: MaskedPayload = trajectories.payload
        refuse_predictions(request)
        if request.entropy and not payload.by_token:
            raise MethodError("Random views of a response have no entropy of a decision.")
        mask = trajectories.mask
        wanted = payload.scored & (mask[:, None] if payload.by_token else mask[:, :, None])
        wanted[0, 0, 0] |= ~wanted.any()  # the network runs even if nothing counts
        row, view, token = wanted.nonzero(as_tuple=True)
        reading = self._read_views(payload, wanted, row, token, request.entropy)
        decision = token if payload.by_token else view
        log_prob = reading.log_prob * payload.weight[row, view]

        def place(values: Tensor) -> Tensor:
            blank = values.new_zeros(mask.shape)
            return blank.index_put((row, decision), values, accumulate=True) * mask

        return Evaluation(
            log_prob=place(log_prob),
            entropy=None if reading.entropy is None else place(reading.entropy),
        )

    def _read_views(
        self, payload: MaskedPayload, wanted: Tensor, row: Tensor, token: Tensor, entropy: bool
    ) -> TokenReading:
        """Read the tokens of ``wanted [B, K, L]``, in its order; every view that has one runs."""
        rows, views = wanted.any(dim=2).nonzero(as_tuple=True)
        responses = torch.where(
            payload.hidden[rows, views], self.mask_id, payload.response_ids[rows]
        )
        logits = self.states(
            payload.prompts, payload.prompt_row[rows], responses, wanted[rows, views]
        )
        return read_tokens(
            logits,
            payload.response_ids[row, token],
            payload.temperature[row],
            self.forbidden,
            with_entropy=entropy,
        )
