"""Any reward on pictures, applied to the frames of videos."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from mmgrpo.errors import ConfigError, UsageError, nearest
from mmgrpo.registry import load_target

from .frames import check_count, sampled

REDUCTIONS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "min": lambda scores: math.nan if any(map(math.isnan, scores)) else min(scores),
}
"""From the scores of a video's frames to that of the video."""


class VideoFrames:
    """Score videos by a reward on pictures, over frames at equal distances.

    The k-th frames of all videos are scored in one call, with the videos' prompts and columns, so
    that a reward that compares the pictures of a prompt (``image_win_rate``) compares frame k with
    frame k.

    Range and direction are those of the reward on pictures. ``mean`` forgives a bad frame, ``min``
    does not. Motion plays no part: a still picture, repeated, scores as well as a video, so combine
    it with a reward that looks at motion. A video scores None where the reward does for one of its
    frames. Costs ``frames`` times what the reward costs.

    Args:
        reward: name of a reward on pictures (``image_...``) or ``module:name``.
        reward_options: its options.
        frames: how many are scored; the first and the last are among them.
        reduce: ``mean`` or ``min``.

    Raises:
        ConfigError: an unknown reward, option or ``reduce``, or a reward that takes no images.
    """

    def __init__(
        self,
        reward: str,
        reward_options: dict[str, Any] | None = None,
        frames: int = 4,
        reduce: str = "mean",
    ) -> None:
        if reduce not in REDUCTIONS:
            raise ConfigError(
                f"video_frames: unknown reduce '{reduce}'{nearest(reduce, REDUCTIONS)}"
            )
        self.name, self.reduce = reward, REDUCTIONS[reduce]
        self.frames = check_count("video_frames", frames)
        self.fn = _built(reward, reward_options or {})
        parameters = inspect.signature(self.fn).parameters.values()
        if "images" not in {p.name for p in parameters}:
            raise ConfigError(f"video_frames: the reward '{reward}' takes no images.")
        self.takes = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.needs = {
            p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        } - {"images"}

    def __call__(
        self, videos: list[list[Image.Image]], prompts: list[Any], **columns: Any
    ) -> list[float | None] | Awaitable[list[float | None]]:
        """Score each video; see the class."""
        given = {**columns, "prompts": prompts}
        if missing := sorted(self.needs - given.keys()):
            raise ValueError(f"'{self.name}' needs the column '{missing[0]}'")
        if not self.takes_all:
            given = {name: values for name, values in given.items() if name in self.takes}
        if len(prompts) != len(videos):
            raise ValueError(f"got {len(videos)} videos and {len(prompts)} prompts")
        frames = [sampled(video, self.frames) for video in videos]
        scores = [self.fn(images=list(images), **given) for images in zip(*frames, strict=True)]
        if any(inspect.isawaitable(score) for score in scores):
            return self._later(scores)
        return self._reduced(scores)

    async def _later(self, scores: Sequence[Awaitable[Any]]) -> list[float | None]:
        return self._reduced(await asyncio.gather(*scores))

    def _reduced(self, scores: Sequence[Sequence[float | None]]) -> list[float | None]:
        return [
            None if None in of_video else self.reduce([s for s in of_video if s is not None])
            for of_video in zip(*scores, strict=True)
        ]


def _built(reward: str, options: Mapping[str, Any]) -> Any:
    from mmgrpo.rewards import REWARDS

    if ":" not in reward and reward not in REWARDS:
        known = [name for name in REWARDS if name.startswith("image_")]
        raise ConfigError(f"video_frames: unknown reward '{reward}'{nearest(reward, known)}")
    target = load_target(REWARDS.get(reward, reward))
    if not inspect.isclass(target):
        if options:
            raise ConfigError(f"video_frames: the reward '{reward}' is a function; no options.")
        return target
    known = list(inspect.signature(target).parameters)
    for option in options:
        if option not in known:
            raise ConfigError(
                f"video_frames: '{reward}' has no option '{option}'{nearest(option, known)}"
            )
    try:
        return target(**options)
    except UsageError:
        raise
    except TypeError as error:
        raise ConfigError(f"video_frames: '{reward}': {error}.") from error
