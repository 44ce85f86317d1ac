"""Networks of segmentation_models_pytorch with dynamic convolutions: by name, or in an encoder that is there already.

    pip install segmentation_models_pytorch
    python examples/segmentation.py

Its encoders `tu-NAME` are timm's models, this package's included. Any other encoder, with its weights of ImageNet,
becomes dynamic by `dynamize`. The program takes a step of training of each, on the two photographs that scikit-learn
has.
"""

import segmentation_models_pytorch as smp
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import timm_dynamic


def by_name() -> nn.Module:
    return smp.Unet("tu-ddf_mul_resnet50", encoder_weights=None, classes=2)  # True: the weights of the name's tag


def with_a_dynamic_encoder() -> nn.Module:
    model = smp.FPN("resnet18", encoder_weights=None, classes=2)  # "imagenet": with weights
    timm_dynamic.dynamize(model.encoder, "dcd")
    return model


def photographs(size: int = 128) -> tuple[Tensor, Tensor]:
    """Images, and a mask of what is blue in them: the sky, more or less."""
    images = torch.stack([torch.tensor(image) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    images = nn.functional.interpolate(images, (size, size), mode="area")
    return images, (images[:, 2] > 0.5).long()


def main(steps: int = 1) -> None:
    torch.manual_seed(0)
    images, masks = photographs()
    for make in (by_name, with_a_dynamic_encoder):
        model = make().train()
        optimizer, loss_of = torch.optim.AdamW(model.parameters(), 1e-3), smp.losses.DiceLoss("multiclass")
        for step in range(steps):
            timm_dynamic.set_progress(model, step, steps)  # for the layers with a schedule
            loss = loss_of(model(images), masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            predicted = model.eval()(images).argmax(1)
        print(f"{make.__name__}: loss {loss.item():.4f}, right {(predicted == masks).float().mean():.1%}", flush=True)


if __name__ == "__main__":
    main()
