"""Rewards that spread on the output of random models, as a user would write them."""

import os
from pathlib import Path

import numpy as np


def spread(completions, **_):
    """A number in [0, 1) that depends on every character."""
    return [sum(map(ord, _text(completion))) % 17 / 17 for completion in completions]


def rarely(completions, **_):
    """Mostly 0, so that many groups have no spread."""
    return [float(value > 0.85) for value in spread(completions)]


def brightness(images, **_):
    """Mean of the red channel, in [0, 1]; rounded, so that a pixel's rounding rarely matters."""
    means = [np.asarray(image, dtype=np.float64)[..., 0].mean() / 255 for image in images]
    return [round(float(mean), 3) for mean in means]


def noisy(completions, **_):
    """Draws from the global generators, which a resumed run has to continue."""
    import random

    import torch

    size = len(completions)
    numbers = np.random.rand(size) + torch.rand(size).numpy()  # noqa: NPY002 - on purpose
    noise = [float(number) + random.random() for number in numbers]
    return [a + 0.1 * b for a, b in zip(spread(completions), noise, strict=True)]


def fails_in_the_third_step(completions, **_):
    """Raises while the metrics file that FAIL_WITH names has two lines; draws numbers before."""
    values, file = noisy(completions), Path(os.environ.get("FAIL_WITH", ""))
    if file.is_file() and len(file.read_text().splitlines()) == 2:
        raise OSError("the judge's server is down")
    return values


def broken_for_some(completions, **_):
    """NaN, a failure, for about a fifth of the samples."""
    return [float("nan") if value < 0.2 else value for value in spread(completions)]


def broken_for_many(completions, **_):
    """NaN for about half of the samples."""
    return [float("nan") if value < 0.5 else value for value in spread(completions)]


def _text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]
