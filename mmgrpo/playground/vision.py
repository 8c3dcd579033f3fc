"""The vision playground: read handwritten digits and combine them.

A prompt shows two or three digits, on one wide canvas or in separate images, and asks for their
sum, the largest, or the digits in ascending order. A completion reads first, then answers::

    <think>385</think><answer>16</answer>

The base model is taught by demonstrations that read well but mostly answer carelessly (the sum
without its last digit, the last digit as the largest, the order as read). Reinforcement learning
has to make the careful answer, which it already knows, the usual one. Evaluation uses pictures
of digits that no training, supervised or reinforced, has seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PaddleOCRVLProcessor, Qwen2VLForConditionalGeneration

from mmgrpo.playground.scenes import (
    QUESTIONS,
    Scene,
    draw_scene,
    draw_scenes,
    render,
    write_scenes,
)
from mmgrpo.playground.sft import (
    IGNORED_LABEL,
    Progress,
    pad_demonstrations,
    save_model_folder,
    supervise,
)
from mmgrpo.playground.vision_model import build_model, build_processor

NUM_TRAIN = 1024
NUM_EVAL = 256
CARELESS_SHARE = 0.65
SFT_STEPS = 900
SFT_BATCH = 32
RECITE_STEPS = 400
RECITE_BATCH = 64
SFT_LEARNING_RATE = 3e-3


def encode_demonstrations(
    processor: PaddleOCRVLProcessor, rng: np.random.Generator, batch_size: int
) -> dict[str, torch.Tensor]:
    """Draws demonstrations and encodes them for the model.

    Args:
        processor: Encodes images and text.
        rng: Decides scenes, small distortions of the digits, and who is careless.
        batch_size: Number of demonstrations.

    Returns:
        The processor's tensors and ``labels`` ``[B, L]``, which cover completions only.
    """
    texts, images = [], []
    for _ in range(batch_size):
        scene = draw_scene(rng, "train")
        prompt = processor.apply_chat_template(
            scene.messages(), tokenize=False, add_generation_prompt=True
        )
        texts.append(prompt + draw_completion(rng, scene) + processor.tokenizer.eos_token)
        images.extend(render(scene, "train", augment=rng))
    batch = dict(
        processor(
            text=texts, images=images, return_tensors="pt", padding=True, padding_side="right"
        )
    )
    ids = batch["input_ids"]
    start = ids == processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
    is_completion = (start.cumsum(1) > 0) & ~start & (batch["attention_mask"] > 0)
    batch["labels"] = ids.masked_fill(~is_completion, IGNORED_LABEL)
    return batch


def encode_recitations(
    processor: PaddleOCRVLProcessor, rng: np.random.Generator, batch_size: int
) -> dict[str, torch.Tensor]:
    """Draws demonstrations without their images: the digits are given, the answer is learned.

    Answering needs no eyes, and without images a step costs a quarter.

    Args:
        processor: Its tokenizer encodes the text.
        rng: Decides scenes and who is careless.
        batch_size: Number of demonstrations.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``[B, L]``.
    """
    tokenizer = processor.tokenizer
    prompts, completions = [], []
    for _ in range(batch_size):
        scene = draw_scene(rng, "train")
        thought, tag, answer = draw_completion(rng, scene).partition("</think>")
        prompts.append(f"{QUESTIONS[scene.question][0]}<|assistant|>{thought}")
        completions.append(tag + answer + tokenizer.eos_token)
    return pad_demonstrations(
        tokenizer(prompts)["input_ids"],
        tokenizer(completions)["input_ids"],
        tokenizer.pad_token_id,
    )


def draw_completion(rng: np.random.Generator, scene: Scene) -> str:
    """Draws a demonstration's completion, careless with probability ``CARELESS_SHARE``."""
    return scene.completion(careless=bool(rng.random() < CARELESS_SHARE))


def train_model(
    seed: int,
    *,
    steps: int = SFT_STEPS,
    recite_steps: int = RECITE_STEPS,
    progress: Progress | None = None,
) -> tuple[Qwen2VLForConditionalGeneration, PaddleOCRVLProcessor]:
    """Makes the half-trained base model and its processor: first answering, then reading.

    Args:
        seed: Decides weights and demonstrations.
        steps: Supervised steps with images.
        recite_steps: Supervised steps without images, before those.
        progress: Receives lines of text.
    """
    processor = build_processor()
    model = build_model(processor.tokenizer, seed)
    rng = np.random.default_rng([seed, 1])
    supervise(
        model,
        lambda: encode_recitations(processor, rng, RECITE_BATCH),
        steps=recite_steps,
        learning_rate=SFT_LEARNING_RATE,
        progress=progress,
    )
    supervise(
        model,
        lambda: encode_demonstrations(processor, rng, SFT_BATCH),
        steps=steps,
        learning_rate=SFT_LEARNING_RATE,
        progress=progress,
    )
    return model, processor


def build_vision(
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int = SFT_STEPS,
    recite_steps: int = RECITE_STEPS,
    progress: Progress | None = None,
) -> None:
    """Builds the vision playground: ``model/``, ``train.jsonl``, ``eval.jsonl`` and ``images/``.

    Args:
        out_dir: Created if missing.
        seed: Decides data and weights.
        steps: Supervised steps of the base model, with images.
        recite_steps: Supervised steps without images, before those.
        progress: Receives lines of text.
    """
    folder = Path(out_dir)
    write_scenes(folder, "train", draw_scenes(seed, "train", NUM_TRAIN), "train")
    write_scenes(folder, "eval", draw_scenes(seed, "eval", NUM_EVAL), "eval")
    model, processor = train_model(seed, steps=steps, recite_steps=recite_steps, progress=progress)
    save_model_folder(folder / "model", model, processor)
