"""Inference of a whole network as one CUDA graph, its masks included."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timm_dynamic.dispatch import has_hooks
from timm_dynamic.layers import SparseBranch
from timm_dynamic.ops import backend_info
from timm_dynamic.ops.sparse.capacity import Capacities, has_kernels

_WARM_UPS = 3


class CudaGraph:
    """What a model launches for inputs of one shape, captured once to be launched again.

    In a graph every size is fixed. So a block with a mask computes as many positions as it has room for, and one with
    `execution="auto"` runs everywhere if that is more than its `max_active`. Every call reads once what the masks would
    have needed; where that is more, the model runs again, block by block, and the result is right but late.

    A call copies its input into the graph's, and its result out of it. Autocast is as it was at the capture. Calls from
    several streams or threads run one after the other. A copy captures at its first call.

    Args:
        share: Room for this share of the positions of every convolution in a masked branch, 0 to 1; None: for what the
            first input needs, and some more. In that case the graph is captured anew, with more room, after every call
            that had too little.

    Attributes:
        overflows: The number of calls that had too little room.
    """

    def __init__(self, share: float | None = None):
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise ValueError(f"share must be between 0 and 1, or None, got {share!r}")
        self.share = share
        self.__setstate__(share)

    def __getstate__(self) -> float | None:
        return self.share

    def __setstate__(self, share: float | None) -> None:
        self.share, self.overflows, self._lock = share, 0, threading.Lock()
        self.drop()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.share,)

    def drop(self) -> None:
        """Forget what was captured: the next call captures again, whatever its shape."""
        self._input = self._graph = self._output = self._counts = None

    def run(self, forward: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> Tensor:
        """The output of `forward`, which runs the model.

        Raises:
            ValueError: If x is another than the graph's, there is no CUDA device, the model has hooks inside or gives
                no tensor, or it has masks and there are no CUDA kernels for x.
        """
        with self._lock:
            first = self._input
            if first is None:
                problem = _problem_with(model, x)
                if problem is not None:
                    raise ValueError(problem)
                self._autocast = torch.get_autocast_dtype(x.device.type), torch.is_autocast_enabled(x.device.type)
                with torch.inference_mode(False):
                    first = self._input = x.clone()
                self._graph = _Graph(x.device)
            if (x.shape, x.dtype, x.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"the graph was captured for {list(first.shape)}, {first.dtype}, {first.device}; "
                    f"got {list(x.shape)}, {x.dtype}, {x.device}: optimize the model for these, too"
                )
            with torch.inference_mode(False), torch.no_grad(), self._graph.in_order():
                first.copy_(x)
                if not self._graph.replay():  # there is none yet, or the last capture failed
                    return self._capture(forward, model)
                if self._capacities.suffice(self._counts):
                    return self._output.clone()
                self.overflows += 1
                exact = Capacities(exact=True)
                return self._capture(forward, model) if self.share is None else self._run(forward, exact)

    def _run(self, forward: Callable[[Tensor], Tensor], capacities: Capacities) -> Tensor:
        dtype, enabled = self._autocast
        # What autocast keeps does not live as long as the graph.
        with capacities, torch.autocast(self._input.device.type, dtype, enabled, cache_enabled=False):
            return forward(self._input)

    def _capture(self, forward: Callable[[Tensor], Tensor], model: nn.Module) -> Tensor:
        """Gives the output for the input that is there."""
        self._graph.drop()
        self._output = self._counts = None
        if any(has_hooks(module) for module in model.modules() if module is not model):
            raise ValueError("a CUDA graph calls no hooks, and the model has some inside: remove them first")
        y = self._run(forward, Capacities(exact=True))  # after which every block has seen masks
        if not isinstance(y, Tensor):
            raise ValueError(f"the model must give one tensor, got {type(y).__name__}")

        def launch() -> None:
            self._capacities = Capacities(self.share)
            self._output = self._run(forward, self._capacities)
            self._counts = self._capacities.counts()

        self._graph.capture(launch)
        return y


class _Graph:
    """What a function launches, captured to be launched again."""

    def __init__(self, device: torch.device):
        self._device, self._graph = device, None
        # Not shared: graphs of one stream share cuBLAS's workspace, which the end of one of them may free.
        self._stream, self._done = torch.cuda.Stream(device), torch.cuda.Event()

    def drop(self) -> None:
        self._graph = None

    def capture(self, forward: Callable[[], None]) -> None:
        """After the function has warmed up."""
        with torch.cuda.device(self._device):
            graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._stream.wait_stream(main)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    forward()
            main.wait_stream(self._stream)
            # Meanwhile other threads, such as a loader's, may allocate memory.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                forward()
        self._graph = graph

    def replay(self) -> bool:
        """Whether there was something to launch."""
        if self._graph is not None:
            self._graph.replay()
        return self._graph is not None

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """What is launched here waits for what was launched so before, on whichever stream."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)


def _problem_with(model: nn.Module, x: Tensor) -> str | None:
    """Why there can be no graph for this input."""
    if x.device.type != "cuda":
        return f"a CUDA graph needs model and input on a CUDA device, got an input on {x.device}"
    if not has_kernels(x) and any(_is_sparse(module) for module in model.modules()):
        return (
            "a graph of a model with masks needs the CUDA kernels, for float32, float16 or bfloat16; "
            f"got {x.dtype}, kernels {backend_info()['cuda']}"
        )
    return None


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, SparseBranch) and module.execution == "sparse"
