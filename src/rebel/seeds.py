"""Seeds of streams of random numbers that must not meet."""

from __future__ import annotations


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, so that neighbouring numbers give unrelated streams."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 31
    return state >> 1
