"""Groups of images: by their files, and the coarse classes of CIFAR-100."""

import json
import os
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
    file.write_text("file,group\n cat /1.png,a\n cat/2.png ,b\n./ cat/2.png,c\n")
    assert groups.read(file, 3, [" cat /1.png", "cat/2.png", " cat/2.png"].__getitem__) == ["a", "b", "c"]


def test_names_of_files_need_not_be_utf8(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_bytes(b"file,group\ncaf\xe9.png,caf\xc3\xa9\n")
    assert groups.read(file, 1, [os.fsdecode(b"caf\xe9.png")].__getitem__) == ["caf\u00e9"]
    for text in (b"file,group\ncaf\xe9.png,caf\xe9\n", "file,group\na.png,a\n".encode("utf-16")):
        file.write_bytes(text)
        with pytest.raises(UserError, match="is no CSV file in UTF-8"):
            groups.read(file, 1, ["a.png"].__getitem__)


@pytest.mark.skipif(not CLASSES.exists(), reason="the names of CIFAR-100's classes are not there")
def test_the_coarse_classes_are_those_of_cifar100():
    names = json.loads(CLASSES.read_text())
    found = groups.coarse(list(range(100)), names["cifar100"])
    assert set(found) == set(names["cifar100_coarse"])
    assert all(found.count(name) == 5 for name in found)


def test_coarse_classes_are_of_cifar100_alone():
    with pytest.raises(UserError, match="--groups=coarse is for CIFAR-100"):
        groups.coarse([0], ["cat", "dog"])


def test_places_that_are_not_there_are_said_with_those_that_are(tmp_path):
    file = tmp_path / "groups.csv"
    file.write_text("index,group\n0.0,a \n 001, a\n")
    assert groups.read(file, 2, None) == ["a", "a"]  # spaces make no other group
    for text, words in (
        ("index,group\n0,a\n2,b\n", "the index '2' is none of this split's, which are 0 to 1"),
        ("index,group\n0.5,a\n", "the index '0.5' is none of this split's"),
        ("index,group\n0, \n1,b\n", "a row without a group"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            groups.read(file, 2, None)
