"""The rollout engine that lets vLLM sample, with the policy's weights.

Shapes: P prompts, B = P * group size completions of up to T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmgrpo.core.mismatch import worst_decisions
from mmgrpo.core.seeding import mix_seed
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.protocols import Cost, Prompt, Request, Rollout, Sample
from mmgrpo.rollout.vllm_client import VllmClient
from mmgrpo.rollout.vllm_local import LocalVllm
from mmgrpo.rollout.vllm_session import Completion, TokenRequest, VllmSession

WORST_TOKENS = 3
"""Tokens of a sample that are listed because engine and policy disagree most about them."""
_NEVER = -100.0  # the smallest bias that vLLM adds to a logit
_SESSIONS: WeakKeyDictionary[Any, VllmSession] = WeakKeyDictionary()


class VllmEngine:
    """Samples completions with vLLM.

    ``rollout_log_prob`` is what vLLM says, of the distribution that it drew from: after the
    temperature and the filters. ``old_log_prob`` is what the policy says of the same tokens, before
    the filters, as in :class:`~mmgrpo.rollout.autoregressive.AutoregressiveEngine`; so without
    filters the two differ by rounding, and a method's ``correction`` weighs the difference.

    Attributes:
        room: how many tokens a completion may have; a prompt must leave that much.
    """

    def __init__(
        self,
        policy: Any,
        session: VllmSession,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        evaluate: bool = True,
        pieces: Callable[[Trajectories], Sequence[Tensor]] | None = None,
    ) -> None:
        """Choose how to sample; the settings mean what they mean for the native engine.

        Args:
            policy: a token policy.
            session: a vLLM that follows this policy.
            max_new_tokens: a completion that has not ended by then is truncated.
            temperature: 0 is greedy.
            top_p: nucleus; 1 is off.
            top_k: None or 0 is off.
            min_p: 0 is off.
            stop: strings that end a completion, and stay in it.
            evaluate: fill ``old_log_prob`` and ``entropy``, which training needs.
            pieces: trajectories -> the rows of each part that is evaluated at a time, in order;
                None: all at once.
        """
        self.policy = policy
        self.room = max_new_tokens
        self._session = session
        self._temperature = temperature
        self._evaluate = evaluate
        self._pieces = pieces
        self._sampling: dict[str, Any] = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k or 0,
            "min_p": min_p,
            "stop": list(stop),
            "include_stop_str_in_output": True,
            "detokenize": bool(stop),
            "skip_special_tokens": False,
            "stop_token_ids": list(policy.eos_ids),
            "logprobs": 0,
            "logit_bias": dict.fromkeys(policy.forbidden.tolist(), _NEVER) or None,
        }

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        seed: int,
        version: int = 0,
        iteration: int = 0,
    ) -> Rollout:
        """Sample ``group_size`` completions per prompt.

        Sample g of prompt p is drawn from a stream named by (seed, p.index, g); it depends on other
        prompts only through the rounding of vLLM's batches. Nothing follows ``iteration``.

        Raises:
            DataError: a prompt that cannot be encoded or is too long.
            MmgrpoError: vLLM does not answer, or does not hold the policy's weights.
        """
        del iteration
        forwards = self.policy.forwards
        encoded = self.policy.encode(prompts, max_new_tokens=self.room)
        requests = [
            self._request(prompt, ids[mask].tolist(), seed)
            for prompt, ids, mask in zip(prompts, encoded.ids, encoded.mask, strict=True)
        ]
        drawn = 1 if self._temperature == 0 else group_size  # greedy samples are all equal
        found = self._session.generate(requests, {**self._sampling, "n": drawn}, version=version)
        completions = [one for group in found for one in group * (group_size // drawn)]
        trajectories = self._assemble(completions, encoded, prompts, version)
        if self._evaluate:
            trajectories = self._evaluated(trajectories)
        samples = self._samples(trajectories, prompts)
        decisions = int(trajectories.mask.sum())
        return Rollout(trajectories, samples, Cost(self.policy.forwards - forwards, 0, decisions))

    def _request(self, prompt: Prompt, ids: list[int], seed: int) -> TokenRequest:
        # vLLM repeats an image's placeholder by itself.
        pads = set(self.policy.forbidden.tolist()) if len(prompt.images) else set()
        single = [
            token
            for token, run in groupby(ids)
            for _ in range(1 if token in pads else len(list(run)))
        ]
        name = mix_seed(seed, prompt.index) >> 1  # vLLM adds the number of the sample
        return TokenRequest(single, ids, tuple(prompt.images), name)

    def _assemble(
        self,
        completions: Sequence[Completion],
        encoded: Any,
        prompts: Sequence[Prompt],
        version: int,
    ) -> Trajectories:
        size, width = len(completions), max(len(one.ids) for one in completions)
        ids = torch.full((size, width), self.policy.pad_id)
        log_prob = torch.zeros(size, width)
        lengths = torch.tensor([len(one.ids) for one in completions])
        for row, one in enumerate(completions):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            log_prob[row, : len(one.ids)] = torch.tensor(one.log_prob)
        device = encoded.ids.device
        prompt_row = torch.arange(len(prompts), device=device)
        prompt_row = prompt_row.repeat_interleave(size // len(prompts))
        index = torch.tensor([prompt.index for prompt in prompts], device=device)
        return Trajectories(
            group=index[prompt_row],
            mask=(torch.arange(width) < lengths[:, None]).to(device),
            rollout_log_prob=log_prob.to(device),
            version=torch.full_like(prompt_row, version),
            truncated=torch.tensor([not one.ended for one in completions], device=device),
            payload=self.policy.payload(
                encoded, prompt_row, ids.to(device), self._temperature or 1.0
            ),
        )

    def _evaluated(self, trajectories: Trajectories) -> Trajectories:
        """Add what the policy itself says of the tokens."""
        whole = [torch.arange(len(trajectories), device=trajectories.mask.device)]
        found = [
            self.policy.evaluate(trajectories.select(part), Request(entropy=True))
            for part in (whole if self._pieces is None else self._pieces(trajectories))
        ]
        return trajectories.replace(
            old_log_prob=torch.cat([one.log_prob for one in found]),
            entropy=torch.cat([one.entropy for one in found if one.entropy is not None]),
        )

    def _samples(self, trajectories: Trajectories, prompts: Sequence[Prompt]) -> list[Sample]:
        lengths = trajectories.lengths.tolist()
        ids = trajectories.payload.completion_ids.tolist()
        texts = self.policy.decode([row[:n] for row, n in zip(ids, lengths, strict=True)])
        assert trajectories.truncated is not None
        worst = worst_decisions(trajectories, WORST_TOKENS)
        return [
            Sample(
                prompts[row * len(prompts) // len(texts)],
                completion=text,
                truncated=cut,
                length=lengths[row],
                mismatch=tuple(self._token(trajectories, row, place) for place in worst[row]),
            )
            for row, (text, cut) in enumerate(
                zip(texts, trajectories.truncated.tolist(), strict=True)
            )
        ]

    def _token(self, trajectories: Trajectories, row: int, place: int) -> dict[str, Any]:
        """Describe a token, with its log-probability in the engine and in the policy."""
        engine, policy = trajectories.rollout_log_prob, trajectories.old_log_prob
        assert engine is not None
        assert policy is not None
        token = int(trajectories.payload.completion_ids[row, place])
        return {
            "place": place,
            "token": self.policy.decode([[token]], special=True)[0],
            "rollout_log_prob": float(engine[row, place]),
            "old_log_prob": float(policy[row, place]),
        }


def vllm_engine(
    policy: Any,
    *,
    model: str,
    dtype: str,
    lora_rank: int | None,
    url: str | None,
    folder: str | None,
    options: Mapping[str, Any],
    **sampling: Any,
) -> VllmEngine:
    """Build an engine; all engines of one policy share one vLLM.

    Args:
        policy: a token policy.
        model: the folder or hub id that the policy was loaded from.
        dtype: dtype of the weights in vLLM.
        lora_rank: rank of the policy's adapter, None where all its weights train.
        url: a server; None: vLLM in this process.
        folder: where a server reads weights; see :class:`~mmgrpo.rollout.vllm_client.VllmClient`.
        options: further arguments of vLLM.
        sampling: see :class:`VllmEngine`.
    """
    if policy not in _SESSIONS:
        backend: Any
        if url is None:
            backend = LocalVllm(model, dtype=dtype, lora_rank=lora_rank, options=options)
        else:
            backend = VllmClient(
                url, folder=folder, sleeps=bool(options.get("enable_sleep_mode", False))
            )
        _SESSIONS[policy] = VllmSession(policy, backend)
    return VllmEngine(policy, _SESSIONS[policy], **sampling)
