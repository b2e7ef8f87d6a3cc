r"""What every task family must do; a family is tested by being registered."""

import numpy as np
import pytest
import torch

from mirror_opt.errors import InputError
from mirror_opt.fewshot import SPLITS, TASKS, Episodes, ImageSet, ImageTasks, make_task


@pytest.fixture(params=sorted(TASKS))
def build(request, image_folder, omniglot_folder):
    r"""Makes the family with one shot and one query of each class, on its smallest data."""
    options = {
        "folder": {"data_dir": image_folder},
        "omniglot": {"data_dir": omniglot_folder, "validation": 100},
    }.get(request.param, {})
    return lambda **more: make_task(request.param, **{"shots": 1, "queries": 1, **options, **more})


def same(one: Episodes, other: Episodes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_sample_is_a_pure_function_of_its_arguments(build):
    family, again = build(seed=3), build(seed=3)
    first = family.sample("test", 7, 3)
    family.sample("train", 0, 2)
    assert same(first, family.sample("test", 7, 3))
    assert same(first, again.sample("test", 7, 3))


def test_sample_leaves_global_generators_alone(build):
    family = build()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    family.sample("train", 0, 2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_more_tasks_only_append(build):
    family = build()
    many = family.sample("train", 2, 5)
    for tasks in (1, 3):
        few = family.sample("train", 2, tasks)
        assert same(few, Episodes(*(x[:tasks] for x in many)))


def test_every_argument_changes_the_tasks(build):
    family = build()
    base = family.sample("train", 0, 2).support_x
    others = [
        family.sample("train", 1, 2).support_x,
        family.sample("test", 0, 2).support_x,
        build(seed=1).sample("train", 0, 2).support_x,
        base.flip(0),
    ]
    assert all(not torch.equal(base, other) for other in others)


@pytest.mark.parametrize("split", SPLITS)
def test_shapes_dtypes_and_labels(build, split):
    family = build()
    assert split in family.splits
    episodes = family.sample(split, 0, 3)
    count = family.ways or 1
    assert episodes.tasks == 3
    for x, y, each in (
        (episodes.support_x, episodes.support_y, family.shots),
        (episodes.query_x, episodes.query_y, family.queries),
    ):
        assert x.dtype == torch.float32
        assert x.shape == (3, count * each, *family.input_shape)
        assert x.is_contiguous()
        if family.metric == "accuracy":
            assert y.dtype == torch.int64
            assert y.tolist() == [[c for c in range(count) for _ in range(each)]] * 3
            assert 0 <= x.min() < x.max() <= 1
        else:
            assert y.dtype == torch.float32
            assert y.shape == (3, each, family.output_size)


def test_model_loss_and_metric_fit_the_episodes(build):
    family = build()
    x, y, _, _ = family.sample("train", 0, 1)
    prediction = family.model()(x[0])
    assert prediction.shape == (len(x[0]), family.output_size)
    loss, metric = family.loss_fn(prediction, y[0]), family.metric_fn(prediction, y[0])
    assert loss.shape == metric.shape == ()
    loss.backward()
    target = y[0] if family.metric == "mse" else torch.eye(family.output_size)[y[0]]
    best = family.metric_fn(target, y[0])
    assert best == (0 if family.metric == "mse" else 1)
    target[0] = torch.nan
    assert family.metric_fn(target, y[0]).isnan()  # and not the luck of the first class


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", 0, 1), "no split 'dev'"),
        (("train", -1, 1), "index is -1"),
        (("train", 0, 0), "tasks is 0"),
        (("train", 0, 1.5), "tasks is 1.5"),
    ],
)
def test_sample_refuses(build, arguments, message):
    with pytest.raises(InputError, match=message):
        build().sample(*arguments)


@pytest.mark.parametrize("option", ["shots", "queries"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_counts_must_be_whole_and_positive(build, option, value):
    with pytest.raises(InputError, match=f"{option} is {value}"):
        build(**{option: value})


def test_seed_must_not_be_negative(build):
    with pytest.raises(InputError, match="seed is -1"):
        build(seed=-1)


def test_make_task_refuses_unknown_names_and_options():
    with pytest.raises(InputError, match="unknown task 'cats': choose from sinusoid, glyphs"):
        make_task("cats")
    with pytest.raises(InputError, match="sinusoid has no option ways"):
        make_task("sinusoid", ways=5)
    with pytest.raises(InputError, match="glyphs has no option data_dir"):
        make_task("glyphs", data_dir="data")
    with pytest.raises(InputError, match="folder has no option download"):
        make_task("folder", download=True)
    with pytest.raises(InputError, match="glyphs has no option colour"):
        make_task("glyphs", colour="red")


class Numbered(ImageTasks):
    r"""Images whose first pixel numbers the class and whose others number the image."""

    name = "numbered"

    def __init__(self, counts=(4, 5, 6), **options):
        images = np.zeros((sum(counts), 1, 2, 2), dtype=np.uint8)
        ends = np.cumsum(counts)
        members = tuple(np.split(np.arange(sum(counts)), ends[:-1]))
        for c, indices in enumerate(members):
            images[indices, 0, 0, 0] = c + 1
            images[indices, 0, 1, 1] = indices
        names = tuple("abcdef"[: len(counts)])
        options = {"ways": 3, "shots": 1, "queries": 3, "seed": 0} | options
        super().__init__({"train": ImageSet(images, members, names)}, **options)


def test_support_and_query_are_different_images_of_one_class():
    family = Numbered()
    episodes = family.sample("train", 0, 20)
    pixels = (torch.cat([episodes.support_x, episodes.query_x], 1) * 255).round().int()[:, :, 0]
    labels = torch.cat([episodes.support_y, episodes.query_y], 1)
    orders = set()
    for task in range(20):
        assert len(set(pixels[task, :, 1, 1].tolist())) == 3 * 4
        shown = [set(pixels[task, labels[task] == c, 0, 0].tolist()) for c in range(3)]
        assert all(len(classes) == 1 for classes in shown)
        orders.add(tuple(classes.pop() for classes in shown))
    assert len(orders) > 1  # a class does not always have one label


def test_rotations_are_classes_of_their_own():
    family = Numbered(rotations=True, ways=12)
    assert family.classes("train")[:4] == ("a", "b", "c", "a turned 90")
    assert len(family.classes("train")) == 12
    x = (family.sample("train", 0, 1).support_x[0, :, 0] * 255).round().int()
    seen = set()
    for image in x:
        # The pixel that numbers the class goes round against the clock.
        turns = [k for k in range(4) if torch.rot90(image, -k)[0, 1] == 0]
        turns = [k for k in turns if 1 <= torch.rot90(image, -k)[0, 0] <= 3]
        seen.add((int(image.max()), *turns))
    assert len(seen) >= 8
    corners = x.reshape(12, 4).bool().float().mean(0)
    assert corners.tolist() == [0.5] * 4


def test_ways_larger_than_the_classes():
    with pytest.raises(InputError, match="ways is 4, but split 'train' of numbered has 3 classes"):
        Numbered(ways=4)
    assert Numbered(ways=4, rotations=True).ways == 4


def test_a_class_with_too_few_images_is_named():
    message = "class 'b' in split 'train' of numbered has 2 images, but 1 shots and 3 queries need"
    with pytest.raises(InputError, match=message):
        Numbered(counts=(4, 2, 5))


def test_episodes_move_and_convert():
    episodes = make_task("glyphs").sample("train", 0, 1).to("meta", torch.float64)
    assert all(x.device.type == "meta" for x in episodes)
    assert episodes.query_x.dtype == torch.float64
    assert episodes.query_y.dtype == torch.int64


class Corners(ImageTasks):
    """Two classes of one image in two copies, and each of them turned."""

    name = "corners"
    bases = torch.tensor([[[255, 51], [0, 0]], [[255, 0], [102, 153]]])

    def __init__(self):
        images = self.bases.repeat_interleave(2, 0)[:, None].byte().numpy()
        members = (np.array([0, 1]), np.array([2, 3]))
        sets = {"train": ImageSet(images, members, ("a", "b"))}
        super().__init__(sets, ways=8, shots=1, queries=1, seed=0, rotations=True)


def test_every_class_is_turned_by_what_its_name_says():
    corners = Corners()
    names = corners.classes("train")
    drawn = np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, 0, 0]))
    x = corners.sample("train", 0, 1).support_x[0, :, 0]
    for image, c in zip(x, drawn.choice(8, 8, replace=False), strict=True):
        letter, *turned = names[c].split(" turned ")
        base = Corners.bases["ab".index(letter)]
        torch.testing.assert_close(image, torch.rot90(base, int(*turned or [0]) // 90) / 255)
