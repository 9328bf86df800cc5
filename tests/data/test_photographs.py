import itertools

import numpy as np
import pytest
from PIL import Image

from rfsr_ext.data import PACKAGED, PHOTOGRAPHS, load_photograph, photographs

SPLITS = ("train", "validation", "test")


def test_splits_are_disjoint_and_complete():
    for a, b in itertools.combinations(SPLITS, 2):
        assert not set(photographs(a)) & set(photographs(b))
    assert sorted(itertools.chain(*map(photographs, SPLITS))) == sorted(PHOTOGRAPHS)
    assert {"coffee", "chelsea", "flower"} <= set(photographs("test"))


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photograph_is_whole_and_documented(name):
    image, photograph = load_photograph(name), PHOTOGRAPHS[name]
    assert image.ndim == 3 and image.shape[2] == 3 and min(image.shape[:2]) >= 256
    assert image.dtype == np.float32
    assert image.min() >= 0 and 0.5 < image.max() <= 1
    assert photograph.tags and photograph.source and photograph.license


def test_photographs_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        load_photograph("coffee")[0, 0] = 0


def test_unknown_names():
    with pytest.raises(ValueError, match="name must be one of .*'coffee'.* got 'tea'"):
        load_photograph("tea")
    with pytest.raises(ValueError, match="split must be 'train', 'validation' or 'test', got 'holdout'"):
        photographs("holdout")


def test_packaged_photographs_have_splits_of_their_own():
    train, test = (photographs(split, packaged=True) for split in ("train", "test"))
    assert sorted(train + test) == sorted(PACKAGED) and len(test) >= 5
    assert not set(PACKAGED) & set(PHOTOGRAPHS)
    assert all(p.tags and p.license and p.path.startswith("usr/share/") for p in PACKAGED.values())


def test_a_packaged_photograph_is_read_and_made_smaller(tmp_path):
    path = tmp_path / PACKAGED["Path"].path
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((500, 3200, 3), 128, np.uint8)).save(path)
    image = load_photograph("Path", tmp_path)
    assert image.shape == (250, 1600, 3) and np.abs(image - 128 / 255).max() < 0.02


def test_a_missing_packaged_photograph_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="'Wood' must be in .*`apt-get download mate-backgrounds`"):
        load_photograph("Wood", tmp_path)
    with pytest.raises(ValueError, match="name must be one of .*got 'Wood'"):
        load_photograph("Wood")
