"""`push --out` and `card`. tests/test_hub_http.py uploads."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from commands import run

import timm_dynamic
from timm_dynamic.cli.validate import write_results
from timm_dynamic.families import FAMILIES

TINY = "test_ddf_resnet"
README = Path(__file__).parents[2] / "README.md"
RESULTS = {
    "model": TINY,
    "top1": 99.7222,
    "top5": 100.0,
    "img_size": 64,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}


@pytest.fixture
def checkpoint(tmp_path):
    """A file of training, with averaged weights, for 10 classes; and the model."""
    model, averaged = timm.create_model(TINY).eval(), timm.create_model(TINY)
    path = tmp_path / "last.pth.tar"
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": averaged.state_dict()}, path)
    return path, model, averaged


def front_matter(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_out(tmp_path, capsys, checkpoint):
    path, model, _ = checkpoint
    folder = tmp_path / "files"
    status, out, _ = run(capsys, "push", TINY, path, "me/tiny", "--out", folder, "--license", "mit")
    assert status == 0 and "nothing was uploaded" in out
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == {"files", path.name}
    pulled = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(pulled(x), model(x))
    front, body = front_matter((folder / "README.md").read_text())
    assert front["license"] == "mit" and "hf-hub:me/tiny" in body
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license"} & set(cfg)  # those of the weights that the package has


def test_use_ema_and_a_card_of_ones_own(tmp_path, capsys, checkpoint):
    path, _, averaged = checkpoint
    own = tmp_path / "own.md"
    own.write_text("---\nlicense: mit\n---\nmine, für alle\n", encoding="utf-8")
    folder = tmp_path / "files"
    argv = ("push", TINY, path, "me/tiny", "--out", folder, "--use-ema", "--card", own)
    assert run(capsys, *argv)[0] == 0
    assert (folder / "README.md").read_bytes() == own.read_bytes()
    pulled = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(pulled.fc.weight, averaged.fc.weight)


def test_what_was_pulled_can_be_pushed_again(tmp_path, capsys, checkpoint):
    """With its labels and arguments."""
    path, model, _ = checkpoint
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"n{i}\n" for i in range(9)) + "n9\tnine\n")
    first, second = tmp_path / "first", tmp_path / "second"
    overlay = "pretrained_cfg_overlay={'mean':(0.1,0.2,0.3)}"
    argv = ("--labels", labels, "--model-kwargs", "se_ratio=0.2", overlay)
    assert run(capsys, "push", TINY, path, "me/tiny", "--out", first, *argv)[0] == 0
    config = json.loads((first / "config.json").read_text())
    assert config["model_args"]["se_ratio"] == 0.2 and "pretrained_cfg_overlay" not in config["model_args"]
    assert "tag" not in config["pretrained_cfg"]
    again = ("push", f"local-dir:{first}", first / "model.safetensors", "me/again", "--out", second)
    assert run(capsys, *again)[0] == 0
    pulled = timm.create_model(f"local-dir:{second}", pretrained=True)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in pulled.state_dict().items())
    if hasattr(pulled, "_model_args"):  # older versions of timm forget what a pulled model was created with
        assert json.loads((second / "config.json").read_text())["model_args"] == config["model_args"]
    assert list(pulled.pretrained_cfg["label_names"]) == [f"n{i}" for i in range(10)]
    assert pulled.pretrained_cfg["label_descriptions"] == {"n9": "nine"}
    assert tuple(pulled.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "argv, expected",
    [
        ("push TINY FILE", "required: ORG/NAME"),
        ("push TINY FILE tiny", "'tiny' cannot be a repository: ORG/NAME is expected"),
        ("push TINY FILE me/..x", "'me/..x' cannot be a repository"),
        ("push TINY FOLDER/none me/x", "no checkpoint at"),
        ("push TINY FILE me/x --num-classes 5", "num_classes=10 (--num-classes 10)"),
        ("push test_dcd_resnet FILE me/x", "does not load into test_dcd_resnet"),
        ("push TINY.none FILE me/x", "Invalid pretrained tag (none)"),
        ("push nonsense FILE me/x", "unknown model 'nonsense'"),
        ("push TINY FILE me/x --out FOLDER", "name a new folder in an existing one"),
        ("push TINY FILE me/x --out FOLDER/none/files", "name a new folder in an existing one"),
        ("push TINY FILE me/x --labels FOLDER/one.txt", "1 labels for 10 classes"),
        ("push TINY FILE me/x --labels FOLDER/twice.txt", "has an empty name or one twice"),
        ("push TINY FILE me/x --results-file FOLDER/one.txt", "is not what `validate --results-file` writes"),
        ("push TINY FILE me/x --results-file FOLDER/other.csv", "is of test_dcd_resnet.digits, not of test_ddf_resnet"),
        ("push TINY FILE me/x --results-file FOLDER/short.json", "lacks crop_pct"),
        ("push TINY FILE me/x --card FOLDER/none.md", "No such file or directory"),
        ("push test_resnet DYNAMIZED me/x", "it holds weights of this model made dynamic: add --dynamize dcd"),
        ("push test_resnet DYNAMIZED me/x --dynamize dy", "dynamized.pth does not load into dynamized"),
        ("card dynconv_resnet14", "no weights of dynconv_resnet14 are known: give a CHECKPOINT"),
        ("card TINY FILE --repo tiny", "'tiny' cannot be a repository"),
        ("card TINY FILE --out FOLDER/none/README.md", "cannot write there"),
        ("card TINY FILE --out FOLDER/card.txt", "must end in .md"),
        ("card test_resnet DYNAMIZED", "it holds weights of this model made dynamic: add --dynamize dcd"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, checkpoint, argv, expected, monkeypatch):
    monkeypatch.setattr("timm_dynamic.cli.push.upload", None)
    dynamized = tmp_path / "dynamized.pth"
    torch.save(timm_dynamic.dynamize(timm.create_model("test_resnet"), "dcd").state_dict(), dynamized)
    (tmp_path / "one.txt").write_text("cat")
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    write_results(str(tmp_path / "other.csv"), {**RESULTS, "model": "test_dcd_resnet.digits"})
    (tmp_path / "short.json").write_text(json.dumps({k: v for k, v in RESULTS.items() if k != "crop_pct"}))
    before = sorted(tmp_path.iterdir())
    names = {"TINY": TINY, "FILE": checkpoint[0], "FOLDER": tmp_path, "DYNAMIZED": dynamized}
    words = [re.sub("|".join(names), lambda match: str(names[match[0]]), word) for word in argv.split()]
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith(f"timm-dynamic {words[0]}: error: ") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_card(tmp_path, capsys, checkpoint, suffix):
    results = tmp_path / f"results.{suffix}"
    write_results(str(results), {**RESULTS, "gmacs": 0.00875, "gmacs_static": 0.0125})
    flags = ("--results-file", results, "--license", "cc-by-4.0", "--dataset", "mnist", "--source", "my own training")
    card = tmp_path / "README.md"
    argv = ("card", TINY, checkpoint[0], "--repo", "me/tiny", *flags, "--model-kwargs", "se_ratio=0.2")
    assert run(capsys, *argv, "--out", card) == (0, "", "")
    front, body = front_matter(card.read_text())
    assert front["license"] == "cc-by-4.0" and front["datasets"] == ["mnist"]
    assert {"image-classification", "timm", "timm-dynamic"} <= set(front["tags"])
    assert front["library_name"] == "timm"
    model = timm.create_model(TINY)
    macs = timm_dynamic.count_macs(model, torch.zeros(1, 3, 64, 64))
    parameters = f"{sum(p.numel() for p in model.parameters()):,}".replace(",", " ")
    assert f"| parameters | {parameters} |" in body and "`se_ratio=0.2`" in body
    assert f"{macs.static / 1e6:.3g} M (8.75 M executed, measured)" in body
    assert "- Source: my own training\n" in body and "- Licence: cc-by-4.0\n" in body
    assert re.search(r"from `last.pth.tar` \(SHA-256 `[0-9a-f]{64}`\)", body)
    assert "- measured: top-1 99.72 %, top-5 100.00 % on mnist, by `timm-dynamic validate DATA --model" in body
    assert "hf-hub:me/tiny --img-size 64 --crop-pct 1.0 --interpolation bicubic`" in body
    assert "reported" not in body


def test_card_of_the_authors_weights(capsys):
    status, card, err = run(capsys, "card", "dynconv_resnet32.budget70_cifar10")
    assert (status, err) == (0, "")
    front, body = front_matter(card)
    assert front["license"] == "unknown" and front["datasets"] == ["cifar10"]
    assert "- reported by the authors: top-1 93.58 % on cifar10\n" in body and "measured" not in body
    assert "published by the authors: https://github.com/thomasverelst/dynconv" in body
    assert "[arXiv 1912.03203](https://arxiv.org/abs/1912.03203)" in body
    assert "with full masks" in body and "Licence: not stated" in body
    assert '"hf-hub:timm-dynamic/dynconv_resnet32.budget70_cifar10"' in body


def test_card_names_a_paper_without_a_number(capsys):
    body = run(capsys, "card", "test_ped_resnet")[1]
    assert "| paper | Parameter-Efficient Dynamic Convolution via Tensor Decomposition |" in body


def test_card_of_shipped_weights(capsys):
    """A tag is the default one where the weights are not another file's."""
    front, body = front_matter(run(capsys, "card", TINY)[1])
    assert front["license"] == "apache-2.0" and f"`{TINY}.digits` of timm-dynamic" in body


def test_card_of_other_weights_claims_nothing(tmp_path, capsys):
    """The default tag's accuracy and licence are not those of another file's."""
    model = timm.create_model("dynconv_resnet32")
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    assert model.pretrained_cfg["tag"] == "budget70_cifar10"
    front, body = front_matter(run(capsys, "card", "dynconv_resnet32", tmp_path / "mine.pth")[1])
    assert front["license"] == "unknown" and "datasets" not in front
    assert "Source: not stated" in body and "Neither reported nor measured." in body


def test_card_of_a_model_of_timm(tmp_path, capsys):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "mine.pth")
    status, card, _ = run(capsys, "card", "test_resnet", tmp_path / "mine.pth", "--repo", "me/x")
    assert status == 0 and "timm_dynamic" not in card and "timm-dynamic" not in front_matter(card)[0]["tags"]


def test_reported_accuracies_are_of_published_weights():
    tags = {tag for family in FAMILIES.values() for tag in family.reported if "." in tag}
    cfgs = [timm.get_pretrained_cfg(tag) for tag in tags]
    assert cfgs and all(cfg.hf_hub_id or cfg.url for cfg in cfgs)


def test_code_in_a_card_runs(tmp_path, capsys, checkpoint):
    """The use that a card shows, of a folder in the place of the repository."""
    from PIL import Image

    folder = tmp_path / "files"
    assert run(capsys, "push", TINY, checkpoint[0], "me/tiny", "--out", folder)[0] == 0
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {"image": Image.new("RGB", (80, 60))}
    exec(code.replace("hf-hub:me/tiny", f"local-dir:{folder}"), scope)
    assert scope["probabilities"].shape == (1, 10)
