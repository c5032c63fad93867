"""What "auto" makes of a CUDA card: bf16 only where the card computes in it."""

import logging

import pytest
import torch

from rewardsr import pipelines
from rewardsr.pipelines import choose_device


@pytest.fixture
def card(monkeypatch):
    """A card of some generation, as far as the choice of a precision looks at it."""

    def make(name: str, computes: bool) -> None:
        def supported(including_emulation: bool = True) -> bool:
            return computes or including_emulation

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        pipelines._has_bf16.cache_clear()

    yield make
    pipelines._has_bf16.cache_clear()


def test_a_card_that_only_emulates_bf16_gets_fp32_and_is_told_why_once(card, caplog) -> None:
    card("Tesla T4", computes=False)
    with caplog.at_level(logging.WARNING, "rewardsr"):
        for _ in range(2):
            assert choose_device("auto", "auto") == (torch.device("cuda", 0), torch.float32)
    (said,) = caplog.messages
    assert "cuda:0 (Tesla T4) does not compute in bf16" in said and "twice the memory" in said


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_that_was_asked_for_is_taken(card, caplog, precision, dtype) -> None:
    card("Tesla T4", computes=False)
    assert choose_device("cuda", precision)[1] is dtype
    assert not caplog.messages


def test_a_card_that_computes_in_bf16_gets_it(card, caplog) -> None:
    card("NVIDIA A100", computes=True)
    assert choose_device("auto", "auto") == (torch.device("cuda", 0), torch.bfloat16)
    assert not caplog.messages
    assert choose_device("cpu", "auto")[1] is torch.float32
