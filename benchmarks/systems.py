"""The systems under comparison, each with the same four verbs: gradient, update, generate, step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mmgrpo.core.aggregation import denominators
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods import load_method
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.policies.multimodal import VisionLanguagePolicy
from mmgrpo.policies.token_payload import pad_right
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.autoregressive import AutoregressiveEngine
from mmgrpo.trainer.memory import keep_freed_memory

SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "100M": {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 4},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2},
}  # fmt: skip
"""The last is Qwen2.5-1.5B's, with an output head of its own."""


class System(Protocol):
    """What is timed. ``update`` is forward and backward, ``step`` everything but the optimiser."""

    def gradient(self) -> dict[str, Tensor]:
        """Gradient of GRPO's loss (no KL) on the fixed batch, by parameter name."""
        ...

    def update(self) -> None:
        """Forward and backward on the fixed batch."""
        ...

    def generate(self) -> None:
        """Sample the group of each prompt, every completion at full length."""
        ...

    def step(self) -> None:
        """Generate, score, turn rewards into advantages, forward and backward."""
        ...


IMAGE_SIDE = 224
"""Pixels; patches of 14, four of them a token: 64 tokens an image."""
TOWER = {"depth": 4, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 4}


def _build_text(sizes: dict[str, int]) -> tuple[Any, Any]:
    """Return a random Qwen2 model and a byte tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **_ids(tokenizer))), tokenizer


def _build_vision(sizes: dict[str, int]) -> tuple[Any, Any]:
    """Return a random Qwen2-VL and a processor that needs no torchvision."""
    from transformers import PaddleOCRVLProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = build_tokenizer(images=True)
    width = sizes["hidden_size"]
    sections = [width // sizes["num_attention_heads"] // 8 * n for n in (1, 1, 2)]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    places = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in [
            ("image", "image_pad"), ("video", "video_pad"),
            ("vision_start", "vision_start"), ("vision_end", "vision_end"),
        ]
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config={**sizes, **_ids(tokenizer), "rope_parameters": rope},
        vision_config={**TOWER, "hidden_size": width},
        tie_word_embeddings=False, **places,
    )  # fmt: skip
    processor = PaddleOCRVLProcessor(
        image_processor=Qwen2VLImageProcessorPil(),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return Qwen2VLForConditionalGeneration(config), processor


def _ids(tokenizer: Any) -> dict[str, int | None]:
    names = ("eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names} | {"bos_token_id": None}


def _ask(index: int, text: str) -> Prompt:
    return Prompt(index, text)


def _ask_about_image(index: int, text: str) -> Prompt:
    from PIL import Image

    generator = torch.Generator().manual_seed(index)
    shape = (IMAGE_SIDE, IMAGE_SIDE, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    message = {"role": "user", "content": parts}
    return Prompt(index, [message], images=(Image.fromarray(pixels.numpy()),))


class Kind(NamedTuple):
    """What a kind of model changes: how it is built, loaded and asked."""

    build: Callable[[dict[str, int]], tuple[Any, Any]]
    policy: Callable[..., Any]
    prompt: Callable[[int, str], Prompt]


KINDS = {
    "Qwen2": Kind(_build_text, AutoregressivePolicy, _ask),
    "Qwen2-VL": Kind(
        _build_vision, partial(VisionLanguagePolicy, train_vision=True), _ask_about_image
    ),
}
"""TRL trains the vision tower too."""


def save_model(folder: Path, *, vocabulary: int, size: str, kind: str = "Qwen2") -> None:
    """Write a random model with a byte tokenizer, or a processor with one."""
    sizes = {**SIZES[size], "vocab_size": vocabulary, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    for part in KINDS[kind].build(sizes):
        part.save_pretrained(folder)


def spread(completions: list[Any]) -> list[float]:
    """Stand in for a reward: costs nothing, and differs between the samples of a group."""
    return [float(place % 3) for place in range(len(completions))]


class Mmgrpo:
    """This package."""

    def __init__(
        self,
        folder: Path,
        case: Any,
        batch: dict[str, Any],
        *,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        keep_freed_memory()  # as a run does
        self.policy = KINDS[case.kind].policy(folder, reference="none", dtype=dtype)
        self.policy.model.to(device)
        self.policy.model.generation_config.eos_token_id = []  # nothing ends before its full length
        self.engine = AutoregressiveEngine(self.policy, max_new_tokens=case.completion)
        self.method = load_method("grpo", **{"regulariser.kl.coefficient": 0.0})
        self.prompts = batch["prompts"]
        self.group = len(batch["completions"]) // len(self.prompts)
        encoded = self.policy.encode(self.prompts, max_new_tokens=case.completion)
        assert encoded.mask.all()  # nothing is padded, neither here nor there
        owner = torch.arange(len(self.prompts)).repeat_interleave(self.group)
        mask = torch.ones_like(batch["completions"], dtype=torch.bool)
        self.fixed = Trajectories(
            group=owner,
            mask=mask,
            advantage=batch["advantages"][:, None].expand(mask.shape),
            payload=self.policy.payload(
                encoded.to(torch.device("cpu")), owner, batch["completions"], 1.0
            ),
        ).to(torch.device(device))

    def _backward(self, trajectories: Trajectories) -> None:
        self.policy.network.zero_grad()
        evaluation = self.policy.evaluate(trajectories, self.method.request)
        total = denominators(trajectories)
        output = self.method.loss(
            evaluation.log_prob, trajectories, evaluation=evaluation, total=total
        )
        output.loss.backward()

    def gradient(self) -> dict[str, Tensor]:
        # TRL's softmax is over all tokens, ours leaves out image placeholders, which are no answer.
        forbidden, self.policy._forbidden = self.policy._forbidden, self.policy._forbidden[:0]
        self.update()
        self.policy._forbidden = forbidden
        return {n: p.grad.clone() for n, p in self.policy.model.named_parameters()}

    def update(self) -> None:
        self._backward(self.fixed)

    def generate(self) -> None:
        self.engine.generate(self.prompts, group_size=self.group, seed=0)

    def step(self) -> None:
        rollout = self.engine.generate(self.prompts, group_size=self.group, seed=0)
        device = rollout.trajectories.group.device
        rewards = {"spread": torch.tensor(spread(rollout.samples), device=device)}
        self._backward(self.method.prepare(rollout.trajectories.replace(rewards=rewards)))


class Trl:
    """TRL's GRPOTrainer, called where its own training loop calls it."""

    def __init__(self, folder: Path, case: Any, batch: dict[str, Any], **settings: Any) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        prompts = [_conversation(prompt) for prompt in batch["prompts"]]
        completions = batch["completions"]
        group = len(completions) // len(prompts)
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, loss_type="grpo", beta=0.0, num_generations=group,
            per_device_train_batch_size=len(completions), max_completion_length=case.completion,
            generation_kwargs={"min_new_tokens": case.completion}, **settings,
        )  # fmt: skip
        self.trainer = GRPOTrainer(
            model=str(folder), reward_funcs=_reward, args=config,
            train_dataset=Dataset.from_list([{"prompt": "not read here"}]),
        )  # fmt: skip
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model = trainer.accelerator.prepare(trainer.model)
        trainer.model_wrapped = trainer.model
        trainer.model.train()
        repeated = [prompt for prompt in prompts for _ in range(group)]
        self.rows = [{"prompt": prompt} for prompt in repeated]
        self.encoded = trainer._tokenize_prompts(repeated)
        self.group = group
        ids, images, fields = self.encoded
        prompts = torch.tensor(ids)
        self.fixed = {
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
            "completion_ids": completions, "completion_mask": torch.ones_like(completions),
            "advantages": batch["advantages"],
            "num_items_in_batch": torch.tensor(completions.numel()),
            **_image_inputs(fields, prompts.shape, case.completion),
        }  # fmt: skip
        if images is not None:
            self.fixed["num_images"] = [len(each) for each in images]

    def gradient(self) -> dict[str, Tensor]:
        self.update()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    def update(self) -> None:
        self.trainer.model.zero_grad()
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.trainer.model, self.fixed)
        loss.backward()

    def generate(self) -> None:
        self.trainer._generate_single_turn(*self.encoded, self.group)

    def step(self) -> None:
        self.trainer.model.zero_grad()
        self.trainer._buffered_inputs = None
        self.trainer.training_step(self.trainer.model, self.rows, None)


def _conversation(prompt: Prompt) -> Any:
    """A prompt as TRL takes it: with its images inside the messages."""
    from trl.data_utils import prepare_multimodal_messages

    if not prompt.images:
        return prompt.content
    return prepare_multimodal_messages(prompt.content, images=list(prompt.images))


def _image_inputs(fields: dict[str, Any], shape: Any, length: int) -> dict[str, Tensor]:
    """What TRL makes of the processor's fields before the update; a token's go on with zeros."""
    tensors = {name: torch.as_tensor(np.array(value)) for name, value in fields.items()}
    return {
        name: pad_right(value, shape[1] + length) if value.shape == shape else value
        for name, value in tensors.items()
    }


def _reward(completions: list[Any], **_: Any) -> list[float]:
    return spread(completions)


def newcomer(folder: Path, case: Any, batch: dict[str, Any]) -> System:
    """TRL as it comes: bfloat16 autocast and gradient checkpointing, also on a CPU."""
    return Trl(folder, case, batch)


def best(folder: Path, case: Any, batch: dict[str, Any]) -> System:
    """TRL with what costs time on a CPU switched off."""
    return Trl(folder, case, batch, bf16=False, gradient_checkpointing=False)


SYSTEMS: dict[str, Callable[..., System]] = {
    "TRL newcomer defaults": newcomer,
    "TRL best settings": best,
    "mmgrpo": Mmgrpo,
}
