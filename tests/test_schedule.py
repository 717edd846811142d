"""Schedules and batch order: pure functions of the step."""

import math

import pytest
import torch

from utils.data_utils import batch_index, seed_of
from utils.scheduler import learning_rate

RUN = dict(base_lr=0.03, num_steps=1000, warmup_steps=100)


@pytest.mark.parametrize("decay_type, middle", [("cosine", 0.5), ("linear", 0.5)])
def test_end_points(decay_type, middle):
    assert learning_rate(1, decay_type=decay_type, **RUN) == pytest.approx(0.03 / 100)
    assert learning_rate(100, decay_type=decay_type, **RUN) == pytest.approx(0.03)
    assert learning_rate(550, decay_type=decay_type, **RUN) == pytest.approx(0.03 * middle)
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


@pytest.mark.parametrize("n, batch", [(10, 3), (10, 10), (7, 20), (100, 1)])
def test_every_epoch_sees_every_image_once(n, batch):
    steps = -(-3 * n // batch)
    order = torch.cat([batch_index(step, batch, n, seed=1) for step in range(steps)])
    assert all(len(batch_index(step, batch, n, seed=1)) == batch for step in range(steps))
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    if n > 3:
        assert order[:n].tolist() != order[n : 2 * n].tolist()
        assert order[:n].tolist() != torch.cat([batch_index(s, n, n, seed=2) for s in range(1)]).tolist()


def test_seeds_differ_by_each_part_of_the_key():
    keys = [(seed, purpose, step) for seed in range(5) for purpose in range(4) for step in range(50)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
