"""The systems under comparison, each with the same four verbs: gradient, update, generate, step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmgrpo.core.aggregation import denominators
from mmgrpo.core.trajectories import Trajectories
from mmgrpo.methods import load_method
from mmgrpo.playground.tokenizer import build_tokenizer
from mmgrpo.policies.autoregressive import AutoregressivePolicy
from mmgrpo.protocols import Prompt
from mmgrpo.rollout.autoregressive import AutoregressiveEngine

SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "100M": {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_key_value_heads": 4},
}  # fmt: skip


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


def save_model(folder: Path, *, vocabulary: int, size: str) -> None:
    """Write a random Qwen2 model with a byte tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **SIZES[size],
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
        self.policy = AutoregressivePolicy(folder, reference="none", dtype=dtype)
        self.policy.model.to(device)
        self.policy.model.generation_config.eos_token_id = []  # nothing ends before its full length
        self.engine = AutoregressiveEngine(self.policy, max_new_tokens=case.completion)
        self.method = load_method("grpo", **{"regulariser.kl.coefficient": 0.0})
        texts = batch["texts"]
        self.prompts = [Prompt(index, text) for index, text in enumerate(texts)]
        self.group = len(batch["completions"]) // len(texts)
        encoded = self.policy.encode(self.prompts, max_new_tokens=case.completion)
        assert encoded.ids.shape == (len(texts), case.prompt)
        owner = torch.arange(len(texts)).repeat_interleave(self.group)
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
        self.update()
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
        texts = batch["texts"]
        rows = len(batch["completions"])
        group = rows // len(texts)
        config = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[], save_strategy="no",
            disable_tqdm=True, loss_type="grpo", beta=0.0, num_generations=group,
            per_device_train_batch_size=rows, max_completion_length=case.completion,
            generation_kwargs={"min_new_tokens": case.completion}, **settings,
        )  # fmt: skip
        self.trainer = GRPOTrainer(
            model=str(folder), reward_funcs=_reward, args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        )  # fmt: skip
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = 1
        trainer.create_optimizer()
        trainer.model = trainer.accelerator.prepare(trainer.model)
        trainer.model_wrapped = trainer.model
        trainer.model.train()
        repeated = [text for text in texts for _ in range(group)]
        self.rows = [{"prompt": text} for text in repeated]
        self.ids = trainer.processing_class(repeated)["input_ids"]
        self.group = group
        prompts, completions = torch.tensor(self.ids), batch["completions"]
        self.fixed = {
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts),
            "completion_ids": completions, "completion_mask": torch.ones_like(completions),
            "advantages": batch["advantages"],
            "num_items_in_batch": torch.tensor(completions.numel()),
        }  # fmt: skip

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
        self.trainer._generate_single_turn(self.ids, None, {}, self.group)

    def step(self) -> None:
        self.trainer.model.zero_grad()
        self.trainer._buffered_inputs = None
        self.trainer.training_step(self.trainer.model, self.rows, None)


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
