import itertools
import random

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from elt_lightning.data.base import AskedByNumbers, HeldOutOrder, TensorBatches, TrainingOrder
from elt_lightning.data.toy.digits import DigitsDataModule
from elt_lightning.errors import UserError
from elt_lightning.training.trainer_settings import count_in_steps


def micro_batches(samples: int, batch: int, micro: int, world: int, seed: int, epoch: int = 0) -> list[list[list[int]]]:
    """For each rank the micro-batches of a whole epoch."""
    ranks = []
    for rank in range(world):
        order = TrainingOrder(samples, batch, micro, rank, world, seed, lambda: epoch * (samples // batch))
        ranks.append(list(order))
        assert len(order) == len(ranks[-1])
    return ranks


def val_batches(samples: int, batch: int, world: int) -> list[list[list[int]]]:
    """For each rank its batches."""
    orders = [HeldOutOrder(samples, batch, rank, world) for rank in range(world)]
    ranks = [list(order) for order in orders]
    assert [len(order) for order in orders] == [len(rank) for rank in ranks]
    return ranks


def test_samples_without_number_are_asked_for_as_they_come() -> None:
    order = HeldOutOrder(10**15, 3, 1, 2)
    assert next(iter(order)) == [1, 3, 5]
    assert len(order) == 166_666_666_666_667


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 6), (2, 12), (2, 3), (3, 4), (4, 6), (24, 1)])
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("samples", [24, 100, 240])
def test_every_split_over_ranks_and_micro_batches_makes_the_same_global_batches(
    world: int, micro: int, seed: int, samples: int
) -> None:
    (whole,) = micro_batches(samples, 24, 24, 1, seed, epoch=3)
    ranks = micro_batches(samples, 24, micro, world, seed, epoch=3)
    accumulated = 24 // (world * micro)
    assert {len(rank) for rank in ranks} == {len(whole) * accumulated}
    assert all(len(part) == micro for rank in ranks for part in rank)
    for number, batch in enumerate(whole):
        parts = [i for rank in ranks for part in rank[number * accumulated : (number + 1) * accumulated] for i in part]
        assert sorted(parts) == sorted(batch)


@pytest.mark.parametrize(("samples", "batch"), [(64, 16), (103, 10), (10, 10)])
@pytest.mark.parametrize("seed", range(3))
def test_an_epoch_shows_no_sample_twice_and_leaves_out_less_than_a_batch(samples: int, batch: int, seed: int) -> None:
    (batches,) = micro_batches(samples, batch, batch, 1, seed)
    shown = list(itertools.chain(*batches))
    assert len(batches) == samples // batch
    assert len(set(shown)) == len(shown) == samples - samples % batch
    assert set(shown) <= set(range(samples))


def test_over_epochs_every_sample_is_shown_about_equally_often() -> None:
    shown = torch.zeros(103)
    for epoch in range(60):
        (batches,) = micro_batches(103, 10, 10, 1, 1, epoch)
        shown[list(itertools.chain(*batches))] += 1
    assert shown.min() >= 60 - 10
    assert shown.max() <= 60


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(itertools.chain(*micro_batches(200, 20, 20, 1, seed, epoch)[0]))
        for seed in (0, 1, 2**31 - 1)
        for epoch in (0, 1, 2, 3)
    }
    assert len(set(orders.values())) == len(orders)
    torch.manual_seed(random.randrange(1000))
    again = micro_batches(200, 20, 20, 1, 1, 2)[0]
    assert tuple(itertools.chain(*again)) == orders[1, 2]


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("done", [0, 1, 7, 9])
def test_a_pass_begins_at_the_step_that_the_trainer_has_reached(done: int, epoch: int) -> None:
    """Ten steps of two micro-batches make an epoch."""
    step = 0
    order = TrainingOrder(100, 10, 5, 0, 1, 4, lambda: step)
    step = 10 * epoch
    whole = list(order)
    step = 10 * epoch + done
    assert list(order) == whole[2 * done :]


@pytest.mark.parametrize(("samples", "batch", "world"), [(100, 12, 2), (7, 1, 4), (50, 8, 1), (96, 4, 3)])
def test_all_val_samples_are_shown_once_in_stored_order(samples: int, batch: int, world: int) -> None:
    ranks = val_batches(samples, batch, world)
    assert sorted(i for rank in ranks for part in rank for i in part) == list(range(samples))
    for rank in ranks:
        shown = list(itertools.chain(*rank))
        assert shown == sorted(shown)
        assert all(len(part) <= batch for part in rank)


@pytest.mark.parametrize(("samples", "batch", "world"), [(65, 32, 2), (7, 1, 4), (50, 6, 4), (9, 4, 3), (2, 5, 4)])
def test_no_rank_is_handed_an_empty_val_batch(samples: int, batch: int, world: int) -> None:
    ranks = val_batches(samples, batch, world)
    assert all(part for rank in ranks for part in rank)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_a_loader_over_the_order_gives_whole_batches_with_their_places(workers: int, dtype: torch.dtype) -> None:
    x = torch.randint(0, 200, (30, 4)).to(dtype)
    labels = torch.randint(0, 9, (30,), dtype=torch.uint8)
    order = TrainingOrder(30, 10, 5, 1, 2, seed=3)
    loader = DataLoader(AskedByNumbers(TensorBatches(x, labels)), sampler=order, batch_size=None, num_workers=workers)
    assert len(loader) == 3
    for batch, index in zip(loader, map(torch.tensor, order), strict=True):
        assert torch.equal(batch.indices, index)
        assert torch.equal(batch.x, x[index].float() if dtype.is_floating_point else x[index].long())
        assert batch.x.dtype == (torch.float32 if dtype.is_floating_point else torch.int64)
        assert torch.equal(batch.labels, labels[index].long())


@pytest.mark.parametrize(("micro", "interval", "expected"), [(None, 6, 6), (8, 6, 12), (4, 6, 24), (4, 0.5, 0.5)])
def test_validation_comes_after_so_many_optimiser_steps_however_they_are_made(
    micro: int | None, interval: float, expected: float
) -> None:
    module = DigitsDataModule(batch_size=16, micro_batch_size=micro)
    every = None if interval == 6 else 1
    trainer = Trainer(logger=False, accelerator="cpu", val_check_interval=interval, check_val_every_n_epoch=every)
    if micro:
        with pytest.raises(UserError, match=rf"Trainer\(accumulate_grad_batches={16 // micro}\)"):
            module.training_micro_batch(trainer)
    count_in_steps(trainer, module.share_batch(1)[1])
    assert trainer.val_check_interval == expected
    assert module.training_micro_batch(trainer) == (micro or 16)
