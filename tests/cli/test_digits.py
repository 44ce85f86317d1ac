import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from timm_dynamic import cli


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent") / "new" / "digits"
    assert cli.main(["digits", str(folder)]) == 0
    return folder


def test_split(written):
    digits = load_digits()
    names = files(written)
    assert [path.name for path in written.parent.iterdir()] == ["digits"]
    assert sum(name.startswith("train/") for name in names) == 1437
    assert sum(name.startswith("val/") for name in names) == 360
    # Each image once, under its class, in a validation set with every class in proportion.
    place = {int(name.split("/")[2].removesuffix(".png")): name for name in names}
    assert sorted(place) == list(range(len(digits.target)))
    assert all(int(place[i].split("/")[1]) == target for i, target in enumerate(digits.target))
    for digit in range(10):
        share = sum(name.startswith(f"val/{digit}/") for name in names) / np.sum(digits.target == digit)
        assert share == pytest.approx(360 / 1797, abs=0.01)


def test_split_is_the_same_everywhere(written):
    """The accuracy of the shipped weights holds for these validation images only."""
    val = sorted(name for name in files(written) if name.startswith("val/"))
    assert val[:3] == ["val/0/0078.png", "val/0/0202.png", "val/0/0252.png"]
    assert val[-3:] == ["val/9/1704.png", "val/9/1706.png", "val/9/1772.png"]


def test_pixels(written):
    images = load_digits().images
    for path in written.glob("val/*/*.png"):
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
            pixels = np.asarray(image)
        assert np.abs(pixels - images[int(path.stem)] * 255 / 16).max() <= 0.5


def test_second_run_changes_nothing(written, capsys):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert cli.main(["digits", str(written)]) == 0
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_empty_folder(tmp_path):
    assert cli.main(["digits", str(tmp_path)]) == 0
    assert len(files(tmp_path)) == 1797


def fail(capsys, folder):
    assert cli.main(["digits", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("timm-dynamic digits: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", ["notes.txt", "train/3/mine.png"])
def test_other_files_are_kept(tmp_path, capsys, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    assert "is not empty" in fail(capsys, tmp_path / "mine")
    assert files(tmp_path) == {f"mine/{name}": b"precious"}


def test_changed_digits_are_kept(tmp_path, capsys):
    folder = tmp_path / "digits"
    cli.main(["digits", str(folder)])
    capsys.readouterr()
    (folder / "train" / "extra.png").write_bytes(b"precious")
    assert "is not empty" in fail(capsys, folder)
    (folder / "train" / "extra.png").unlink()
    next(folder.glob("val/0/*.png")).unlink()
    assert "is not empty" in fail(capsys, folder)


def test_file_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"precious")
    assert "is not a folder" in fail(capsys, tmp_path / "file")
    assert str(tmp_path / "file") in fail(capsys, tmp_path / "file" / "digits")


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    saved = []

    def save(image, path):
        if len(saved) == 100:
            raise OSError("no space left on device")
        saved.append(path)

    monkeypatch.setattr(Image.Image, "save", save)
    assert "no space" in fail(capsys, tmp_path / "digits")
    assert len(saved) == 100 and not any(tmp_path.iterdir())


def test_without_scikit_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert 'pip install "timm-dynamic[demo]"' in fail(capsys, tmp_path / "digits")
    assert not any(tmp_path.iterdir())
