"""A plain PyTorch training loop for any timm or timm-dynamic model: auxiliary losses are minimised without a line here.

    timm-dynamic digits DIGITS
    python examples/train_loop.py DIGITS dynconv_resnet8 --epochs 30

The recipe is that of configs/*.digits.yaml: AdamW, a warm-up and a cosine, label smoothing, crops.
"""

import argparse

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import timm_dynamic  # registers the models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", metavar="DATA", help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
parser.add_argument("model", metavar="MODEL", help="name of a timm or timm-dynamic model")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

torch.manual_seed(args.seed)
train_set, val_set = ImageFolder(f"{args.data}/train"), ImageFolder(f"{args.data}/val")
model = timm.create_model(args.model, num_classes=len(train_set.classes))
config = timm.data.resolve_model_data_config(model)
val_set.transform = timm.data.create_transform(**config)
config["interpolation"] = "random"  # for training; a digit's mirror image is no digit
train_set.transform = timm.data.create_transform(
    **config, is_training=True, scale=(0.7, 1), ratio=(0.8, 1.25), hflip=0, color_jitter=0.2
)
train_loader, val_loader = DataLoader(train_set, 32, shuffle=True, drop_last=True), DataLoader(val_set, 64)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
steps = args.epochs * len(train_loader)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1, cycle_momentum=False)

for epoch in range(args.epochs):
    timm_dynamic.set_progress(model, epoch, args.epochs)  # masks and temperatures follow the training
    model.train()
    total = 0.0
    for images, labels in train_loader:
        loss = cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # the gradients of the auxiliary losses come along
        optimizer.step()
        schedule.step()
        total += loss.item()
    auxiliary = float(sum(timm_dynamic.auxiliary_loss(model).values()))  # of the last batch
    model.eval()
    with torch.inference_mode():
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in val_loader)
    print(
        f"epoch {epoch}: loss {total / len(train_loader):.4f}, auxiliary {auxiliary:.4g}, "
        f"top-1 {100 * right / len(val_set):.2f}",
        flush=True,
    )
