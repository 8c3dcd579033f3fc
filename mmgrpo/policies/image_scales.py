"""Policies whose decisions are the codes of a picture, scale by scale, coarse to fine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.core.trajectories import Trajectories
from mmgrpo.errors import DataError, nearest
from mmgrpo.policies.adapters import add_lora, has_adapter, make_reference
from mmgrpo.policies.fast_layers import use_fast_layers
from mmgrpo.policies.loading import parse_dtype
from mmgrpo.policies.saved_weights import load_saved
from mmgrpo.policies.scale_model import ScaleModel
from mmgrpo.policies.scale_quantiser import ScaleQuantiser
from mmgrpo.policies.token_logits import log_distribution, read_tokens
from mmgrpo.policies.token_payload import EncodedPrompt, TokenPayload, TokenPrompts
from mmgrpo.policies.used_decisions import PLAIN_REQUEST, refuse_predictions
from mmgrpo.protocols import Evaluation, Prompt, Request, Weights

BATCH = 64
"""Pictures that are decoded at the same time."""


class ImageScalesPolicy:
    """A next-scale image generator: p(picture) = prod_k prod_ij p(code_kij | earlier scales).

    The codes of one scale are independent given the scales before it, so a picture is drawn in K
    network calls and evaluated in one (VAR, arXiv:2404.02905; with GRPO arXiv:2505.23331). What
    the transformer reads of the codes is computed again from them in float32, by the frozen
    quantiser. Log-probabilities are those of the softmax of ``logits / temperature`` in float32.
    There is no guidance, which would change the distribution that the rollout draws from.

    Attributes:
        model: transformer and quantiser.
        network: what is called: the transformer, or what peft or a trainer wrapped around it.
        forwards: network calls made so far.
    """

    modality = "image_scales"
    ratio_tolerance: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}

    def __init__(
        self,
        source: str | Path | ScaleModel,
        *,
        lora: Mapping[str, Any] | None = None,
        reference: str = "auto",
        reference_decay: float = 0.99,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        fast_layers: bool = True,
        seed: int = 0,
    ) -> None:
        """Load the model and choose what trains.

        Args:
            source: a folder that :meth:`ScaleModel.save_pretrained` wrote, or the model.
            lora: options of :func:`add_lora` (rank, alpha, targets, ...); None trains the whole
                transformer.
            reference: kind of reference, see :func:`make_reference`.
            reference_decay: decay per update of an ``ema`` reference.
            dtype: dtype of the transformer's weights.
            gradient_checkpointing: compute activations again in the backward pass.
            fast_layers: compute float32 layers on a CPU in fewer and faster steps.
            seed: seed of the adapter's initial weights.

        Raises:
            ModelError: the folder is missing, incomplete or of another kind.
            ConfigError: an option that does not fit.
        """
        if not isinstance(source, ScaleModel):
            source = ScaleModel.from_pretrained(source)
        self.model: ScaleModel = source
        self.model.quantiser.requires_grad_(False).eval()
        transformer = self.model.transformer.to(parse_dtype(dtype)).requires_grad_(True)
        transformer.checkpointing = gradient_checkpointing
        network: torch.nn.Module = transformer
        if lora is not None:
            network = add_lora(network, **{"seed": seed, **lora})
        if fast_layers:
            use_fast_layers(network)
        self.network = network
        self._saved: Any = network  # a trainer may wrap self.network
        self.forwards = 0
        self._reference = make_reference(reference, network, decay=reference_decay)
        self.reference_weights: Weights = self._reference

    @property
    def device(self) -> torch.device:
        """Where the transformer's weights are."""
        return self.model.transformer.head.weight.device

    @property
    def quantiser(self) -> ScaleQuantiser:
        """What makes pictures of codes, on the same device."""
        return self.model.quantiser.to(self.device)

    @property
    def lengths(self) -> list[int]:
        """Codes of each scale."""
        return self.model.shape.lengths

    # -- prompts ----------------------------------------------------------------------------------

    def check(self, prompts: Sequence[Prompt], *, room: int = 0) -> None:
        """Refuse what :meth:`encode` refuses; codes take no place in a prompt's context."""
        del room
        for prompt in prompts:
            self._encode(prompt)

    def encode(self, prompts: Sequence[Prompt]) -> TokenPrompts:
        """Turn prompts into tokens: the class, or the bytes of the text.

        Raises:
            DataError: a prompt that is no plain text, too long or no class; names the row.
        """
        rows = [EncodedPrompt(torch.tensor(self._encode(prompt))) for prompt in prompts]
        return TokenPrompts.pad(rows, pad_id=0).to(self.device)

    def _encode(self, prompt: Prompt) -> list[int]:
        text, shape = prompt.content, self.model.shape
        if not isinstance(text, str) or prompt.images:
            raise DataError(f"{prompt.place}: a next-scale generator takes plain text prompts.")
        if shape.classes is not None:
            if text not in shape.classes:
                raise DataError(
                    f"{prompt.place}: the prompt '{text}' is no class of this model"
                    f"{nearest(text, shape.classes)}"
                )
            return [shape.classes.index(text)]
        ids = [*text.encode("utf-8")]
        if not 0 < len(ids) <= shape.prompt_room:
            raise DataError(
                f"{prompt.place}: the prompt has {len(ids)} bytes; expected 1 to "
                f"{shape.prompt_room}."
            )
        return ids

    # -- codes ------------------------------------------------------------------------------------

    def logits(self, prompts: TokenPrompts, prompt_row: Tensor, codes: Tensor) -> Tensor:
        """Return the logits of the scales of ``codes`` and of the next, in one network call.

        Args:
            prompts: P prompts.
            prompt_row: ``[B]`` the prompt of each row.
            codes: ``[B, m]`` int64, the codes of the first scales; none, some or all of them.

        Returns:
            ``[B, m', V]``.
        """
        self.forwards += 1
        features = self.quantiser.inputs(codes)
        found: Tensor = self.network(prompts.ids, prompts.mask, prompt_row, features)
        return found

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return ``[..., V]`` float32 log-probabilities of codes, in nats."""
        return log_distribution(logits, temperature, logits.new_zeros(0, dtype=torch.int64))

    def scale_of(self, rows: int) -> Tensor:
        """Return ``[rows, N]`` int64: the scale of each code."""
        return self.model.transformer.scale_of.expand(rows, -1)

    def payload(
        self, prompts: TokenPrompts, prompt_row: Tensor, codes: Tensor, temperature: float
    ) -> TokenPayload:
        """Bind ``[B, N]`` codes to their prompts and the temperature of their softmax."""
        scale = torch.full(prompt_row.shape, temperature, device=codes.device)
        return TokenPayload(prompts, prompt_row, codes, scale)

    def draw(self, codes: Tensor) -> list[Image.Image]:
        """Return the pictures of ``codes [B, N]``; [-1, 1] becomes 8-bit colours."""
        images: list[Image.Image] = []
        for part in codes.split(BATCH):
            pixels = self.quantiser.decode(part)
            pixels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            images += [Image.fromarray(row) for row in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        return images

    # -- evaluation -------------------------------------------------------------------------------

    def evaluate(self, trajectories: Trajectories, request: Request = PLAIN_REQUEST) -> Evaluation:
        """Return the log-probabilities of the codes in the mask, ``[B, N]`` float32.

        Raises:
            MethodError: a divergence or a prediction is requested.
        """
        refuse_predictions(request)
        mask = trajectories.mask
        wanted = mask.clone()
        wanted[0, 0] |= ~mask.any()  # the network runs even if nothing counts
        rows = wanted.any(dim=1).nonzero().squeeze(1)
        payload, keep = trajectories.payload.select(rows), wanted[rows]
        logits = self.logits(payload.prompts, payload.prompt_row, payload.completion_ids)
        ids, temperature = payload.at(keep, 0)
        nothing = ids.new_zeros(0)
        reading = read_tokens(logits[keep], ids, temperature, nothing, with_entropy=request.entropy)

        def place(values: Tensor) -> Tensor:
            blank = values.new_zeros(mask.shape)
            return blank.index_put(wanted.nonzero(as_tuple=True), values) * mask

        return Evaluation(
            log_prob=place(reading.log_prob),
            entropy=None if reading.entropy is None else place(reading.entropy),
        )

    # -- weights ----------------------------------------------------------------------------------

    @property
    def has_reference(self) -> bool:
        """Whether there are weights to compare with."""
        return self._reference.available

    def reference(self) -> AbstractContextManager[None]:
        """Within the context, evaluate() answers with the reference's weights."""
        return self._reference.active()

    def export(self, directory: Path) -> None:
        """Write a folder that this class loads, or peft if there is an adapter."""
        saved = self._saved if has_adapter(self._saved) else self.model
        saved.save_pretrained(directory)

    def load_export(self, directory: Path) -> None:
        """Load the weights that :meth:`export` wrote, into the present tensors.

        Raises:
            ModelError: the folder is missing, or holds weights that do not fit.
        """
        load_saved(self._saved, Path(directory), self._load_weights)

    def _load_weights(self, directory: Path) -> None:
        loaded = ScaleModel.from_pretrained(directory)
        self.model.transformer.load_state_dict(loaded.transformer.state_dict())
