"""Rewards that come with the package, one file each: import them as ``mmgrpo.rewards.<name>``.

To add one, write ``rewards/<name>.py`` and add its line to ``REWARDS``. A reward has TRL's
signature::

    def reward(prompts, completions, **columns) -> list[float | None]

with ``images`` in place of ``completions`` for image generators and ``videos`` (lists of frames)
for video generators. It may be ``async``, or a class whose instances are called. Parameters without
a default (beside the sample's own: ``prompts``, ``completions``, ``images``, ``videos``,
``lengths``, ``truncated``, ``self_answers``) are columns the data must have; keyword-only
parameters with a default, and the parameters of a class, are options of the run's configuration.
``None`` means that the reward does not apply to the sample. What the model wrote scores a
documented value even when it cannot be parsed; a reward that cannot do its own work (an unreadable
reference answer, a missing file) raises, and is never counted as 0.
"""

if __name__ == "rewards":
    raise ModuleNotFoundError("import this package as `mmgrpo.rewards`, not as `rewards`")

REWARDS: dict[str, str] = {
    "classifier_score": "mmgrpo.rewards.classifier_score:ClassifierScore",
    "exact_answer": "mmgrpo.rewards.exact_answer:exact_answer",
    "image_aesthetic": "mmgrpo.rewards.image_aesthetic:ImageAesthetic",
    "image_clip": "mmgrpo.rewards.image_clip:ImageClip",
    "image_geneval": "mmgrpo.rewards.image_geneval:ImageGeneval",
    "image_hps": "mmgrpo.rewards.image_hps:ImageHps",
    "image_jpeg": "mmgrpo.rewards.image_jpeg:ImageJpeg",
    "image_judge": "mmgrpo.rewards.image_judge:ImageJudge",
    "image_ocr": "mmgrpo.rewards.image_ocr:ImageOcr",
    "image_pickscore": "mmgrpo.rewards.image_pickscore:ImagePickscore",
    "image_reward": "mmgrpo.rewards.image_reward:ImageReward",
    "image_shapes": "mmgrpo.rewards.image_shapes:ImageShapes",
    "image_templates": "mmgrpo.rewards.image_templates:ImageTemplates",
    "image_win_rate": "mmgrpo.rewards.image_win_rate:ImageWinRate",
    "length_penalty": "mmgrpo.rewards.length_penalty:LengthPenalty",
    "mask_tokens": "mmgrpo.rewards.mask_tokens:MaskTokens",
    "math_answer": "mmgrpo.rewards.math_answer:math_answer",
    "multiple_choice": "mmgrpo.rewards.multiple_choice:multiple_choice",
    "numeric_tolerance": "mmgrpo.rewards.numeric_tolerance:numeric_tolerance",
    "self_answer": "mmgrpo.rewards.self_answer:self_answer",
    "tag_format": "mmgrpo.rewards.tag_format:tag_format",
    "video_digits_motion": "mmgrpo.rewards.video_digits_motion:VideoDigitsMotion",
    "video_frames": "mmgrpo.rewards.video_frames:VideoFrames",
    "video_judge": "mmgrpo.rewards.video_judge:VideoJudge",
    "video_motion": "mmgrpo.rewards.video_motion:VideoMotion",
}
"""Reward name -> ``"module:function or class"``."""
