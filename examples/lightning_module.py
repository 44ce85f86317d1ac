"""A Lightning module for any timm or timm-dynamic model: schedules, auxiliary losses, an average of the weights.

pip install lightning
timm-dynamic digits DIGITS
python examples/lightning_module.py DIGITS test_ped_resnet --epochs 5
"""

import argparse
from collections.abc import Sequence

import lightning
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import timm_dynamic
from timm_dynamic.training import DynamicTask


class Classifier(lightning.LightningModule):
    """A classifier that learns.

    Its loss is that of a `DynamicTask`: with a model's auxiliary terms, and right under `precision="16-mixed"`,
    `accumulate_grad_batches` and several devices, whatever Lightning multiplies the loss by.
    """

    def __init__(self, model: str, num_classes: int, lr: float = 4e-3):
        super().__init__()
        self.save_hyperparameters()
        self.task = DynamicTask(timm.create_model(model, num_classes=num_classes), nn.CrossEntropyLoss())

    @property
    def model(self) -> nn.Module:
        return self.task.get_trainable_module()

    def on_train_epoch_start(self) -> None:
        timm_dynamic.set_progress(self.model, self.current_epoch, self.trainer.max_epochs)  # masks and temperatures

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        result = self.task(*batch)
        self.log_dict({name: value for name, value in result.items() if value.ndim == 0}, on_epoch=True, on_step=False)
        return result["loss"]

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        images, labels = batch
        self.log("top1", 100 * (self.model(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.model.parameters(), self.hparams.lr, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(data: str, model: str, epochs: int = 5, **options) -> lightning.Trainer:
    lightning.seed_everything(0)
    config = timm.data.resolve_model_data_config(timm.create_model(model))
    transform = timm.data.create_transform(**config)
    train_set, val_set = (ImageFolder(f"{data}/{part}", transform) for part in ("train", "val"))
    average = EMAWeightAveraging(decay=0.9, use_buffers=False)  # a schedule's counter is none to average
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=average, **options)
    classifier = Classifier(model, len(train_set.classes))
    trainer.fit(classifier, DataLoader(train_set, 32, shuffle=True), DataLoader(val_set, 64))
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("model", metavar="MODEL", help="name of a timm or timm-dynamic model")
    parser.add_argument("--epochs", type=int, default=5)
    print(main(**vars(parser.parse_args())).callback_metrics)
