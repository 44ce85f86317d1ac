"""Targets, loss, PCKh and images of pose estimation, against values computed by hand."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from timm_dynamic.cli import pose_data, pose_maps
from timm_dynamic.cli.pose_data import Augmentation, Person, Persons, crop_matrix, cut, mirror, to_target

CONFIG = {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.5, 0.5)}
SIZE = (256, 256)


def person(**kwargs):
    joints, visible = np.zeros((16, 2)), np.zeros(16, dtype=bool)
    joints[0], joints[5], visible[0] = (10, 20), (30, 40), True
    return Person(
        **{"image": "a.jpg", "center": np.array([50.0, 30.0]), "scale": 0.5} | kwargs, joints=joints, visible=visible
    )


class TestTargets:
    def test_centres(self):
        """`int(joint / 4 + 0.5)`: towards zero; a joint counts while its window of 13 pixels meets the map."""
        x = np.array([101.9, 102.0, -3.9, -28.0, -29.9, -30.0, 277.9, 278.0])
        joints = np.column_stack([x, np.full(8, 40.0)])
        target = to_target(joints, np.ones(8, dtype=bool), SIZE)
        assert target[:, 0].tolist() == [25, 26, 0, -6, -6, -7, 69, 70]
        assert target[:, 2].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
        assert to_target(joints - [400, 0], np.ones(8, dtype=bool), SIZE)[:, 2].tolist() == [0] * 8
        assert to_target(joints, np.zeros(8, dtype=bool), SIZE).sum() == 0

    def test_maps(self):
        maps = pose_maps.target_maps(torch.tensor([[[10.0, 20, 1], [-6, 3, 1], [10, 20, 0]]]), 24, 32)
        assert maps.shape == (1, 3, 24, 32)
        first, edge, none = maps[0]
        assert first[20, 10] == 1 and first.argmax() == 20 * 32 + 10
        assert first[21, 12].item() == pytest.approx(math.exp(-5 / 8), rel=1e-6)
        assert first[20, 16].item() == pytest.approx(math.exp(-36 / 8), rel=1e-6) and first[20, 17] == 0
        assert (first > 0).sum() == 13 * 10  # four rows of the window are beyond the map
        assert (edge > 0).sum() == 10 and edge[3, 0].item() == pytest.approx(math.exp(-36 / 8), rel=1e-6)
        assert not none.any()

    def test_loss(self):
        """Over all positions, also those of joints that do not count; stacks are added up."""
        target = torch.tensor([[[3.0, 4, 1], [5, 5, 0]]])
        wanted = pose_maps.target_maps(target, 16, 16)
        stacks = [wanted + 2, wanted.clone()]
        stacks[1][0, 0, 0, 0] += 3
        expected = 0.5 * (4 * 256) / (2 * 256) + 0.5 * 9 / (2 * 256)
        assert pose_maps.HeatmapLoss()(stacks, target).item() == pytest.approx(expected, rel=1e-6)
        assert pose_maps.HeatmapLoss()(stacks[0], target).item() == pytest.approx(1.0, rel=1e-6)


class TestImages:
    def test_matrix(self):
        """A person's square of 200 pixels times its scale becomes the image; angles turn counter-clockwise."""
        matrix = crop_matrix(np.array([50.0, 30.0]), 0.5, 0, SIZE)
        assert matrix == pytest.approx(np.array([[2.56, 0, 128 - 2.56 * 50], [0, 2.56, 128 - 2.56 * 30]]))
        turned = crop_matrix(np.array([50.0, 30.0]), 0.5, 90, SIZE)
        assert turned @ [60, 30, 1] == pytest.approx([128, 128 - 25.6])

    def test_pixels(self):
        """A crop of factor 1 is the photograph's own pixels, black beyond it, and of factor 2 the values between."""
        photograph = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        image = Image.fromarray(photograph)
        matrix = crop_matrix(np.array([10.0, 12.0]), 64 / 200, 0, (64, 64))
        pixels = np.asarray(cut(image, matrix, (64, 64)))
        assert abs(pixels[20:60, 22:64].astype(int) - photograph[:, :42]).max() <= 1  # Pillow rounds down
        assert not pixels[:20].any() and not pixels[:, :22].any()
        doubled = np.asarray(cut(image, crop_matrix(np.array([10.0, 12.0]), 32 / 200, 0, (64, 64)), (64, 64)))
        assert doubled[32, 32] == pytest.approx(photograph[12, 10].astype(float), abs=1)
        between = photograph[12, 10:12].astype(float).mean(0)
        assert doubled[32, 33] == pytest.approx(between, abs=1)

    def test_blue_comes_first(self, tmp_path):
        """Each channel is normalised by the numbers at its place."""
        Image.new("RGB", (100, 60), (255, 0, 51)).save(tmp_path / "a.png")
        image, target = Persons(tmp_path, [person(image="a.png", scale=0.1)], CONFIG)[0]
        assert image[:, 32, 32].tolist() == pytest.approx([(0.2 - 0.5) / 0.5, -0.8, (1 - 0.3) / 0.5], abs=1e-6)
        assert image.dtype == torch.float32 and target.dtype == torch.float32 and target.shape == (16, 3)
        assert target[0, 2] == 0  # 40 pixels left of a square of 20

    def test_mirror(self):
        """Where a pixel comes to, its joint comes to, as that of the other side."""
        mirrored = mirror(person(), 100)
        assert mirrored.joints[5].tolist() == [89, 20] and mirrored.joints[0].tolist() == [69, 40]
        assert mirrored.center.tolist() == [49, 30] and mirrored.visible.tolist() == [i == 5 for i in range(16)]
        twice = mirror(mirrored, 100)
        assert (twice.joints == person().joints).all() and (twice.visible == person().visible).all()

    def test_augmentation(self, tmp_path):
        """Joints stay on what they are on: a white square around each of two, in some of the images."""
        pixels = np.zeros((100, 100, 3), dtype=np.uint8)
        pixels[50:59, 30:39] = 255
        pixels[30:39, 55:64, 0] = 255
        Image.fromarray(pixels).save(tmp_path / "a.png")
        joints, visible = np.zeros((16, 2)), np.zeros(16, dtype=bool)
        joints[0], joints[12], visible[[0, 12]] = (34, 54), (59, 34), True
        someone = Person("a.png", np.array([50.0, 50.0]), 0.5, joints, visible)
        persons = Persons(tmp_path, [someone], CONFIG | {"input_size": (3, 256, 256)}, Augmentation(0.25, 30, 0.6, 0.5))
        sides, centres = set(), set()
        for seed in range(20):
            torch.manual_seed(seed)
            image, target = persons[0]
            for place, other, channel in ((0, 5, 0), (12, 13, 2)):
                at = place if target[place, 2] else other
                column, row, weight = target[at].int().tolist()
                assert weight == 1 and image[channel, 4 * row, 4 * column] > 0.9
                sides.add(at)
                centres.add((column, row))
        assert sides == {0, 5, 12, 13} and len(centres) > 15

    def test_augmentation_is_bounded(self):
        """Factors from 0.75 to 1.25, and angles of up to 60 degrees in six images of ten, half of them mirrored."""
        image, drawn = Image.new("RGB", (100, 60)), []
        torch.manual_seed(0)
        for _ in range(2000):
            varied, _, angle = pose_data.vary(person(), image, Augmentation(0.25, 30, 0.6, 0.5))
            drawn.append((varied.scale / 0.5, angle, varied.visible[5]))
        scales, angles, mirrored = np.array(drawn, dtype=float).T
        assert scales.min() == pytest.approx(0.75) and scales.max() == pytest.approx(1.25)
        assert 0.28 < np.isclose(abs(scales - 1), 0.25).mean() < 0.36  # beyond one standard deviation
        assert abs(angles).max() == 60 and 0.57 < (angles != 0).mean() < 0.63 and 0.47 < mirrored.mean() < 0.53
        assert 24 < angles[angles != 0].std() < 31


class TestPeaks:
    def test_places(self):
        maps = torch.zeros(1, 5, 16, 20)
        maps[0, 0, 5, 7], maps[0, 0, 5, 8], maps[0, 0, 4, 7] = 1, 0.2, 0.1  # the next ones right and above
        maps[0, 1, 5, 1], maps[0, 1, 5, 2] = 1, 0.5  # too near to the border
        maps[0, 2] = -1
        maps[0, 3, 6, 6], maps[0, 3, 9, 9] = 1, 1  # the first one
        maps[0, 4, 15, 19] = 0.5
        places, scores = pose_maps.peaks(maps)
        assert places[0].tolist() == [[7.25, 4.75], [1, 5], [0, 0], [6, 6], [19, 15]]
        assert scores[0].tolist() == [1, 1, -1, 1, 0.5]

    def test_photograph(self):
        """`center + (q - 32) * 200 * scale / 64`, counted from 1."""
        peaks = torch.tensor([[[32.0, 32], [34, 28]]]).double()
        centers, scales = torch.tensor([[100.0, 50]]).double(), torch.tensor([1.6], dtype=torch.float64)
        places = pose_data.to_photograph(peaks, centers, scales, (64, 64))
        assert places.flatten().tolist() == pytest.approx([101, 51, 111, 31])

    def test_flip_test(self):
        """Mirrored back, sides exchanged, a column to the right; one joint of each pair."""
        seen = []

        def model(images):
            seen.append(images)
            maps = torch.zeros(1, 16, 4, 6)
            maps[0, 0, 1, 2] = len(seen)
            return maps

        images = torch.rand(1, 3, 16, 24)
        maps = pose_maps.predict(model, images, flip_test=True)
        assert torch.equal(seen[1], images.flip(3))
        assert maps.nonzero().tolist() == [[0, 0, 1, 2], [0, 5, 1, 4]] and maps.sum() == 0.5 + 1


class TestPckh:
    """Distances of three persons' joints, in sizes of their heads."""

    def counts(self):
        wanted, found = torch.zeros(3, 16, 2).double(), torch.zeros(3, 16, 2).double()
        missing, heads = torch.zeros(3, 16, dtype=torch.bool), torch.tensor([10.0, 20, 40]).double()
        found[0, 9] = torch.tensor([3.0, 4])  # 0.5 of the head: found
        found[1, 9, 0] = 10.1  # 0.505
        found[2, 9, 0] = 4.2  # 0.105: at 0.11, not at 0.1
        found[:, 12, 0] = 100  # right shoulders: none
        found[:, 6:8] = 100  # pelvis and thorax, in no mean
        missing[1:, 13] = True  # one left shoulder
        found[1, 13] = 100
        missing[:, 1] = missing[:, 4] = True  # no knees
        return pose_maps.count_hits(found, wanted, missing, heads)

    def test_by_hand(self):
        shares = pose_maps.pckh(self.counts())
        assert list(shares) == "head shoulder elbow wrist hip knee ankle mean mean@0.1 mean@0.11".split()
        assert shares["head"] == pytest.approx(200 / 3) and shares["shoulder"] == 50 and shares["knee"] is None
        assert shares["elbow"] == shares["wrist"] == shares["hip"] == shares["ankle"] == 100
        joints = 3 * 14 - 6 - 2
        assert shares["mean"] == pytest.approx(100 * (joints - 4) / joints)
        assert shares["mean@0.1"] == pytest.approx(100 * (joints - 6) / joints)
        assert shares["mean@0.11"] == pytest.approx(100 * (joints - 5) / joints)

    def test_nobody(self):
        assert set(pose_maps.pckh(torch.zeros(4, 16)).values()) == {None}


def entry(**kwargs):
    joints = [[float(i), 2.0 * i] for i in range(16)]
    return {"image": "a.jpg", "center": [50, 31], "scale": 2, "joints": joints, "joints_vis": [1] * 16, **kwargs}


class TestAnnotations:
    def read(self, tmp_path, content):
        (tmp_path / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return pose_data.read_people(tmp_path / "a.json")

    def test_centre_and_scale(self, tmp_path):
        first, second = self.read(tmp_path, [entry(), entry(center=[-1, 7])])
        assert first.center.tolist() == [49, 31 + 30 - 1] and first.scale == 2.5
        assert first.joints[3].tolist() == [2, 5] and first.visible.all()
        assert second.center.tolist() == [-2, 6] and second.scale == 2

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("[", "a.json is no JSON: Expecting value: line 1 column 2 (char 1)"),
            ("\x00", "a.json is no JSON"),
            ([], "a.json holds no persons: it must be a list with one entry for each"),
            ({"a": 1}, "a.json holds no persons"),
            ([entry(), 3], "a.json, person 1: it must have the keys image, center, scale, joints, joints_vis"),
            ([entry(image=3)], "person 0: it must have the keys"),
            ([{key: value for key, value in entry().items() if key != "joints"}], "person 0: joints is missing"),
            ([entry(joints=[[1, 2]] * 15)], "joints must be 16x2 numbers, and is 15x2"),
            ([entry(joints=[[1, 2]] * 15 + [[1]])], "joints must be numbers, and is [[1, 2], [1, 2]"),
            ([entry(joints_vis=[2] * 16)], "joints_vis must be 0 or 1"),
            ([entry(scale="x")], "scale must be numbers, and is x"),
            ([entry(scale=0)], "scale must be above 0, and is 0"),
            ([entry(scale=None)], "scale must be finite"),
            ("[" + json.dumps(entry()).replace("31", "1e999") + "]", "center must be finite"),
        ],
    )
    def test_errors(self, tmp_path, content, expected):
        with pytest.raises(ValueError) as error:
            self.read(tmp_path, content)
        assert expected in str(error.value) and "\n" not in str(error.value)

    def test_images_of_one_channel(self):
        with pytest.raises(ValueError, match="three channels"):
            pose_data.open_persons(argparse.Namespace(), "train", {"input_size": (1, 64, 64)})


class TestTruth:
    @pytest.fixture
    def content(self):
        heads = np.zeros((2, 2, 3))
        heads[1] = [[3, 6, 9], [4, 8, 12]]
        joints = np.arange(16 * 2 * 3, dtype=float).reshape(16, 2, 3)
        missing = np.zeros((16, 3), dtype=np.uint8)
        missing[4, 1] = 1
        return {"pos_gt_src": joints, "jnt_missing": missing, "headboxes_src": heads}

    def read(self, tmp_path, content):
        pytest.importorskip("scipy.io").savemat(tmp_path / "gt.mat", content)
        return pose_data.read_truth(tmp_path / "gt.mat", 3)

    def test_values(self, tmp_path, content):
        truth = self.read(tmp_path, content)
        assert truth.head_sizes.tolist() == pytest.approx([3, 6, 9])  # 0.6 of the diagonals 5, 10, 15
        assert truth.joints[1, 2].tolist() == content["pos_gt_src"][2, :, 1].tolist()
        assert truth.missing.nonzero().tolist() == [[1, 4]]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"jnt_missing": np.zeros((16, 2))}, "jnt_missing must be 16x3 numbers, and is 16x2 of float64"),
            ({"headboxes_src": np.zeros((2, 2, 3))}, "the head's box of person 0 has no size"),
            ({"jnt_missing": np.ones((16, 3))}, "no joint counts, all are missing"),
        ],
    )
    def test_errors(self, tmp_path, content, change, expected):
        with pytest.raises(ValueError) as error:
            self.read(tmp_path, content | change)
        assert expected in str(error.value)
        with pytest.raises(ValueError, match="pos_gt_src must be 16x2x3 numbers, and is missing"):
            self.read(tmp_path, {"a": 1})
        (tmp_path / "gt.mat").write_bytes(b"no such file")
        with pytest.raises(ValueError, match="is no MATLAB file that scipy reads"):
            pose_data.read_truth(tmp_path / "gt.mat", 3)
