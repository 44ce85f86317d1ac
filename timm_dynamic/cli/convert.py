"""`timm-dynamic convert`: an author's checkpoint to safetensors."""

import os

from timm_dynamic.cli.common import KeyValues, Parser, create_model
from timm_dynamic.convert import convert


def main(argv: list[str]) -> None:
    parser = Parser("convert", "Turn an original author's checkpoint into safetensors that our model loads strictly.")
    parser.add_argument("src", metavar="SRC", help="the author's file; nothing in it is executed")
    parser.add_argument("dst", metavar="DST", help="file to write, *.safetensors")
    parser.add_argument("-m", "--model", metavar="NAME", required=True, help="the model whose weights these are")
    parser.add_argument("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="K=V")
    parser.add_argument("--use-ema", action="store_true", help="take the averaged weights of the checkpoint")
    args = parser.parse_args(argv)

    model = create_model(args.model, **{"num_classes": args.num_classes, **args.model_kwargs})
    convert(args.src, args.dst, model, use_ema=args.use_ema)
    print(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(model.state_dict())} tensors, "
        f"{os.path.getsize(args.dst) / 1e6:.1f} MB -> {args.dst}"
    )
