import itertools

import numpy as np
import pytest

from rfsr_ext.data import PHOTOGRAPHS, load_photograph, photographs

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
