"""A layer with a table of rows that are right, wrong, slow or fatal, and functions for processes of their own."""

import os
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dynamic.layers.base import DynamicLayer
from timm_dynamic.ops.implementation import Implementation


def _right(layer, x: Tensor) -> Tensor:
    return F.conv2d(x, 2 * layer.conv.weight)


def _wrong(layer, x: Tensor) -> Tensor:
    return F.conv2d(x, 2.001 * layer.conv.weight)


def _too_small(layer, x: Tensor) -> str | None:
    return "maps of one position" if x.shape[2] == 1 else None


def _too_few(layer, x: Tensor) -> str | None:
    return "one sample is faster by the formula" if len(x) == 1 else None


class Doubled(DynamicLayer):
    """`2 * conv(x)`."""

    family = "doubled"
    parts = ((nn.Conv2d, "conv"),)
    implementations = (
        Implementation("on a GPU", _right, devices=("cuda",)),
        Implementation("here", _right, cannot=_too_small, pays=_too_few),
        Implementation("training", _right, dtypes=(torch.float32, torch.float64), gradients=True),
        Implementation("second", _right),
    )

    def __init__(self):
        super().__init__()
        self.in_channels = 4
        self.conv = nn.Conv2d(4, 4, 1, bias=False)

    def formula(self, x: Tensor) -> Tensor:
        return 2 * self.conv(x)


class WrongForwards(Doubled):
    implementations = (Implementation("wrong", _wrong),)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, 2 * weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return torch.nn.grad.conv2d_input(x.shape, 2 * weight, grad), torch.zeros_like(weight)


class WrongBackwards(Doubled):
    implementations = (
        Implementation("wrong", lambda layer, x: _WrongGradient.apply(x, layer.conv.weight), gradients=True),
    )


def network(layer: type[DynamicLayer]) -> nn.Module:
    net = nn.Sequential(layer())
    net.pretrained_cfg = {"input_size": (4, 6, 6)}
    return net


def answer(value):
    return 2 * value


def fails():
    raise RuntimeError("an illegal memory access\nwas met")


def crashes():
    os.kill(os.getpid(), 11)


def hangs():
    time.sleep(600)
