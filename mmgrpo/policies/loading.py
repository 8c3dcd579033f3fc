"""Hugging Face folders: from a path to a model and its tokenizer or processor, or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmgrpo.errors import ConfigError, ModelError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name in ``DTYPES``.

    Raises:
        ConfigError: another name.
    """
    if name not in DTYPES:
        raise ConfigError(f"Unknown dtype '{name}'{nearest(name, DTYPES)}")
    return DTYPES[name]


def load_model(path: str | Path, auto: Any, *, dtype: str, attention: str) -> Any:
    """Load a model's weights.

    Args:
        path: a local folder, or a hub id such as ``Qwen/Qwen2.5-0.5B``.
        auto: the transformers auto class, which decides what kinds of model fit.
        dtype: name of the weights' dtype.
        attention: attention implementation of transformers.

    Raises:
        ModelError: a missing or incomplete folder, or a model of another kind.
    """
    from transformers import AutoConfig

    _check_folder(path)
    torch_dtype = parse_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} has no model configuration: {first_line(error)}") from error
    if type(config) not in auto._model_mapping:  # noqa: SLF001 - there is no public name for it
        raise ModelError(
            f"{path} holds a {config.model_type} model, which {auto.__name__} cannot load; "
            "check that modality and model.path belong together."
        )
    try:
        return auto.from_pretrained(path, dtype=torch_dtype, attn_implementation=attention)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"Cannot load the weights of {path}: {first_line(error)}") from error


def load_tokenizer(path: str | Path) -> Any:
    """Load a tokenizer.

    Raises:
        ModelError: the folder has none.
    """
    from transformers import AutoTokenizer

    _check_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no tokenizer: {first_line(error)}") from error
    if not tokenizer("a")["input_ids"]:  # transformers makes an empty one where the files miss
        raise ModelError(f"{path} has no tokenizer; it needs a tokenizer.json or its vocabulary.")
    return tokenizer


def load_processor(path: str | Path) -> Any:
    """Load a multimodal processor, without its video part where torchvision is not installed.

    Raises:
        ModelError: the folder has none.
    """
    from transformers import AutoProcessor

    _check_folder(path)
    try:
        processor = AutoProcessor.from_pretrained(path)
    except ImportError:
        processor = _load_parts(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} has no processor: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"{path} has no image processor; it needs a preprocessor_config.json.")
    return processor


def save_processor(processor: Any, directory: Path) -> None:
    """Write what :func:`load_processor` reads, whether or not the video part is there."""
    if getattr(processor, "video_processor", True) is not None:
        processor.save_pretrained(directory)
        return
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(directory)
    processor.image_processor.save_pretrained(directory)


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to zero, in evaluation and in training mode.

    A decision must have the same log-probability when it is sampled and when it is trained.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def enable_checkpointing(model: Any, context_fn: Callable[[], Any] | None = None) -> None:
    """Let a transformers model compute activations again in the backward pass of training mode.

    Args:
        model: the model.
        context_fn: the contexts of a layer's two passes, see ``torch.utils.checkpoint``.
    """
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new, old
    name = next(name for name in names if hasattr(model, name))
    contexts = {} if context_fn is None else {"context_fn": context_fn}
    getattr(model, name)({"use_reentrant": False, **contexts})


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, for the end of a one-sentence message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _check_folder(path: str | Path) -> None:
    """Refuse what is neither a local folder nor a model of the hub."""
    if Path(path).is_dir():
        return
    parent = Path(path).parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    text = str(path)
    if text.count("/") != 1 or text[0] in "/.~" or siblings:
        hint = nearest(Path(path).name, siblings) if siblings else "."
        raise ModelError(f"The model folder {text} does not exist{hint}")
    from transformers.utils.hub import cached_file

    try:
        cached_file(text, "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{text} is no local folder, and the hub does not give it: {first_line(error)}"
        ) from error


def processor_for_images(config: Any, images: Any, tokenizer: Any) -> Any:
    """Assemble the processor of a kind of model without its video part.

    Transformers checks the class of every part, which fails for a part that needs torchvision;
    images alone need no torchvision.

    Args:
        config: the model's configuration, which decides the processor's class.
        images: the image processor.
        tokenizer: the tokenizer, with the chat template.
    """
    from transformers import PROCESSOR_MAPPING

    whole: Any = PROCESSOR_MAPPING[type(config)]

    def check(self: Any, name: str, part: Any) -> Any:
        return whole.check_argument_for_proper_class(self, name, part) if part else None

    images_only = type(whole.__name__, (whole,), {"check_argument_for_proper_class": check})
    return images_only(
        image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


def _load_parts(path: str | Path) -> Any:
    from transformers import AutoConfig, AutoImageProcessor

    try:
        config, images = AutoConfig.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} has no image processor: {first_line(error)}") from error
    return processor_for_images(config, images, load_tokenizer(path))
