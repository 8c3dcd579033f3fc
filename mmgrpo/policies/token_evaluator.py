"""What a token policy does with its network: read prompts, continue them, evaluate completions.

Shapes: P prompts of up to Lp tokens, B completions of T tokens (W of which are looked at), V
tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import ModelError
from mmgrpo.policies.decoding import (
    SelectiveHead,
    TokenState,
    continue_positions,
    kept,
    next_position,
    text_positions,
)
from mmgrpo.policies.fast_layers import use_fast_layers
from mmgrpo.policies.linear_head import tile_reader
from mmgrpo.policies.loading import enable_checkpointing, first_line, silence_dropout
from mmgrpo.policies.packed_attention import attend_within, can_pack, checkpoint_contexts
from mmgrpo.policies.packed_kernels import Kernel, kernels
from mmgrpo.policies.packing import pack as pack_row
from mmgrpo.policies.prefix_decoding import PrefixState, can_share, has_whole_weights, try_state
from mmgrpo.policies.token_logits import TokenReading, finish_logits, read_tokens
from mmgrpo.policies.token_payload import EncodedPrompt, TokenPayload, TokenPrompts, pad_right
from mmgrpo.policies.used_decisions import PLAIN_REQUEST, Read, evaluate_used
from mmgrpo.protocols import Evaluation, Request

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
"""How far two orders of the same sums may differ, by dtype of the weights: absolutely in a
log-probability, relatively in a gradient."""

_CANNOT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class TokenEvaluator:
    """A causal language model of transformers and its log-probabilities.

    Attributes:
        model: the model itself, with its adapters in place.
        network: what is called: the model, or what peft or a trainer wrapped around it.
        forwards: network calls made so far.
    """

    def __init__(
        self,
        model: Any,
        network: nn.Module,
        *,
        forbidden: tuple[int, ...],
        checkpointing: bool,
        head_tile_rows: int | None = None,
        share_prompts: bool = True,
        pack: bool = True,
        fast_decoding: bool = True,
        fast_layers: bool = True,
    ) -> None:
        """Find out how the model can be called.

        Args:
            model: a causal language model of transformers.
            network: the model, or its adapter wrapper.
            forbidden: token ids that can never be sampled.
            checkpointing: whether evaluations that need a gradient compute activations twice;
                transformers then has no cache, and only a packed row has shared prompts.
            head_tile_rows: an evaluation applies the output head to this many positions at a time;
                None: by the size of their logits; 0: to all of them at once.
            share_prompts: whether an evaluation reads each prompt once, where the model can.
            pack: whether it then reads prompts and completions as one row without padding.
            fast_decoding: whether rows are sampled with :class:`PrefixState`, where the model can.
            fast_layers: whether layers are computed as :mod:`~mmgrpo.policies.fast_layers` does.
        """
        self.model = model
        self.network = network
        self.forwards = 0
        self._checkpointing = False
        self._forbidden = torch.tensor(forbidden, dtype=torch.int64)
        self._accepted = inspect.signature(model.forward).parameters
        self._embedding = model.get_input_embeddings()
        self._head = SelectiveHead(model.get_output_embeddings())
        self._finish = finish_logits(model.config.get_text_config())
        self._tile_rows = head_tile_rows
        self._wanted = (share_prompts, fast_decoding)
        self._kernel: Kernel | None = None
        self._kernels = kernels(self.device) if pack and share_prompts and can_pack(model) else ()
        silence_dropout(model)
        if fast_layers:
            use_fast_layers(network)
        if checkpointing:
            self.checkpoint_activations()
        self._probe()

    def checkpoint_activations(self) -> None:
        """From now on, compute activations again in the backward pass."""
        self._checkpointing = True
        enable_checkpointing(self.model, checkpoint_contexts)

    @property
    def packs_rows(self) -> bool:
        """Whether evaluations read prompts and completions as one row."""
        return self._kernel is not None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self._embedding.weight.device
        return device

    @property
    def forbidden(self) -> Tensor:
        """``[K]`` int64 token ids that can never be sampled."""
        if self._forbidden.device != self.device:
            self._forbidden = self._forbidden.to(self.device)
        return self._forbidden

    def begin(self, prompts: TokenPrompts) -> TokenState | PrefixState:
        """Read the prompts, one row each."""
        state = self._begin(prompts, self._forward)
        if self._fast and not torch.is_grad_enabled() and has_whole_weights(self.model):
            return PrefixState(self.model, state, self._count_forward)
        return state

    def _count_forward(self) -> None:
        self.forwards += 1

    def _begin(self, prompts: TokenPrompts, forward: Callable[..., Any]) -> TokenState:
        keep = torch.zeros_like(prompts.mask)
        keep[:, -1] = True
        inputs = prompts.inputs()
        positions = self._positions(prompts, inputs)
        logits, cache = forward(
            keep, ids=prompts.ids, mask=prompts.mask, positions=positions, inputs=inputs
        )
        return TokenState(
            forward, cache=cache, mask=prompts.mask, positions=positions, logits=logits
        )

    def evaluate(self, trajectories: Trajectories, request: Request = PLAIN_REQUEST) -> Evaluation:
        """Return the log-probabilities of the sampled tokens, differentiable, ``[B, T]`` float32.

        Raises:
            MethodError: a divergence or a prediction is requested.
        """
        twice = self._checkpointing and torch.is_grad_enabled()
        read = self._read_shared if self._shares_prompts and not twice else self._read_plain
        if self._kernel is not None:
            read = partial(self._read_packed, kernel=self._kernel)
        return evaluate_used(trajectories, request, partial(read, tiled=self._tiled))

    def evaluate_plain(
        self, trajectories: Trajectories, request: Request = PLAIN_REQUEST
    ) -> Evaluation:
        """Like :meth:`evaluate`, with prompts read again for each completion and no tiles."""
        return evaluate_used(trajectories, request, self._read_plain)

    def _read_shared(
        self, payload: TokenPayload, keep: Tensor, entropy: bool, *, tiled: bool = False
    ) -> TokenReading:
        """Read each prompt once, then all completions on its cache; ``[B, W]`` results."""
        state = self._begin(payload.prompts, partial(self._forward, hidden=tiled))
        state.select(payload.prompt_row)
        first = self._place(state.logits[keep[:, 0]], payload, keep[:, :1], 0, entropy, tiled)
        width = keep.shape[1]
        if width == 1:
            return first
        logits = state.advance(payload.completion_ids[:, : width - 1], keep[:, 1:])
        rest = self._place(logits, payload, keep[:, 1:], 1, entropy, tiled)
        return TokenReading(
            torch.cat([first.log_prob, rest.log_prob], dim=1),
            None
            if first.entropy is None or rest.entropy is None
            else torch.cat([first.entropy, rest.entropy], dim=1),
        )

    def _read_packed(
        self,
        payload: TokenPayload,
        keep: Tensor,
        entropy: bool,
        *,
        kernel: Kernel,
        tiled: bool = False,
    ) -> TokenReading:
        """Read all prompts and completions as one row; ``[B, W]`` results."""
        inputs = payload.prompts.inputs()
        row = pack_row(payload, keep, self._positions(payload.prompts, inputs))
        with attend_within(row.layout, self.model, kernel):
            states, _ = self._forward(
                row.keep,
                ids=row.ids,
                mask=torch.ones_like(row.ids),
                positions=row.positions,
                use_cache=False,
                inputs={**inputs, **row.aligned},
                hidden=tiled,
            )
        return self._place(states, payload, keep, 0, entropy, tiled)

    def _read_plain(
        self, payload: TokenPayload, keep: Tensor, entropy: bool, *, tiled: bool = False
    ) -> TokenReading:
        """Read prompt and completion as one sequence for each row; ``[B, W]`` results."""
        prompts = payload.prompts.select(payload.prompt_row)
        ids = payload.completion_ids[:, : keep.shape[1]]
        inputs = prompts.inputs()
        positions = self._positions(prompts, inputs)
        follow = continue_positions(next_position(positions), ids.shape[1], positions.shape[:-2])
        off = torch.zeros_like(prompts.mask)
        length = off.shape[1] + ids.shape[1]
        inputs |= {name: pad_right(value, length) for name, value in prompts.aligned.items()}
        logits, _ = self._forward(
            torch.cat([off[:, 1:], keep, off[:, :1]], dim=1),
            ids=torch.cat([prompts.ids, ids], dim=1),
            mask=torch.cat([prompts.mask, torch.ones_like(keep)], dim=1),
            positions=torch.cat([positions, follow], dim=-1),
            use_cache=False,
            inputs=inputs,
            hidden=tiled,
        )
        return self._place(logits, payload, keep, 0, entropy, tiled)

    def _place(
        self,
        states: Tensor,
        payload: TokenPayload,
        keep: Tensor,
        start: int,
        entropy: bool,
        tiled: bool,
    ) -> TokenReading:
        """Read ``[N, V]`` logits, or what the head makes of ``[N, D]`` hidden states if ``tiled``.

        The results are placed at the N positions of ``keep [B, W]``.
        """
        reading = self._read_kept(states, payload, keep, start, entropy, tiled)
        blank = reading.log_prob.new_zeros(keep.shape)
        return TokenReading(
            blank.masked_scatter(keep, reading.log_prob),
            None if reading.entropy is None else blank.masked_scatter(keep, reading.entropy),
        )

    def _read_kept(
        self,
        states: Tensor,
        payload: TokenPayload,
        keep: Tensor,
        start: int,
        entropy: bool,
        tiled: bool,
    ) -> TokenReading:
        """Read the N kept positions, of which column c is token ``start + c``; ``[N]`` results."""
        ids, temperature = payload.at(keep, start)
        read = self._tile_reader() if tiled else read_tokens
        return read(states, ids, temperature, self.forbidden, with_entropy=entropy)

    def _tile_reader(self) -> Callable[..., TokenReading]:
        size = self.model.get_input_embeddings().weight.shape[0]
        head = self.model.get_output_embeddings()
        return tile_reader(head, self._finish, size=size, rows=self._tile_rows)

    def _positions(self, prompts: TokenPrompts, inputs: dict[str, Tensor]) -> Tensor:
        """Return the prompts' position ids, ``[P, Lp]`` or ``[axes, P, Lp]``."""
        del inputs  # text alone decides
        return text_positions(prompts.mask)

    def _forward(
        self,
        keep: Tensor,
        *,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any = None,
        use_cache: bool = True,
        inputs: Mapping[str, Tensor] | None = None,
        hidden: bool = False,
    ) -> tuple[Tensor, Any]:
        """Call the network once; return the ``[N, V]`` logits at ``keep``, and the cache.

        With ``hidden``, what the output head reads there, ``[N, D]``, in place of the logits.
        """
        self._count_forward()
        train = self._checkpointing and not use_cache  # transformers checkpoints in this mode only
        if self.network.training != train:
            self.network.train(train)
        given = {"position_ids": positions} if "position_ids" in self._accepted else {}
        given |= {"past_key_values": cache} if use_cache else {}
        with self._head.keeping(keep if self._selective else None, withhold=hidden):
            output = self.network(
                input_ids=ids,
                attention_mask=mask.long(),
                use_cache=use_cache,
                **given,
                **(inputs or {}),
            )
        if hidden:
            logits = self._head.take_hidden()
        else:
            logits = output.logits[0] if self._selective else kept(output.logits, keep)
        return logits, output.past_key_values if use_cache else None

    @torch.enable_grad()
    def _probe(self) -> None:
        """Try the shortcuts on a few tokens; do without one that fails or changes the result."""
        payload = self._probe_payload()
        keep = torch.ones_like(payload.completion_ids, dtype=torch.bool)
        trained = [p for p in self.model.get_decoder().parameters() if p.requires_grad][:16]
        early = min(trained, key=torch.numel, default=None)  # its gradient needs the whole backward

        def result(read: Read) -> tuple[Tensor, Tensor]:
            log_prob = read(payload, keep, False).log_prob
            if early is None:
                return log_prob, log_prob
            return log_prob.detach(), torch.autograd.grad(log_prob.sum(), [early])[0]

        def holds(read: Read) -> bool:
            try:
                found = result(read)
            except _CANNOT as error:
                logger.info("%s: %s", type(self.model).__name__, first_line(error))
                return False
            value, grad = (a - b for a, b in zip(found, expected, strict=True))
            same = value.abs().max() <= tolerance
            return bool(same & (grad.norm() <= tolerance * expected[1].norm()))

        tolerance = _TOLERANCE.get(self.model.dtype, 0.3)
        share, fast = self._wanted
        self._selective = self._shares_prompts = self._tiled = self._fast = False
        expected = result(self._read_plain)
        self._selective = True
        self._selective = holds(self._read_plain)
        self._shares_prompts = shares = holds(self._read_shared)
        tiled = partial(self._read_plain, tiled=True)
        self._tiled = self._tile_rows != 0 and self._selective and holds(tiled)
        if not shares:
            self._check_steps(payload)
        self._shares_prompts &= share
        self._kernel = next(
            (k for k in self._kernels if holds(partial(self._read_packed, kernel=k))), None
        )
        self._fast = fast and shares and can_share(self.model) and self._decodes_fast(payload)
        self.forwards = 0

    @torch.no_grad()
    def _decodes_fast(self, payload: TokenPayload) -> bool:
        """Whether rows that come, write and leave get the same log-probabilities either way."""
        tolerance = _TOLERANCE.get(self.model.dtype, 0.3)
        found = []
        for self._fast in (False, True):
            begin = partial(self.begin, payload.prompts)
            try:
                found.append(try_state(begin, payload.prompt_row, payload.completion_ids))
            except _CANNOT as error:
                logger.info("%s: %s", type(self.model).__name__, first_line(error))
                return False
        return bool((found[0] - found[1]).abs().max() <= tolerance)

    @torch.no_grad()
    def _check_steps(self, payload: TokenPayload) -> None:
        """Refuse a model that cannot even continue a prompt token by token."""
        name = type(self.model).__name__
        try:
            state = self.begin(payload.prompts)
            state.select(payload.prompt_row)
            state.advance(payload.completion_ids[:, :1])
        except _CANNOT as error:
            raise ModelError(
                f"{name} has no key-value cache that can be shared by a group, which sampling "
                f"needs: {first_line(error)}"
            ) from error
        logger.warning("%s cannot share prompts: each is read once per completion.", name)

    def _probe_payload(self) -> TokenPayload:
        size = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(min(size, 64), device=self.device)
        ids = ids[~torch.isin(ids, self.forbidden)]
        ids = ids[torch.arange(14, device=self.device) % len(ids)]
        prompts = [EncodedPrompt(ids[:3]), EncodedPrompt(ids[3:5])]
        rows = torch.tensor([0, 1, 1], device=self.device)
        return TokenPayload(
            TokenPrompts.pad(prompts, pad_id=0), rows, ids[5:].view(3, 3), torch.ones_like(rows)
        )
