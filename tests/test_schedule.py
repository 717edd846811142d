"""Schedules and batch order: pure functions of the step."""

import math
from argparse import Namespace

import pytest
import torch

from utils.data_utils import batch_index
from utils.scheduler import from_flags, learning_rate
from utils.seeds import seed_of

RUN = dict(base_lr=0.03, num_steps=1000, warmup_steps=100)


@pytest.mark.parametrize("decay_type", ["cosine", "linear"])
def test_end_points(decay_type):
    assert learning_rate(1, decay_type=decay_type, **RUN) == pytest.approx(0.03 / 100)
    assert learning_rate(100, decay_type=decay_type, **RUN) == pytest.approx(0.03)
    assert learning_rate(550, decay_type=decay_type, **RUN) == pytest.approx(0.03 / 2)
    assert learning_rate(1000, decay_type=decay_type, **RUN) == pytest.approx(0.0)
    assert learning_rate(1000, decay_type=decay_type, min_lr=1e-5, **RUN) == pytest.approx(1e-5)
    assert learning_rate(50, decay_type=decay_type, warmup_lr=0.01, **RUN) == pytest.approx(0.02)


def test_cosine_is_a_cosine():
    for step in range(100, 1001):
        expected = 0.015 * (1 + math.cos(math.pi * (step - 100) / 900))
        assert learning_rate(step, **RUN) == pytest.approx(expected)


def test_no_warmup_and_unknown_decay():
    assert learning_rate(1, base_lr=1.0, num_steps=1, warmup_steps=0) == 0.0
    with pytest.raises(ValueError, match="unknown decay type 'step'"):
        learning_rate(500, decay_type="step", **RUN)


def test_epoch_wise_rates_as_dems_has_them():
    """linspace over the epochs of the warm-up, then a cosine over the others, one rate an epoch."""
    run = dict(base_lr=1.0, num_steps=100, warmup_steps=30, warmup_lr=0.1, min_lr=0.2)
    rates = [learning_rate(step, steps_per_epoch=10, **run) for step in range(1, 101)]
    assert all(len(set(rates[i : i + 10])) == 1 for i in range(0, 100, 10))
    assert rates[:30:10] == pytest.approx([0.1, 0.55, 1.0])
    assert rates[30::10] == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * i / 7)) for i in range(7)])
    for warmup, expected in ((0.04, 1.0), (5, 1.0), (10, 1.0), (12, 0.1)):  # an epoch or less has no rate to rise from
        assert learning_rate(1, steps_per_epoch=10, **run | dict(warmup_steps=warmup)) == pytest.approx(expected)


@pytest.mark.parametrize("warmup_epochs, warmup_lr", [(0, 0.0), (3, 1e-6)])
def test_the_cosine_of_timm(warmup_epochs, warmup_lr):
    scheduler = pytest.importorskip("timm.scheduler")
    epochs, per_epoch = 20, 7
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.002)
    theirs = scheduler.CosineLRScheduler(
        optimizer, epochs, lr_min=1e-5, warmup_t=warmup_epochs, warmup_lr_init=warmup_lr
    )
    run = dict(base_lr=0.002, num_steps=epochs * per_epoch, warmup_steps=warmup_epochs * per_epoch, min_lr=1e-5)
    for step in range(epochs * per_epoch):
        theirs.step(step / per_epoch)  # as vitookit does before every update
        ours = learning_rate(step + 1, decay_type="timm", warmup_lr=warmup_lr, **run)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("decay_by", ["step", "epoch"])
def test_flags_of_the_schedule(decay_by):
    rates = dict(min_lr=0.001, warmup_lr=0.01)
    words = dict(num_steps=1000, warmup_steps=100, decay_type="linear", **rates)
    rate = from_flags(Namespace(learning_rate=0.03, epochs=20.0, decay_by=decay_by, **words))
    per_epoch = 50 if decay_by == "epoch" else None
    for step in (1, 50, 99, 100, 101, 555, 1000):
        assert rate(step) == learning_rate(step, base_lr=0.03, steps_per_epoch=per_epoch, **words)
    if decay_by == "epoch":  # 17 / (17 / 7) is more than 7
        rate = from_flags(Namespace(learning_rate=0.03, epochs=17 / 7, decay_by=decay_by, **words | dict(num_steps=17)))
        assert rate(7) != rate(8) == rate(14) != rate(15)


def test_each_epoch_and_seed_has_an_order_of_its_own():
    orders = [batch_index(epoch, 10, 10, seed).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(orders.count(order) == 1 for order in orders)


def test_seeds_differ_by_each_part_of_the_key():
    keys = [(seed, purpose, step) for seed in range(5) for purpose in range(4) for step in range(50)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
