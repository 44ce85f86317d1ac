"""Upsampling by reassembly (Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, arXiv 1905.02188).

Parameters are named as in mmcv's `CARAFEPack`, so that the weights of detectors load as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.layers.base import check_positive
from timm_dynamic.layers.filter_norm import check_maps
from timm_dynamic.ops import dynamic_filter


class CARAFE(nn.Module):
    """Every output pixel is a weighted mean of the K x K inputs around its source, with weights made from the input.

    `[B, C, H, W]` becomes `[B, C, scale_factor*H, scale_factor*W]` (section 3 of the paper). The weights are a softmax
    over the taps, taken in float32 at least; taps outside of the map count zero and their weights are not shared out.

    Args:
        channels: C.
        scale_factor: Integer factor.
        up_kernel: K, odd.
        up_group: Cut the channels into this many blocks, each with its weights.
        encoder_kernel: Of the convolution that makes the weights, odd.
        encoder_dilation: Of the same.
        compressed_channels: Of its input.

    Raises:
        ValueError: If an argument, or the input of the forward pass, has an unusable value.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_positive(channels=channels, scale_factor=scale_factor, up_group=up_group)
        check_positive(encoder_dilation=encoder_dilation, compressed_channels=compressed_channels)
        for name, value in (("up_kernel", up_kernel), ("encoder_kernel", encoder_kernel)):
            if value < 1 or value % 2 == 0:
                raise ValueError(f"{name} must be odd and positive, got {value}")
        if channels % up_group:
            raise ValueError(f"up_group must divide the {channels} channels, got {up_group}")
        self.channels, self.scale_factor = channels, scale_factor
        self.up_kernel, self.up_group = up_kernel, up_group
        dd = {"device": device, "dtype": dtype}
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1, **dd)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_group * up_kernel**2 * scale_factor**2,
            encoder_kernel,
            padding=encoder_dilation * (encoder_kernel // 2),
            dilation=encoder_dilation,
            **dd,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: at first nearly the mean over the taps."""
        nn.init.xavier_uniform_(self.channel_compressor.weight)
        nn.init.normal_(self.content_encoder.weight, std=0.001)
        nn.init.zeros_(self.channel_compressor.bias)
        nn.init.zeros_(self.content_encoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_maps("x", x, self.channels)
        scores = F.pixel_shuffle(self.content_encoder(self.channel_compressor(x)), self.scale_factor)
        B, _, H, W = scores.shape
        scores = scores.reshape(B, self.up_group, self.up_kernel**2, H, W)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(2)
        return dynamic_filter(x, weights.to(x.dtype), self.up_kernel, upsample=self.scale_factor)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, scale_factor={self.scale_factor}, up_kernel={self.up_kernel}, up_group={self.up_group}"
        )
