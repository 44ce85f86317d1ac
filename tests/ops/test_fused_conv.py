"""The CUDA kernels of fused convolutions, run on the CPU, against float64, and where the public operators use them."""

import cuda_on_host
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from timm_dynamic.ops import factored_conv2d, fused_conv, mixed_conv2d

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
CASES = {
    # B, C, Co, kernel, H, W, stride, padding, dilation, N, dtype, seed
    "7x7, several samples a block": (5, 24, 40, (3, 3), 7, 7, (1, 1), (1, 1), (1, 1), 4, torch.bfloat16, 0),
    "14x14, one sample a block": (2, 16, 72, (3, 3), 14, 14, (1, 1), (1, 1), (1, 1), 4, torch.float16, 1),
    "two groups of rows": (3, 8, 8, (3, 3), 11, 11, (1, 1), (1, 1), (1, 1), 5, torch.bfloat16, 2),
    "groups of a sample in two blocks": (2, 8, 16, (3, 3), 17, 17, (1, 1), (1, 1), (1, 1), 1, torch.bfloat16, 3),
    "one pixel": (6, 40, 24, (3, 3), 1, 1, (1, 1), (1, 1), (1, 1), 4, torch.float16, 4),
    "one sample": (1, 72, 8, (3, 3), 5, 9, (1, 1), (1, 1), (1, 1), 8, torch.bfloat16, 5),
    "stride 2, odd": (3, 24, 16, (3, 3), 15, 13, (2, 2), (1, 1), (1, 1), 4, torch.float16, 6),
    "stride 2, even": (2, 16, 24, (3, 3), 14, 16, (2, 2), (1, 1), (1, 1), 3, torch.bfloat16, 7),
    "1x1, stride 2": (3, 16, 136, (1, 1), 9, 7, (2, 2), (0, 0), (1, 1), 2, torch.bfloat16, 8),
    "dilation 2": (2, 8, 40, (3, 3), 9, 8, (1, 1), (2, 2), (2, 2), 4, torch.float16, 9),
    "oblong": (2, 24, 8, (5, 2), 12, 9, (3, 1), (4, 0), (1, 3), 6, torch.float16, 10),
    "inputs that nothing reads": (2, 8, 8, (2, 2), 11, 19, (5, 7), (0, 0), (1, 1), 4, torch.bfloat16, 11),
    "much padding": (2, 8, 8, (1, 3), 3, 3, (1, 1), (4, 5), (1, 1), 4, torch.float16, 12),
    "many channels": (2, 136, 152, (1, 2), 4, 5, (1, 1), (0, 0), (1, 1), 4, torch.bfloat16, 13),
}
NAMES = ("fused_mixed_conv", "fused_mixed_conv_gradients", "fused_gated_conv", "fused_gated_conv_gradients")
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Case:
    """Tensors of a convolution; `options` are its kernel size, stride, padding and dilation."""

    def __init__(self, B, C, Co, kernel, H, W, stride, padding, dilation, N, dtype, seed):
        torch.manual_seed(seed)
        self.N, self.dtype, self.seed, self.options = N, dtype, seed, (kernel, stride, padding, dilation)
        self.size = fused_conv.output_size((H, W), *self.options)
        taps = kernel[0] * kernel[1]
        self.x, self.grad = (self.map(B, C, H, W), self.map(B, Co, *self.size))
        self.attention, self.kernels = torch.randn(B, N), torch.randn(N, taps, Co, C)
        self.pairs, self.gates = torch.rand(B, taps, C), torch.rand(B, Co)

    def map(self, *shape):
        return torch.randn(shape).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def calls(self):
        """The operators' names and arguments."""
        kernels, one = self.kernels, self.kernels[:1].contiguous()
        forward, back = (self.size, *self.options, False), (self.x.shape[2:], *self.options, True)
        pairs_back, gates_back = self.gates[:, None].expand(-1, one.shape[1], -1).contiguous(), self.pairs[:, 0]
        return [
            ("fused_mixed_conv", (self.x, self.attention, kernels, *forward)),
            ("fused_mixed_conv", (self.grad, self.attention, kernels.mT.contiguous(), *back)),
            ("fused_mixed_conv_gradients", (self.grad, self.x, self.attention, kernels, *self.options)),
            ("fused_gated_conv", (self.x, self.pairs, self.gates, one, *forward)),
            ("fused_gated_conv", (self.grad, pairs_back, gates_back.contiguous(), one.mT.contiguous(), *back)),
            ("fused_gated_conv_gradients", (self.grad, self.x, self.pairs, self.gates, one, *self.options)),
        ]


def reference(name, arguments):
    wide = (a.double() if isinstance(a, torch.Tensor) else a for a in arguments)
    results = getattr(fused_conv, f"{name}_reference")(*wide)
    return results if isinstance(results, tuple) else (results,)


def check(results, expected, dtype):
    """Maps are rounded once, as are the weights; sums of exact products are in float32."""
    results = results if isinstance(results, tuple) else (results,)
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.shape == wanted.shape and not actual.isnan().any()
        is_map = actual.dtype == dtype
        assert is_map or actual.dtype == torch.float32
        if is_map:
            assert actual.is_contiguous(memory_format=torch.channels_last)
        tolerance = (TOLERANCE[dtype] if is_map else 1e-5) * wanted.abs().max().item()
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance)


operators = cuda_on_host.operators("fused_conv")


@cuda_on_host.needs_compiler
class TestKernels:
    """Out-of-bounds and misaligned accesses, and threads that do not meet, are errors of the emulation."""

    @cases
    def test_against_float64(self, operators, case):
        case = Case(*case)
        for name, arguments in case.calls():
            # As many parts of the batch as there may be: three samples on as many processors as have work.
            results = getattr(operators, name)(*arguments, seed=case.seed, processors=8 + 16 * (case.seed % 3))
            check(results, reference(name, arguments), case.dtype)

    def test_any_order_of_threads_gives_the_same_bits(self, operators):
        for name, arguments in Case(*CASES["stride 2, odd"]).calls():
            first, *others = (getattr(operators, name)(*arguments, seed=seed) for seed in (0, 1, 20, 21))
            for other in others:
                pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (first, other)), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)

    def test_weights_are_rounded_once(self, operators):
        """Kernels that bfloat16 could not hold, but whose mixture it does."""
        x = torch.ones(2, 8, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        kernels = torch.stack([torch.full((1, 8, 8), 1 + 2**-12), torch.full((1, 8, 8), 1 - 2**-12)])
        attention = torch.tensor([[0.5, 0.5], [2.0, -2.0]])
        out = operators.fused_mixed_conv(x, attention, kernels, (3, 3), (1, 1), (1, 1), (0, 0), (1, 1), False)
        assert (out[0] == 8).all() and (out[1] == 8 * 2**-10).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": lambda t: t.contiguous()}, "x must be .* channels_last"),
            ({"x": lambda t: t.float()}, "x must be .* float16 or bfloat16"),
            ({"x": lambda t: t[:, :12]}, "x must be .* multiple of 8"),
            ({"x": lambda t: t[:0]}, "x must be .* not empty"),
            (
                {"x": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].as_strided(t.shape, t.stride())},
                "16 bytes",
            ),
            ({"attention": lambda t: t[:, :2]}, r"attention must be \[5, 4\]"),
            ({"kernels": lambda t: t[:, :8]}, r"kernels must be \[4, 9, 40, 24\]"),
            ({"kernels": lambda t: t.repeat(3, 1, 1, 1)}, r"N in \[1, 8\]"),
            ({"kernels": lambda t: t.double()}, "kernels must be .* float32"),
            ({"size": lambda s: (8, 7)}, "no convolution with these options takes 7x7 to 8x7"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_bad_arguments_are_refused(self, operators, change, message):
        name, arguments = Case(*CASES["7x7, several samples a block"]).calls()[0]
        arguments = dict(zip(("x", "attention", "kernels", "size"), arguments[:4], strict=True)), arguments[4:]
        for key, function in change.items():
            arguments[0][key] = function(arguments[0][key])
        with pytest.raises(RuntimeError, match=message):
            getattr(operators, name)(*arguments[0].values(), *arguments[1])


@pytest.mark.parametrize("index", range(6))
def test_registration(index):
    name, arguments = Case(*CASES["stride 2, odd"]).calls()[index]
    operator = getattr(torch.ops.timm_dynamic, name).default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


# Where the public operators use them.


@pytest.fixture
def anywhere(monkeypatch):
    """As if the CPU had the kernels: the references serve."""
    monkeypatch.setattr(fused_conv, "_has_tensor_cores", lambda device: True)


@pytest.fixture
def calls(anywhere, monkeypatch):
    """The names of the operators that are called."""
    calls = []

    def recorded(name, operator):
        return lambda *arguments: calls.append(name) or operator(*arguments)

    for name in NAMES:
        monkeypatch.setattr(torch.ops.timm_dynamic, name, recorded(name, getattr(torch.ops.timm_dynamic, name)))
    return calls


def test_where_they_serve(anywhere, monkeypatch):
    def serves(
        *shape, weight=(40, 24, 3, 3), dtype=torch.bfloat16, groups=1, layout=torch.channels_last, padding=1, dilation=1
    ):
        x = torch.empty(shape or (4, 24, 7, 7), dtype=dtype, device="meta").contiguous(memory_format=layout)
        options = (1, 1), (1, padding), (1, dilation), groups
        return fused_conv.serves(x, torch.empty(weight, device="meta"), *options)

    assert serves() and serves(dtype=torch.float16) and serves(weight=(3, 40, 24, 3, 3))
    assert not serves(dtype=torch.float32) and not serves(groups=2) and not serves(layout=torch.contiguous_format)
    assert not serves(4, 20, 7, 7) and not serves(weight=(20, 24, 3, 3)) and not serves(4, 24, 1, 2**14 + 1)
    assert not serves(padding=2**13) and not serves(padding=2**15, dilation=2**15)
    for name, value in (("ENABLED", False), ("_has_tensor_cores", lambda device: False)):
        with monkeypatch.context() as changed:
            changed.setattr(fused_conv, name, value)
            assert not serves()


def test_not_on_the_cpu():
    assert not fused_conv._has_tensor_cores(torch.device("cpu"))


KINDS = pytest.mark.parametrize("kind", ["mixed", "gated"])


def public(kind, B=9, C=24, Co=16, kernel=3, N=3, rank=1, groups=1, dtype=torch.bfloat16, size=(7, 6)):
    """`mixed_conv2d` or `factored_conv2d`, the tensors to call it with, and its options."""
    torch.manual_seed(0)
    x = torch.randn(B, C, *size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (Co, C // groups, kernel, kernel)
    if kind == "mixed":
        function, factors = mixed_conv2d, [torch.rand(B, N), torch.randn(N, *weight)]
    else:
        gates = [torch.rand(B, n, rank) for n in (C // groups, kernel * kernel, Co)]
        function, factors = factored_conv2d, [torch.randn(weight), *gates]
    return function, [x, *factors], ((2, 1), (kernel // 2,) * 2, (1, 1), groups)


def gradients(function, tensors, options):
    """The output, and gradients that do not add up."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors, *options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def check_public(kind, results, tensors, expected):
    dtype = tensors[0].dtype
    assert results[0].dtype == dtype and results[0].is_contiguous(memory_format=torch.channels_last)
    for actual, tensor, wanted in zip(results, [results[0], *tensors], expected, strict=True):
        assert actual.dtype == tensor.dtype and actual.shape == wanted.shape
        # All that goes back has been through the rounded weights or through the rounded gradient of the output.
        tolerance = 2 * TOLERANCE[dtype] * wanted.abs().max().item()
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance)


@KINDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradients(calls, kind, dtype):
    function, tensors, options = public(kind, dtype=dtype)
    results = gradients(function, tensors, options)
    assert calls == [f"fused_{kind}_conv"] * 2 + [f"fused_{kind}_conv_gradients"]
    check_public(kind, results, tensors, gradients(function, [t.double() for t in tensors], options))
    assert len(calls) == 3  # none in float64


@cuda_on_host.needs_compiler
@KINDS
def test_output_and_gradients_by_the_kernels(operators, calls, kind, monkeypatch):
    for name in NAMES:
        monkeypatch.setattr(torch.ops.timm_dynamic, name, getattr(operators, name))
    function, tensors, options = public(kind)
    results = gradients(function, tensors, options)
    check_public(kind, results, tensors, gradients(function, [t.double() for t in tensors], options))


@cuda_on_host.needs_compiler
def test_a_parameter_at_any_address(operators, calls, monkeypatch):
    """A 1x1 kernel is taken as it lies in memory."""
    for name in NAMES:
        monkeypatch.setattr(torch.ops.timm_dynamic, name, getattr(operators, name))
    function, tensors, options = public("gated", kernel=1)
    expected = gradients(function, tensors, options)
    weight = tensors[1]
    tensors[1] = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view(weight.shape)
    assert tensors[1].data_ptr() % 16 != 0
    for actual, wanted in zip(gradients(function, tensors, options), expected, strict=True):
        assert torch.equal(actual, wanted)


@KINDS
def test_weights_of_the_dtype_of_the_input(calls, kind):
    function, tensors, options = public(kind)
    tensors = [t.bfloat16() for t in tensors]
    results = gradients(function, tensors, options)
    assert len(calls) == 3
    check_public(kind, results, tensors, gradients(function, [t.double() for t in tensors], options))


@KINDS
def test_only_wanted_gradients(calls, kind):
    function, tensors, options = public(kind)
    expected = gradients(function, tensors, options)[1:]
    for i, wanted in enumerate(expected):
        calls.clear()
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        out = function(*leaves, *options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        out.backward(grad)
        assert torch.equal(leaves[i].grad, wanted)
        assert calls.count(f"fused_{kind}_conv") == 1 + (i == 0)


@KINDS
def test_any_gradient_and_any_address(anywhere, kind):
    """The gradient of a sum has strides of 0; the batch may be a part of another."""
    function, tensors, options = public(kind, C=8, Co=8)
    x = torch.cat([torch.zeros(1, dtype=tensors[0].dtype), tensors[0].permute(0, 2, 3, 1).flatten()])[1:]
    x = x.as_strided(tensors[0].shape, tensors[0].stride(), 1)
    assert x.data_ptr() % 16 != 0
    for t in (x, tensors[0]):
        leaf = t.detach().requires_grad_()
        out = function(leaf, *tensors[1:], *options)
        out.sum().backward()
        if t is x:
            expected = out, leaf.grad
    assert torch.equal(out, expected[0]) and torch.equal(leaf.grad, expected[1])


@KINDS
@pytest.mark.parametrize(
    "change",
    [{"groups": 2}, {"B": 7}, {"B": 0}, {"C": 20}, {"Co": 20}, {"N": 9, "rank": 2}, {"dtype": torch.float32}],
    ids=str,
)
def test_elsewhere_the_other_ways_serve(calls, kind, change):
    function, tensors, options = public(kind, **change)
    gradients(function, tensors, options)
    assert not calls


@pytest.mark.parametrize(("kind", "fused"), [("mixed", False), ("gated", True)])
def test_pointwise(calls, kind, fused):
    """Mixed weights of a 1x1 convolution are left to batched products of matrices."""
    gradients(*public(kind, kernel=1))
    assert bool(calls) == fused


def test_no_columns_are_kept(anywhere, monkeypatch):
    _, tensors, options = public("gated", Co=64)
    assert torch.ops.timm_dynamic.factored_conv2d(*tensors, *options)[1].numel() == 0
    monkeypatch.setattr(fused_conv, "ENABLED", False)
    assert torch.ops.timm_dynamic.factored_conv2d(*tensors, *options)[1].numel() > 0


@KINDS
def test_no_weights_of_samples_in_memory(anywhere, kind, monkeypatch):
    """Beside the operators, nothing is as large as they would be."""
    function, tensors, options = public(kind, B=12, size=(3, 2))
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal largest
            out = operator(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    def unseen(operator):
        def call(*arguments):
            with _disable_current_modes():  # what they do for the kernels
                return operator(*arguments)

        return call

    for name in NAMES:
        monkeypatch.setattr(torch.ops.timm_dynamic, name, unseen(getattr(torch.ops.timm_dynamic, name)))
    with Sizes():
        gradients(function, tensors, options)
    weight = tensors[-1] if kind == "mixed" else tensors[1]
    assert 0 < largest <= weight.numel()


@KINDS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("wanted", [True, False])
def test_registration_of_the_public_operators(anywhere, kind, layout, wanted):
    """Shapes and strides are what the compiler is told, whatever the weight's layout."""
    _, tensors, options = public(kind, Co=64)
    name = "mixed_conv2d" if kind == "mixed" else "factored_conv2d"
    if kind == "gated":
        tensors[1] = tensors[1].contiguous(memory_format=layout)
    forward, backward = (getattr(torch.ops.timm_dynamic, f"{name}{suffix}") for suffix in ("", "_backward"))
    grad = torch.randn(9, 64, 4, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    needs = ([True, wanted, True],) if kind == "mixed" else (torch.empty(0, dtype=torch.bfloat16), [True, wanted])
    arguments = (*needs[:-1], *options, needs[-1])
    for operator, given in ((forward, (*tensors, *options)), (backward, (grad, *tensors, *arguments))):
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


@KINDS
def test_compiled(anywhere, kind):
    """What the compiler is told about the operators holds with the kernels, too."""
    function, tensors, options = public(kind, Co=64)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(*(gradients(f, tensors, options) for f in (compiled, function)), strict=True):
        assert torch.equal(actual, expected)


@KINDS
def test_autocast(calls, kind):
    function, tensors, options = public(kind, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = gradients(function, tensors, options)
    assert len(calls) == 3 and results[0].dtype == torch.bfloat16
    for actual, wanted in zip(results, gradients(function, tensors, options), strict=True):
        torch.testing.assert_close(actual.float(), wanted, rtol=0, atol=0.03 * wanted.abs().max().item())
