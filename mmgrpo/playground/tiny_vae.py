"""An autoencoder that copies: gray pixels in, the same numbers as latents, and back.

An 8x16 canvas has only 128 numbers, so there is nothing to compress; yet a latent diffusion
pipeline needs an ``AutoencoderKL``. This one is set by hand rather than trained, so that what a
reward sees is exactly what the transformer drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

# Two channels held at plus and minus this value fix the variance that group normalisation divides
# by, so that the picture's own contrast (at most 1) survives it with a relative error below 1e-4.
_ANCHOR = 100.0
# SiLU(x) differs from x by less than 1e-7 beyond this value; signals are moved there and back.
_LINEAR_RANGE = 20.0
_MIN_LOG_VARIANCE = -30.0


def plain_autoencoder(widths: Sequence[int], **sizes: Any) -> AutoencoderKL:
    """Builds an untrained ``AutoencoderKL`` of the least parts: one layer a block, no attention.

    Args:
        widths: Channels of each block; every one but the last halves the resolution.
        sizes: Other arguments of ``AutoencoderKL``.
    """
    return AutoencoderKL(
        **{
            "block_out_channels": tuple(widths),
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths),
            "layers_per_block": 1,
            "norm_num_groups": 1,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            **sizes,
        }
    )


def copying_vae(scaling_factor: float = 1.0, shift_factor: float = 0.0) -> AutoencoderKL:
    """Builds an ``AutoencoderKL`` with one latent channel that equals the gray picture.

    RGB input is averaged over its channels; decoding writes the latent to all three. Resolution is
    kept, so a latent has the height and width of its picture.

    Args:
        scaling_factor: Stored for the pipeline, which decodes ``latents / scaling_factor + shift``.
        shift_factor: Stored for the pipeline, see above.

    Returns:
        The autoencoder, frozen and in evaluation mode.
    """
    vae = plain_autoencoder(
        (4,),
        latent_channels=1,
        sample_size=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )
    with torch.no_grad():
        for parameter in _residual_outputs(vae):
            parameter.zero_()
        for half, gains in ((vae.encoder, (1 / 3, 1 / 3, 1 / 3)), (vae.decoder, (1.0,))):
            _read_signal(half.conv_in, gains)
            _undo_norm(half.conv_norm_out)
        _write_signal(vae.encoder.conv_out, channels=1)
        vae.encoder.conv_out.bias[1] = _MIN_LOG_VARIANCE
        _write_signal(vae.decoder.conv_out, channels=3)
    return vae.requires_grad_(False).eval()


def _residual_outputs(vae: AutoencoderKL) -> list[nn.Parameter]:
    """Lists the last weights of every residual block, which is the identity once they are 0."""
    return [weight for name, weight in vae.named_parameters() if ".conv2." in name]


def _read_signal(conv: nn.Conv2d, gains: tuple[float, ...]) -> None:
    """Sets a convolution to output (signal, -signal, anchor, -anchor), whose mean is always 0."""
    conv.weight.zero_()
    centre = torch.tensor(gains)
    conv.weight[0, :, 1, 1] = centre
    conv.weight[1, :, 1, 1] = -centre
    conv.get_parameter("bias").copy_(torch.tensor([0.0, 0.0, _ANCHOR, -_ANCHOR]))


def _undo_norm(norm: nn.GroupNorm) -> None:
    """Multiplies by the anchors' standard deviation and moves into SiLU's linear range."""
    norm.weight.fill_(_ANCHOR / 2**0.5)
    norm.bias.fill_(_LINEAR_RANGE)


def _write_signal(conv: nn.Conv2d, channels: int) -> None:
    """Sets a convolution to read (signal, -signal) back into its first ``channels`` outputs."""
    conv.weight.zero_()
    conv.get_parameter("bias").zero_()
    conv.weight[:channels, 0, 1, 1] = 0.5
    conv.weight[:channels, 1, 1, 1] = -0.5
