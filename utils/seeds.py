"""Randomness: every choice is drawn from a seed made of (seed, purpose, step), so a step can be repeated by itself."""

import numpy as np
import torch

ORDER, AUGMENT, HOLD_OUT, DROPOUT, MIX = range(5)  # purposes; their numbers are part of every run's results


def seed_of(*key: int) -> int:
    """A 63-bit seed from whole numbers such as (seed, purpose, step); other keys give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key: int) -> torch.Generator:
    """A generator on the CPU, seeded with `seed_of(*key)`."""
    return torch.Generator().manual_seed(seed_of(*key))
