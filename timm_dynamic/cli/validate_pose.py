"""`timm-dynamic validate_pose`: the PCKh of a pose network on MPII, by joint."""

import argparse

from timm_dynamic.cli.common import amp_autocast, name_of, resolve_device
from timm_dynamic.cli.pose_data import make_loader, open_persons
from timm_dynamic.cli.pose_maps import check_network, pckh
from timm_dynamic.cli.train_pose import measure
from timm_dynamic.cli.validate import executed, open_model, parameters, prepare, show
from timm_dynamic.cost import count_active


def main(args: argparse.Namespace) -> None:
    device = resolve_device(args)
    model, config = open_model(args)
    check_network(args.model, model)
    persons = open_persons(args, args.split, config)
    loader = make_loader(persons, args, device, args.batch_size)
    runs = prepare(args, model, config, device)
    with count_active(runs) as active:
        autocast = amp_autocast(args, device)
        loss, counts = measure(runs, loader, autocast, args.channels_last, 0, 1, "validate", args.flip_test)
    shares = {name: None if value is None else round(value, 4) for name, value in pckh(counts).items()}
    results = {
        "model": name_of(args),
        **shares,
        "loss": loss,
        "persons": len(persons),
        "flip_test": args.flip_test,
        "param_count": parameters(model),
        "img_size": config["input_size"][-1],
        **executed(active, model, config, device),
    }
    show(args, results)
