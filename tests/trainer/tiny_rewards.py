"""Rewards that spread on the output of random models, as a user would write them."""

import os

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

    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]
    return [a + 0.1 * b for a, b in zip(spread(completions), noise, strict=True)]


def fails_while_flagged(completions, **_):
    """Raises as long as the file that FAIL_WHILE names exists, from the 3rd call on."""
    fails_while_flagged.calls += 1
    flag = os.environ.get("FAIL_WHILE", "")
    if fails_while_flagged.calls > 2 and os.path.exists(flag):
        raise OSError("the judge's server is down")
    return spread(completions)


fails_while_flagged.calls = 0


def broken_for_some(completions, **_):
    """NaN, a failure, for about a fifth of the samples."""
    return [float("nan") if value < 0.2 else value for value in spread(completions)]


def _text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]
