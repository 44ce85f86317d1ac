"""Inference of a whole network as one CUDA graph, its masks included."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from timm_dynamic.layers import SparseBranch, capacity
from timm_dynamic.layers.capacity import Capacities
from timm_dynamic.layers.folding import KeepsFolded, Watch, kept_for
from timm_dynamic.ops import backend_info

_WARM_UPS = 3


class CudaGraph:
    """A model in eval mode, captured for inputs of one shape; calling it is one launch, without gradients.

        model = timm.create_model("dynconv_resnet50").eval().cuda()
        x = torch.randn(1, 3, 224, 224, device="cuda")
        graph = timm_dynamic.CudaGraph(model, x)
        y = graph(x)  # as model(x), for any x of that shape
        graph.overflows  # how many calls had masks that there was no room for

    In a graph every size is fixed. So a block with a mask computes as many positions as it has room for, and one with
    `execution="auto"` runs everywhere if that is more than its `max_active`. Every call reads once what the masks would
    have needed; where that is more, the model runs again, block by block, and the result is right but late.

    A call copies its input into the graph's, and its result out of it. Autocast is as it was at construction. If
    parameters, buffers or modules change, the next call captures anew. Calls from several streams run one after the
    other; several threads need a lock.

    Args:
        model: In eval mode and without hooks inside; it gives one tensor. It need not have masks.
        x: An input like those to come: shape, dtype, device.
        share: Room for this share of the positions of every convolution in a masked branch, 0 to 1; None: for what `x`
            needs, and some more. In that case the graph is captured anew, with more room, after every call that had
            too little.

    Attributes:
        overflows: The number of calls that had too little room.

    Raises:
        ValueError: If the model, `x` or `share` is not like that, there is no CUDA device, or the model has masks and
            there are no CUDA kernels for `x`.
    """

    def __init__(self, model: nn.Module, x: Tensor, share: float | None = None):
        problem = _problem_with(model, x)
        if problem is not None:
            raise ValueError(problem)
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise ValueError(f"share must be between 0 and 1, or None, got {share!r}")
        self.model, self.share, self.overflows = model, share, 0
        device = x.device.type
        self._autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.inference_mode(False), torch.no_grad():
            self._input, self._graph = x.clone(), _Graph(x.device)
            with self._graph.in_order():
                self._capture()

    def __call__(self, x: Tensor) -> Tensor:
        own = self._input
        if (x.shape, x.dtype, x.device) != (own.shape, own.dtype, own.device):
            raise ValueError(
                f"the graph was captured for {list(own.shape)}, {own.dtype}, {own.device}; got {list(x.shape)}, "
                f"{x.dtype}, {x.device}: make another CudaGraph for these"
            )
        with torch.inference_mode(False), torch.no_grad(), self._graph.in_order():
            own.copy_(x)
            if not self._graph.replay():  # the last capture failed
                return self._capture()
            if self._has_changed():  # asked while the device is busy
                return self._capture()
            if self._capacities.suffice(self._counts):
                return self._output.clone()
            self.overflows += 1
            return self._capture() if self.share is None else self._run(Capacities(exact=True))

    def _run(self, capacities: Capacities) -> Tensor:
        dtype, enabled = self._autocast
        # What autocast keeps does not live as long as the graph.
        with capacities, torch.autocast(self._input.device.type, dtype, enabled, cache_enabled=False):
            return self.model(self._input)

    def _forward(self) -> None:
        self._capacities = Capacities(self.share)
        self._output = self._run(self._capacities)
        self._counts = self._capacities.counts()

    def _capture(self) -> Tensor:
        """Gives the output for the input that is there."""
        self._graph.drop()
        self._output = self._counts = None
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        if capacity.any_hooks(self.model):
            raise ValueError("a CUDA graph calls no hooks, and the model has some inside: remove them first")
        y = self._run(Capacities(exact=True))  # after which every block has seen masks
        if not isinstance(y, Tensor):
            raise ValueError(f"the model must give one tensor, got {type(y).__name__}")
        self._graph.capture(self._forward)
        self._watch = Watch(self.model.modules())
        # The graph reads these, whoever else lets go of them.
        self._tensors = [(one, one.detach()) for one in (*self.model.parameters(), *self.model.buffers())]
        self._kept = [(one, kept_for(one)) for one in self.model.modules() if isinstance(one, KeepsFolded)]
        return y

    def _has_changed(self) -> bool:
        moved = any(one.data_ptr() != before.data_ptr() for one, before in self._tensors)
        return moved or any(kept_for(one) is not before for one, before in self._kept) or self._watch.sees_change()


class _Graph:
    """What a function launches, captured to be launched again."""

    def __init__(self, device: torch.device):
        self._device, self._graph = device, None
        # Its own: graphs of one stream share cuBLAS's workspace, which the end of one of them may free.
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
    if any(isinstance(module, SparseBranch) for module in model.modules()) and not capacity.serves(x):
        return (
            "a graph of a model with masks needs the CUDA kernels, for float32, float16 or bfloat16; "
            f"got {x.dtype}, kernels {backend_info()['cuda']}"
        )
    return None
