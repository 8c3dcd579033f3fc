"""A video autoencoder that copies: gray pixels in, the same numbers as latents, and back.

The counterpart of ``tiny_vae`` for clips: an ``AutoencoderKLWan`` set by hand rather than trained,
so that what a reward sees is exactly what the transformer drew. It keeps the size and the number of
frames; its class encodes 4 k + 1 of them, and decodes any number.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import nn

# Two channels held at plus and minus this value fix the length that the norm divides by, so that
# the picture's own contrast (at most 1) survives it with a relative error below 1e-4.
_ANCHOR = 100.0
_MIN_LOG_VARIANCE = -30.0
# A causal convolution sees two earlier frames; its last slice is the present one.
_NOW, _CENTRE = 2, 1


def copying_video_vae(mean: float = 0.0, std: float = 1.0) -> AutoencoderKLWan:
    """Builds an ``AutoencoderKLWan`` with one latent channel that equals the gray clip.

    RGB input is averaged over its channels; decoding writes the latent to all three. The gap
    between SiLU of a number and SiLU of its negative is the number itself, so carrying both through
    the network loses nothing.

    Args:
        mean: Stored for the pipeline, which decodes ``latents * std + mean``.
        std: Stored for the pipeline, see above.

    Returns:
        The autoencoder, frozen and in evaluation mode.
    """
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=1,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        latents_mean=[mean],
        latents_std=[std],
        scale_factor_temporal=1,
        scale_factor_spatial=1,
    )
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if ".conv2." in name or ".proj." in name:  # the rest of these blocks is the identity
                weight.zero_()
        for half, gains in ((vae.encoder, (1 / 3, 1 / 3, 1 / 3)), (vae.decoder, (1.0,))):
            _read_signal(half.conv_in, gains)
            half.norm_out.gamma.fill_(_ANCHOR / 2**0.5)
        _write_signal(vae.encoder.conv_out, channels=1)
        vae.encoder.conv_out.bias[1] = _MIN_LOG_VARIANCE
        _write_signal(vae.decoder.conv_out, channels=3)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None, None])
            conv.bias.zero_()
    return vae.requires_grad_(False).eval()


def _read_signal(conv: nn.Conv3d, gains: tuple[float, ...]) -> None:
    """Sets a convolution to output (signal, -signal, anchor, -anchor)."""
    conv.weight.zero_()
    centre = torch.tensor(gains)
    conv.weight[0, :, _NOW, _CENTRE, _CENTRE] = centre
    conv.weight[1, :, _NOW, _CENTRE, _CENTRE] = -centre
    conv.get_parameter("bias").copy_(torch.tensor([0.0, 0.0, _ANCHOR, -_ANCHOR]))


def _write_signal(conv: nn.Conv3d, channels: int) -> None:
    """Sets a convolution to read the signal back into its first ``channels`` outputs."""
    conv.weight.zero_()
    conv.get_parameter("bias").zero_()
    conv.weight[:channels, 0, _NOW, _CENTRE, _CENTRE] = 1.0
    conv.weight[:channels, 1, _NOW, _CENTRE, _CENTRE] = -1.0
