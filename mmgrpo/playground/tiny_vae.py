"""An autoencoder that copies: pixels in, the same numbers as latents, and back.

An 8x16 canvas has only 128 numbers, so there is nothing to compress; yet a latent diffusion
pipeline needs an ``AutoencoderKL``. This one is set by hand rather than trained, so that what a
reward sees is exactly what the transformer drew.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import nn

# Two channels held at plus and minus this value fix the variance that group normalisation divides
# by, so that the picture's own contrast (at most 1) survives it with a relative error below 1e-4.
_ANCHOR = 100.0
# SiLU(x) differs from x by less than 1e-7 beyond this value; signals are moved there and back.
_LINEAR_RANGE = 20.0
_MIN_LOG_VARIANCE = -30.0


def copying_vae(
    scaling_factor: float = 1.0, shift_factor: float = 0.0, channels: int = 1
) -> AutoencoderKL:
    """Builds an ``AutoencoderKL`` whose latents equal the picture.

    With one latent channel, RGB input is averaged over its channels, and decoding writes the latent
    to all three; with three, each channel is copied. Resolution is kept, so a latent has the height
    and width of its picture.

    Args:
        scaling_factor: Stored for the pipeline, which decodes ``latents / scaling_factor + shift``.
        shift_factor: Stored for the pipeline, see above.
        channels: Of the latents, 1 or 3.

    Returns:
        The autoencoder, frozen and in evaluation mode.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(2 * channels + 2,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=16,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    one = torch.eye(channels)
    with torch.no_grad():
        for parameter in _residual_outputs(vae):
            parameter.zero_()
        for half, gains in ((vae.encoder, one if channels == 3 else torch.full((1, 3), 1 / 3)),
                            (vae.decoder, one)):  # fmt: skip
            _read_signals(half.conv_in, gains)
            _undo_norm(half.conv_norm_out, 2 * channels + 2)
        _write_signals(vae.encoder.conv_out, one)
        vae.encoder.conv_out.bias[channels:] = _MIN_LOG_VARIANCE
        _write_signals(vae.decoder.conv_out, one if channels == 3 else torch.ones(3, 1))
    return vae.requires_grad_(False).eval()


def _residual_outputs(vae: AutoencoderKL) -> list[nn.Parameter]:
    """Lists the last weights of every residual block, which is the identity once they are 0."""
    return [weight for name, weight in vae.named_parameters() if ".conv2." in name]


def _read_signals(conv: nn.Conv2d, gains: torch.Tensor) -> None:
    """Sets a convolution to output signals, their negatives, anchor and -anchor: their mean is 0.

    Args:
        conv: The convolution.
        gains: ``[signals, inputs]``.
    """
    signals = len(gains)
    conv.weight.zero_()
    conv.weight[:signals, :, 1, 1] = gains
    conv.weight[signals : 2 * signals, :, 1, 1] = -gains
    bias = conv.get_parameter("bias").zero_()
    bias[-2:] = torch.tensor([_ANCHOR, -_ANCHOR])


def _undo_norm(norm: nn.GroupNorm, channels: int) -> None:
    """Multiplies by the anchors' standard deviation and moves into SiLU's linear range."""
    norm.weight.fill_(_ANCHOR / (channels / 2) ** 0.5)
    norm.bias.fill_(_LINEAR_RANGE)


def _write_signals(conv: nn.Conv2d, gains: torch.Tensor) -> None:
    """Sets a convolution to read the signals back into its first outputs.

    Args:
        conv: The convolution.
        gains: ``[outputs, signals]``.
    """
    outputs, signals = gains.shape
    conv.weight.zero_()
    conv.get_parameter("bias").zero_()
    conv.weight[:outputs, :signals, 1, 1] = gains / 2
    conv.weight[:outputs, signals : 2 * signals, 1, 1] = -gains / 2
