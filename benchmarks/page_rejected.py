"""The part of benchmarks/README.md about ideas that were tried and given up, with the numbers that decided.

A new one is a line in `REJECTED`, with where its numbers are recorded. Nothing is estimated.
"""

HEAD = """
## Rejected ideas

With the numbers as they were when it was decided, on a CPU. Sources are commits, files, and issues: the measurements
that came with their texts.

| idea | what it gave | instead | source |
|---|---|---|---|
"""
REJECTED = [
    (
        "PED's 3x3 convolutions as one grouped convolution, a group a sample",
        "3.3x `resnet18`'s time for them at batch 16; ten times too slow with 512 channels, fine with 64 and 128",
        "the shared weight scaled for each sample, or scaled columns, by shape: 1.19x",
        "while PED was written",
    ),
    (
        "PED's 3x3 convolutions as one call a sample everywhere",
        "1.5x at batch 16 (1.02x at batch 1)",
        "the same",
        "while PED was written",
    ),
    (
        "PED's 3x3 convolutions as one product of scaled columns everywhere",
        "1.3x to 1.4x at batch 16 with 512 channels, worse in early layers",
        "the same",
        "while PED was written",
    ),
    (
        "Matrix products by MKL (`F.linear`)",
        "half of oneDNN's speed on AMD's processors, no faster on Intel's",
        "oneDNN's product",
        "`ops/_linear.py`",
    ),
    (
        "1x1 convolutions of one sample by oneDNN's convolution",
        "twice the time of the product",
        "the product",
        "745712c",
    ),
    (
        "DDF's branches and FilterNorm as PyTorch's operators in inference",
        "`ddf_mul_resnet50` 0.88x `resnet50`'s time at batch 1",
        "one operator each: 0.72x",
        "dde6168, 8e03cb3",
    ),
    (
        "DCD's training step as PyTorch's operators, differentiated by autograd",
        "peak memory 1.21x `resnet50`'s, 1.10x `mobilenetv2_100`'s at batch 16",
        "one autograd function a layer: 1.14x, 1.04x",
        "8c2a428, 7f6c59a",
    ),
    (
        "DCD's 1x1 convolutions as products by oneDNN, one sample after the other",
        "training step 1.41x `resnet50`'s, 1.47x `mobilenetv2_100`'s; batch 1 1.23x `resnet50`'s",
        "operators of our own for the whole batch: see above",
        "b8596d2",
    ),
    (
        "Sparse execution from PyTorch's operators",
        "1.54x and 2.03x faster than dense ResNet-101 (not folded) at batch 1 and 8, blob of 30 %",
        "operators of our own: see above, against the folded network",
        "while sparse execution was written",
    ),
    (
        "Masked inverted residuals for the whole batch at once",
        "`dynconv_mobilenetv2` at batch 8, blob of 70 %: 0.85x as fast as dense, peak memory 64.3 MiB",
        "a few samples at a time: see above",
        "e63dfd5, a5f44e6",
    ),
]


def rejected_text(operator: dict) -> str:
    """The section.

    Args:
        operator: What `op_ddf.py` wrote: the ways to run ddf without a kernel are timed in it.
    """
    shape = next(row["shape"] for row in operator["rows"] if row["candidate"] == "unfold")
    times = {
        (row["candidate"], row["layout"]): row["ratio_to_depthwise"]
        for row in operator["rows"]
        if (row["shape"], row["mode"], row["dtype"], row["kernel_size"], row["stride"])
        == (shape, "forward", "float32", 3, 1)
    }
    kernel = [f"{times['kernel', layout]:.2f}x" for layout in ("NCHW", "channels_last")]
    ways = {
        "unfold": "ddf as products with im2col's patches",
        "reference": "ddf as a sum of shifted maps",
        "compiled reference": "the same under `torch.compile`",
    }
    text = HEAD
    for name, idea in ways.items():
        gave = f"{times[name, 'NCHW']:.1f}x torch's depthwise convolution in NCHW, {times[name, 'channels_last']:.1f}x"
        text += (
            f"| {idea}, {shape} | {gave} in channels_last | a kernel: {' and '.join(kernel)} | `op_ddf_cpu.json` |\n"
        )
    return text + "".join(f"| {' | '.join(line)} |\n" for line in REJECTED)
