"""Groups of images: by their files, and the coarse classes of CIFAR-100."""

import json
import pathlib

import pytest

from vitcls.core.errors import UserError
from vitcls.data import groups

CLASSES = pathlib.Path(__file__).parents[3] / "shared" / "data" / "classes.json"


def test_files_are_named_below_the_root(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text("\ufefffile,group\n./cat/2.png,indoors\ncat/1.png,outdoors\n")
    files = ["cat/1.png", "cat/2.png"]
    assert groups.read(file, 2, files.__getitem__) == ["outdoors", "indoors"]


@pytest.mark.skipif(not CLASSES.exists(), reason="the names of CIFAR-100's classes are not there")
def test_the_coarse_classes_are_those_of_cifar100():
    names = json.loads(CLASSES.read_text())
    found = groups.coarse(list(range(100)), names["cifar100"])
    assert set(found) == set(names["cifar100_coarse"])
    assert all(found.count(name) == 5 for name in found)


def test_coarse_classes_are_of_cifar100_alone():
    with pytest.raises(UserError, match="--groups=coarse is for CIFAR-100"):
        groups.coarse([0], ["cat", "dog"])
