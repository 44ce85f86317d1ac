"""What is special about LSNet: sizes of images, the authors' files, two classifiers, branches that fold."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn

import timm_dynamic
from timm_dynamic import hub
from timm_dynamic.convert import load_checkpoint
from timm_dynamic.models._lsnet import Attention, RepVGGDW

ATTENTION = "blocks4.3.mixer.m"  # of the tiny network


def images(*size, batch=1):
    return torch.randn(batch, 3, *size)


def tiny(**kwargs):
    """With attention biases that say something."""
    torch.manual_seed(0)
    model = timm.create_model("test_lsnet", **{"img_size": 256, **kwargs}).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.attention_biases)
                nn.init.ones_(module.proj[1].bn.weight)
    return model


def as_authors(state):
    """With flat biases and tables of indices."""
    state = dict(state)
    for key in [key for key in state if key.endswith("attention_biases")]:
        heads, rows, columns = state[key].shape
        state[key] = state[key].flatten(1)
        state[key.replace("biases", "bias_idxs")] = torch.zeros(rows * columns, rows * columns, dtype=torch.int64)
    return state


@pytest.mark.parametrize("size", [(4, 4), (1, 3), (2, 1)])
def test_biases_are_of_distances(size):
    attention = Attention(16, 4, 2, (4, 5))
    nn.init.normal_(attention.attention_biases)
    bias = attention.bias(*size)
    for p in range(size[0] * size[1]):
        for q in range(size[0] * size[1]):
            dy, dx = abs(p // size[1] - q // size[1]), abs(p % size[1] - q % size[1])
            assert torch.equal(bias[:, p, q], attention.attention_biases[:, dy, dx])


@torch.no_grad()
def test_sizes():
    """Up to `img_size`, square or not; what is larger is refused, and so is another shape with as many positions."""
    model = tiny()
    assert model(images(193, 256)).shape == model(images(64, 130)).shape == (1, 10)
    for size, words in (((128, 512), "2 x 8"), ((257, 65), "5 x 2")):
        with pytest.raises(ValueError, match=f"a map of {words} positions is larger .* 4 x 4: .*img_size") as error:
            model(images(*size))
        assert "\n" not in str(error.value)
    wide = tiny(img_size=(128, 512))
    assert wide.get_submodule(ATTENTION).attention_biases.shape == (4, 2, 8)
    x = images(128, 128)
    expected = wide(x)
    model.load_state_dict({**wide.state_dict(), f"{ATTENTION}.attention_biases": torch.zeros(4, 4, 4)})
    model.get_submodule(ATTENTION).attention_biases[:, :2, :4] = wide.get_submodule(ATTENTION).attention_biases[
        :, :, :4
    ]
    torch.testing.assert_close(model(x), expected)  # the same distances: in evaluation, no other copy is left


def test_weights_of_another_size(tmp_path):
    """The authors' interpolation; a network's weights go back into one of its size as they are."""
    square, wide = tiny(), tiny(img_size=(128, 512))
    theirs, key = as_authors(square.state_dict()), f"{ATTENTION}.attention_biases"
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    load_checkpoint(wide, tmp_path / "theirs.pth")
    expected = F.interpolate(theirs[key].view(1, 4, 4, 4), (2, 8), mode="bicubic")[0]
    torch.testing.assert_close(wide.state_dict()[key], expected)
    load_checkpoint(square, tmp_path / "theirs.pth")
    assert torch.equal(square.state_dict()[key].flatten(1), theirs[key])
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    load_checkpoint(timm.create_model("test_lsnet", img_size=(128, 512)), tmp_path / "wide.pth")
    torch.save({"model": {**theirs, key: theirs[key][:, :15]}}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"attention_biases \[4, 15\] instead of \[4, 4, 4\]"):
        load_checkpoint(square, tmp_path / "bad.pth")


@torch.no_grad()
def test_a_file_without_the_1x1_branches(tmp_path):
    model, x = tiny(), images(128, 128)
    state = {key: value for key, value in model.state_dict().items() if ".conv1." not in key}
    torch.save(state, tmp_path / "model.pth")
    other = timm.create_model("test_lsnet", img_size=256).eval()
    load_checkpoint(other, tmp_path / "model.pth")
    for module in model.modules():
        if isinstance(module, RepVGGDW):
            nn.init.zeros_(module.conv1.bn.weight), nn.init.zeros_(module.conv1.bn.bias)
    torch.testing.assert_close(other(x), model(x))
    other.train()(images(128, 128, batch=2)).sum()  # its branches can be trained


def test_the_authors_file_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_DYNAMIC_WEIGHTS", str(tmp_path / "empty"))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args: None)
    asked, path = [], tmp_path / "pytorch_model.bin"
    monkeypatch.setattr(hub, "get_hf_file_metadata", asked.append)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name, **kwargs: asked.append((repo, name)) or str(path))
    model = timm.create_model("lsnet_t_distill")
    torch.save(as_authors(model.state_dict()), path)
    loaded = timm.create_model("lsnet_t_distill", pretrained=True, num_classes=3, in_chans=1, img_size=256)
    assert asked[1] == ("jameslahm/lsnet_t_distill", "pytorch_model.bin")
    assert torch.equal(loaded.head_dist.bn.weight, model.head_dist.bn.weight) and len(loaded.head_dist.l.weight) == 3
    torch.testing.assert_close(loaded.patch_embed[0].c.weight, model.patch_embed[0].c.weight.sum(1, keepdim=True))

    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"model": Harmful()}, path)
    with pytest.raises(ValueError, match="is refused: it needs"):
        timm.create_model("lsnet_t_distill", pretrained=True)


def test_two_classifiers():
    model = timm.create_model("lsnet_t_distill", num_classes=3).train()
    x = images(65, 65, batch=2)
    assert model(x).shape == (2, 3)
    model.set_distilled_training()
    assert [one.shape for one in model(x)] == [(2, 3)] * 2 and model.get_classifier() == (model.head, model.head_dist)
    model.eval()
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), (model.head(features) + model.head_dist(features)) / 2)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), features)


def test_a_batch_of_one_in_training():
    model = timm.create_model("test_lsnet").train()
    model(images(128, 128)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_groups_of_parameters():
    model = timm.create_model("test_lsnet", device="meta")
    groups = group_parameters(model, model.group_matcher())
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert groups[0] == [name for name, _ in model.named_parameters() if name.startswith("patch_embed.")]
    assert len(groups) == 1 + 3 * 4 + 1  # the stem, two convolutions and two blocks in three stages, the classifier
    assert model.no_weight_decay() == {f"{ATTENTION}.attention_biases"}


@torch.no_grad()
def test_branches_become_one_convolution():
    model, x = tiny(), images(128, 128)
    for _ in range(3):
        model.train()(images(128, 128, batch=4))
    fast = timm_dynamic.optimize(model.eval(), memory_format=torch.contiguous_format)
    y = model(x)
    assert (fast(x) - y).abs().max() < 1e-5 * y.std()
    assert isinstance(fast.head, nn.Linear) and isinstance(fast.blocks2[2].mixer, nn.Conv2d)
    nn.utils.parametrizations.spectral_norm(model.blocks2[2].mixer.conv.c)
    slower = timm_dynamic.optimize(model.eval(), memory_format=torch.contiguous_format)
    assert isinstance(slower.blocks2[2].mixer, RepVGGDW)
