"""Policies whose decisions are tokens: any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgrpo.errors import DataError, ModelError
from mmgrpo.policies.adapters import add_lora, has_adapter, make_reference
from mmgrpo.policies.loading import first_line, load_model, load_tokenizer, parse_dtype
from mmgrpo.policies.saved_weights import load_saved
from mmgrpo.policies.token_evaluator import TokenEvaluator
from mmgrpo.policies.token_logits import entropy, log_distribution
from mmgrpo.policies.token_payload import EncodedPrompt, TokenPayload, TokenPrompts
from mmgrpo.protocols import Prompt, Weights


class AutoregressivePolicy(TokenEvaluator):
    """A text model, sampled and evaluated token by token.

    A prompt is read once per group: its keys and values are computed once and fan out to the
    completions, in the rollout, in the evaluation and in its gradient. Log-probabilities are those
    of the softmax of ``logits / temperature`` in float32; the temperature belongs to the sampled
    rows (``TokenPayload.temperature``), so engines with different temperatures share a policy.
    Dropout is off always.

    Attributes:
        longest_prompt: tokens of the longest prompt that :meth:`check` has seen.
    """

    modality = "text"
    longest_prompt = 0
    ratio_tolerance: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}

    def __init__(  # noqa: PLR0913 - each names one choice
        self,
        source: str | Path | tuple[Any, Any],
        *,
        lora: Mapping[str, Any] | None = None,
        reference: str = "auto",
        reference_decay: float = 0.99,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        attention: str = "sdpa",
        max_prompt_tokens: int | None = None,
        head_tile_rows: int | None = None,
        share_prompts: bool = True,
        pack: bool = True,
        fast_decoding: bool = True,
        fast_layers: bool = True,
        seed: int = 0,
    ) -> None:
        """Load the model and choose what trains.

        Args:
            source: a model folder or hub id; or the model and its tokenizer (or processor).
            lora: options of :func:`add_lora` (rank, alpha, targets, ...); None trains all weights.
            reference: kind of reference, see :func:`make_reference`.
            reference_decay: decay per update of an ``ema`` reference.
            dtype: dtype of the weights; adapters and the softmax are float32 always.
            gradient_checkpointing: compute activations again in the backward pass; prompts are
                then read once per completion, except in packed rows.
            attention: attention implementation of transformers.
            max_prompt_tokens: a longer prompt is an error; None leaves what the model's context
                has beside the completion.
            head_tile_rows: positions to which an evaluation applies the output head at a time, so
                that the logits of all never exist together; None: by their size; 0: all at once.
            share_prompts: evaluate each prompt once for its group; False: once per completion.
            pack: evaluate them and their completions as one row without padding, where all layers
                attend to all tokens before; only with shared prompts.
            fast_decoding: sample without what transformers does around the layers in every step,
                where the model's layers are known.
            fast_layers: compute float32 layers on a CPU in fewer and faster steps.
            seed: seed of the adapter's initial weights.

        Raises:
            ModelError: the folder is missing, incomplete or of another kind.
            ConfigError: an option that does not fit.
        """
        if isinstance(source, tuple):
            model, self.processing = source
            model.to(parse_dtype(dtype))
        else:
            model, self.processing = self._load(source, dtype=dtype, attention=attention)
        self.max_prompt_tokens = max_prompt_tokens
        trained = self._choose_trained(model)
        network = model
        if lora is not None:
            network = add_lora(
                model, **{"within": trained, "task_type": "CAUSAL_LM", "seed": seed, **lora}
            )
        self._saved = network  # a trainer may wrap self.network
        super().__init__(
            model,
            network,
            forbidden=self._forbidden_ids(model),
            checkpointing=gradient_checkpointing,
            head_tile_rows=head_tile_rows,
            share_prompts=share_prompts,
            pack=pack,
            fast_decoding=fast_decoding,
            fast_layers=fast_layers,
        )
        self._reference = make_reference(reference, network, decay=reference_decay)
        self.reference_weights: Weights = self._reference

    def _load(self, path: str | Path, *, dtype: str, attention: str) -> tuple[Any, Any]:
        """Return the model in a folder, and what turns its prompts into tokens."""
        from transformers import AutoModelForCausalLM

        tokenizer = load_tokenizer(path)
        return load_model(path, AutoModelForCausalLM, dtype=dtype, attention=attention), tokenizer

    def _choose_trained(self, model: Any) -> Any:
        """Freeze what does not train; return the part whose layers get adapters."""
        return model.requires_grad_(True)

    def _forbidden_ids(self, model: Any) -> tuple[int, ...]:
        """Return the ids that can never be sampled."""
        del model
        return ()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, which a multimodal processor holds inside."""
        return self.processing

    @property
    def context(self) -> int | None:
        """How many tokens prompt and completion may have in all; None where there is no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a completion: the generation config's, else the tokenizer's."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        found = self.tokenizer.eos_token_id if found is None else found
        return (found,) if isinstance(found, int) else tuple(found or ())

    @property
    def pad_id(self) -> int:
        """Token id that fills rows; it is never attended to."""
        return self.tokenizer.pad_token_id or 0

    def encode(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> TokenPrompts:
        """Turn prompts into tokens: chat messages by the chat template, plain text as it stands.

        Args:
            prompts: the prompts.
            max_new_tokens: room that each prompt must leave in the model's context.

        Raises:
            DataError: a prompt that is empty, too long (nothing is ever cut) or cannot be rendered;
                the message names the row.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        for prompt, row in zip(prompts, encoded, strict=True):
            self._check_length(prompt, len(row.ids), max_new_tokens)
        return TokenPrompts.pad(encoded, pad_id=self.pad_id).to(self.device)

    def check(self, prompts: Sequence[Prompt], *, room: int) -> None:
        """Raise what :meth:`encode` would raise, so that a run can refuse its data at the start.

        Args:
            prompts: all prompts of the run.
            room: how many tokens each must leave in the model's context.
        """
        for prompt in prompts:
            count = self._count_tokens(prompt)
            self._check_length(prompt, count, room)
            self.longest_prompt = max(self.longest_prompt, count)

    def _count_tokens(self, prompt: Prompt) -> int:
        return len(self._encode(prompt).ids)

    def _check_length(self, prompt: Prompt, count: int, room: int) -> None:
        """Refuse an empty prompt, and one that does not leave the room."""
        free = None if self.context is None else self.context - room
        limits = [limit for limit in (self.max_prompt_tokens, free) if limit is not None]
        if not 0 < count <= min(limits, default=count):
            size = f"has {count} tokens, and at most {min(limits)} fit" if count else "is empty"
            raise DataError(
                f"{prompt.place}: the prompt {size}; prompts are never cut, so change the "
                "row, max_prompt_tokens or max_new_tokens."
            )

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        if prompt.images:
            raise DataError(f"{prompt.place}: the prompt has images, and this is a text model.")
        text = self._render(prompt)
        plain = isinstance(prompt.content, str)  # a chat template writes the special tokens itself
        ids = self.tokenizer(text, add_special_tokens=plain)["input_ids"]
        return EncodedPrompt(torch.tensor(ids, dtype=torch.int64))

    def _render(self, prompt: Prompt) -> str:
        if isinstance(prompt.content, str):
            return prompt.content
        if not getattr(self.processing, "chat_template", None):
            raise ModelError(
                f"{prompt.place} is a chat, and this model's tokenizer has no chat template; "
                "use plain text prompts or a model with one."
            )
        try:
            return self.processing.apply_chat_template(
                prompt.content, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is a program that raises anything
            raise DataError(
                f"{prompt.place}: the chat template refuses it: {first_line(error)}"
            ) from error

    def decode(self, ids: Sequence[Sequence[int]], *, special: bool = False) -> list[str]:
        """Turn completions into text; special tokens (not reasoning tags) only if asked for."""
        return self.tokenizer.batch_decode(
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )

    def log_distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Return the ``[R, V]`` float32 log-probabilities of the next token, in nats."""
        return log_distribution(logits, temperature, self.forbidden)

    def entropy(self, log_p: Tensor, probs: Tensor) -> Tensor:
        """Return the ``[R]`` entropy of ``[R, V]`` (log-)probabilities, in nats."""
        return entropy(log_p, probs)

    def payload(
        self, prompts: TokenPrompts, prompt_row: Tensor, ids: Tensor, temperature: float
    ) -> TokenPayload:
        """Bind ``[B, T]`` completions to their prompts and the temperature of their softmax."""
        scale = torch.full(prompt_row.shape, temperature, dtype=torch.float32, device=ids.device)
        return TokenPayload(prompts, prompt_row, ids, scale)

    @property
    def has_reference(self) -> bool:
        """Whether there are weights to compare with."""
        return self._reference.available

    def reference(self) -> AbstractContextManager[None]:
        """Within the context, evaluate() answers with the reference's weights."""
        return self._reference.active()

    def export(self, directory: Path) -> None:
        """Write a folder that transformers loads, or peft if there is an adapter."""
        options = {"save_embedding_layers": False} if has_adapter(self._saved) else {}
        self._saved.save_pretrained(directory, **options)
        self._save_processing(directory)

    def _save_processing(self, directory: Path) -> None:
        self.processing.save_pretrained(directory)

    def load_export(self, directory: Path) -> None:
        """Load the weights that :meth:`export` wrote, into the present tensors.

        Raises:
            ModelError: the folder is missing, or holds weights that do not fit.
        """
        load_saved(self._saved, Path(directory), self._load_weights)

    def _load_weights(self, directory: Path) -> None:
        loaded = type(self.model).from_pretrained(directory, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())
