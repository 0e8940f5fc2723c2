"""Merging, sampling and renaming keep every box, and splits keep their promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit import Dataset, merge, remap, sample
from detkit.data import Sample
from detkit.errors import InvalidValue, UnknownName, UsageError


def dataset(counts: list[list[int]], classes: tuple[str, ...] = ("a", "b", "c"), folder: str = "") -> Dataset:
    """Images that have so many boxes of each class; nothing is on disk."""
    samples = []
    for i, of_image in enumerate(counts):
        names = [name for name, count in zip(classes, of_image, strict=True) for _ in range(count)]
        boxes = np.array([[k, i, k + 2, i + 3] for k in range(len(names))], dtype=np.float64).reshape(-1, 4)
        samples.append(
            Sample(
                path=f"/nowhere/{folder}{i}.jpg",
                width=90,
                height=90,
                boxes=boxes,
                names=tuple(names),
                image_id=f"{folder}{i}.jpg",
                extra={"patient": f"p{i // 3}"},
            )
        )
    return Dataset.from_samples(classes, samples)


IMAGES = st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=6, max_size=60)


@given(IMAGES, st.integers(0, 5))
def test_split_is_exact_and_complete(counts: list[list[int]], seed: int) -> None:
    data = dataset(counts)
    parts = data.split_positions(0.5, 0.3, 0.2, seed=seed)
    assert sorted(i for part in parts for i in part) == list(range(len(data)))
    assert all(abs(len(part) - share * len(data)) < 1 for part, share in zip(parts, (0.5, 0.3, 0.2), strict=True))
    assert parts == data.split_positions(0.5, 0.3, 0.2, seed=seed)


@given(IMAGES, st.integers(0, 5))
def test_no_group_straddles_a_split(counts: list[list[int]], seed: int) -> None:
    data = dataset(counts)
    for group_by in ("patient", r"(\d)"):
        groups = len({name[0] for name in data.image_ids}) if group_by != "patient" else -(-len(data) // 3)
        if groups < 2:
            continue
        first, second = data.split(0.6, 0.4, seed=seed, group_by=group_by)
        assert len(first) + len(second) == len(data)
        of = (lambda s: s.extra["patient"]) if group_by == "patient" else (lambda s: s.image_id[0])
        assert not {of(s) for s in first} & {of(s) for s in second}


def test_groups_still_give_every_class_its_share() -> None:
    rng = np.random.default_rng(0)
    data = dataset(rng.poisson([3, 1, 0.3], size=(600, 3)).tolist())
    train, val, test = data.split(0.7, 0.1, 0.2, group_by="patient")
    for part, share in ((train, 0.7), (val, 0.1), (test, 0.2)):
        assert len(part) == pytest.approx(600 * share, abs=3)
        for name, count in data.boxes_per_class().items():
            assert part.boxes_per_class()[name] == pytest.approx(count * share, rel=0.05, abs=6), name


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("x", "image '0.jpg' does not match"),
        ("(", "no expression"),
        (r"(.*\.)", "1 group"),
        ("patient", "2 group.* cannot be cut into 3"),
    ],
)
def test_groups_that_cannot_be(group_by: str, message: str) -> None:
    data = dataset([[1, 1, 1]] * 6)
    data = replace(data, image_ids=("0.jpg", *(f"{i}.jpg" for i in range(1, 6)))) if group_by != r"(.*\.)" else data
    if group_by == r"(.*\.)":
        data = replace(data, image_ids=tuple(f"a.{i}" for i in range(6)))
    with pytest.raises(UsageError, match=message):
        data.split(0.5, 0.3, 0.2, group_by=group_by)


def test_group_key_that_some_images_lack() -> None:
    data = dataset([[1, 0, 0]] * 4)
    assert data.extra is not None
    data = replace(data, extra=(*data.extra[:3], {}))
    with pytest.raises(InvalidValue, match=r"'3\.jpg' has no such key"):
        data.split(0.5, 0.5, group_by="patient")


def test_merge_matches_classes_by_name() -> None:
    one, two = dataset([[1, 0, 2]] * 3), dataset([[0, 3, 1]] * 2, ("c", "d", "a"), "more/")
    merged = merge([one, two])
    assert merged.classes == ("a", "b", "c", "d")
    assert [s.names for s in merged] == [s.names for s in (*one, *two)]
    assert np.array_equal(merged.boxes, np.concatenate([one.boxes, two.boxes]))
    assert [s.extra for s in merged] == [s.extra for s in (*one, *two)]


def test_merge_joins_splits_of_one_name() -> None:
    def split(data: Dataset, **splits: list[int]) -> Dataset:
        return replace(data, split_indices={name: np.array(at) for name, at in splits.items()})

    one = split(dataset([[1, 0, 0]] * 3), train=[0, 2], val=[1])
    two = split(dataset([[1, 0, 0]] * 3, folder="more/"), train=[1], test=[0])
    merged = merge([one, two, dataset([[1, 0, 0]], folder="rest/")])
    assert {name: part.image_ids for name, part in merged.splits.items()} == {
        "train": ("0.jpg", "2.jpg", "more/1.jpg"),
        "val": ("1.jpg",),
        "test": ("more/0.jpg",),
    }
    assert len(merged) == 7


def test_merge_of_the_same_image_ids() -> None:
    data = dataset([[1, 0, 0]] * 5)
    with pytest.raises(UsageError, match=r"5 image ids.*0\.jpg, 1\.jpg, 2\.jpg; .*--prefix-names"):
        merge([data, data])
    assert merge([data, data], prefixes=["2007", "2012"]).image_ids[4:6] == ("2007/4.jpg", "2012/0.jpg")
    for prefixes in (["a"], ["a", "a"], ["a", "../b"], ["a", ""], ["a", ".."]):
        with pytest.raises(InvalidValue):
            merge([data, data], prefixes=prefixes)
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([])


def test_sample_keeps_proportions_order_and_splits() -> None:
    data = dataset(np.random.default_rng(1).poisson([4, 1, 1], size=(200, 3)).tolist())
    data = replace(data, split_indices={"train": np.arange(150), "val": np.arange(150, 200)})
    few = sample(data, 50)
    assert len(few) == len(sample(data, 0.25)) == 50
    assert sorted(few.image_ids, key=lambda name: int(name[:-4])) == list(few.image_ids)
    assert sum(len(at) for at in few.split_indices.values()) == 50
    assert set(few.splits["val"].image_ids) <= set(data.splits["val"].image_ids)
    for name, count in data.boxes_per_class().items():
        assert few.boxes_per_class()[name] == pytest.approx(count / 4, abs=2)
    assert sample(data, 50, seed=1).image_ids != few.image_ids
    assert sample(data, 200) is data
    for size in (0, 201, -1, 1.5, 1.0 + 1e-9):
        with pytest.raises(InvalidValue, match="from 1 to 200"):
            sample(data, size)


def test_remap_renames_merges_and_drops() -> None:
    data = dataset([[1, 2, 1], [0, 0, 2]])
    data = replace(data, split_indices={"train": np.array([1])})
    assert [s.names for s in remap(data, {"a": "b", "b": "a"})] == [("b", "a", "a", "c"), ("c", "c")]
    merged = remap(data, {"a": "thing", "c": "thing"})
    assert (merged.classes, merged.boxes_per_class()) == (("thing", "b"), {"thing": 4, "b": 2})
    fewer = remap(data, {"a": "A"}, drop=["c"])
    assert fewer.classes == ("A", "b")
    assert [s.names for s in fewer] == [("A", "b", "b"), ()]
    assert fewer.splits["train"].image_ids == ("1.jpg",)
    with pytest.raises(UnknownName, match="no class 'A'; did you mean 'a'"):
        remap(data, {"A": "a"})
    with pytest.raises(UnknownName, match="'x'"):
        remap(data, {}, drop=["x"])
    with pytest.raises(UsageError, match="both renamed and dropped"):
        remap(data, {"a": "b"}, drop=["a"])
    with pytest.raises(InvalidValue, match="not empty"):
        remap(data, {"a": " "})


def test_copied_images_are_files_of_their_own(tiny: Dataset, tmp_path: Path) -> None:
    from detkit import read_dataset, write_dataset

    linked = read_dataset(write_dataset(tiny, tmp_path / "linked"))
    copied = read_dataset(write_dataset(tiny, tmp_path / "copied", images="copy"))
    for before, link, copy in zip(tiny.paths, linked.paths, copied.paths, strict=True):
        assert Path(before).samefile(link)
        assert not Path(before).samefile(copy)
        assert Path(before).read_bytes() == Path(copy).read_bytes()
