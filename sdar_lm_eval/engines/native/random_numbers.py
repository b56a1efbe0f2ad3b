"""Counter-based random numbers: Philox 4x32-10 on tensors.

A counter-based generator has no state. The number for (seed, position, step) is the same in any batch, after a
preemption, and on any device.

Source: Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 3.3.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

# Purposes of a number: two numbers for one (seed, position, step) are independent if their purposes differ.
DRAW, ORDER = 0, 1


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Ten rounds of Philox 4x32.

    Args:
        counter: int64 (..., 4), each a 32-bit word.
        key: int64 (..., 2), each a 32-bit word.

    Returns:
        int64 (..., 4), each a 32-bit word.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 overflows, but the low 64 bits of the product are right. The mask drops the sign bits that >> copies.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniform(seed: torch.Tensor, position: torch.Tensor, step: torch.Tensor, purpose: int) -> torch.Tensor:
    """Draw float32 numbers in [0, 1) with 24 random bits each.

    Args:
        seed: int64 (...), of the request.
        position: int64 (...), of the token in its sequence.
        step: int64 (...), denoising step in the block.
        purpose: DRAW or ORDER.
    """
    shape = (seed + position + step).shape
    words = (position, step, torch.full_like(step, purpose), torch.zeros_like(step))
    counter = torch.stack([word.expand(shape) for word in words], dim=-1)
    key = torch.stack([(seed & _WORD).expand(shape), ((seed >> 32) & _WORD).expand(shape)], dim=-1)
    return (philox(counter, key)[..., 0] >> 8).to(torch.float32) * 2.0**-24
