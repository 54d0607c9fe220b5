"""The bank of generated batches."""

from __future__ import annotations

import pytest
import torch

from adadfq.bank import ImageBank
from adadfq.errors import InvalidInputError


def _batch(i: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    images = torch.full((2, 3, 4, 4), float(i)).contiguous(memory_format=torch.channels_last)
    images[1] += 0.5
    return images, torch.full((2, 5), float(i)), [torch.full((2, 6, 2, 2), float(i)), torch.full((2, 7), float(i))]


def test_a_drawn_batch_is_one_that_was_stored_with_all_that_belongs_to_it() -> None:
    bank, random = ImageBank(3), torch.Generator().manual_seed(0)
    seen = set()
    for i in range(5):
        bank.store(*_batch(i))
        for _ in range(30):
            images, logits, features = bank.draw(random)
            found = int(images[0, 0, 0, 0])
            expected = _batch(found)
            for a, b in zip((images, logits, *features), (expected[0], expected[1], *expected[2]), strict=True):
                torch.testing.assert_close(a, b)
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert max(0, i - 2) <= found <= i
            seen.add((i, found))
    assert seen == {(i, j) for i in range(5) for j in range(max(0, i - 2), i + 1)}


def test_what_is_stored_is_a_copy_without_gradients() -> None:
    bank = ImageBank(2)
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    bank.store(images * 2, torch.zeros(2, 5))
    with torch.no_grad():
        images.zero_()
    drawn, _, features = bank.draw(torch.Generator())
    assert not drawn.requires_grad
    assert features == []
    assert bool((drawn == 2).all())


def test_state_makes_an_equal_bank() -> None:
    bank, twin = ImageBank(2), ImageBank(2)
    for i in range(3):
        bank.store(*_batch(i))
    twin.load_state(bank.state(), torch.device("cpu"))
    random = [torch.Generator().manual_seed(4) for _ in range(2)]
    for _ in range(8):
        assert torch.equal(bank.draw(random[0])[0], twin.draw(random[1])[0])
    empty = ImageBank(2)
    empty.load_state(ImageBank(2).state(), torch.device("cpu"))
    empty.store(*_batch(1))
    assert bool((empty.draw(random[0])[1] == 1).all())


def test_a_bank_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="bank_batches must be at least 1"):
        ImageBank(0)
