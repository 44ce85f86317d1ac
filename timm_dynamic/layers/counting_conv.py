"""The step counter of models with a schedule."""

import torch
from torch import Tensor, nn


class CountingConv2d(nn.Conv2d):
    """A model's first convolution, which also counts the training forwards, in the buffer `step`.

    The first convolution runs once in every forward pass: also under a feature extractor, which never calls the model's
    own `forward`, and under gradient checkpointing, which runs blocks twice.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=self.weight.device))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "CountingConv2d":
        """The same convolution, with its parameters, that counts.

        Args:
            conv: A convolution with `nn.Conv2d`'s own forward.

        Raises:
            ValueError: If it has another one.
        """
        if type(conv).forward is not nn.Conv2d.forward:
            raise ValueError(f"the first convolution must be a plain nn.Conv2d to count steps, got {type(conv)}")
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        dd = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        counting = cls(*(getattr(conv, name) for name in names), conv.bias is not None, conv.padding_mode, **dd)
        counting.weight, counting.bias = conv.weight, conv.bias
        return counting.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.step.add_(1)
        return self._conv_forward(x, self.weight, self.bias)
