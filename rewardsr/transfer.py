"""Copies between devices that do not hold up the step."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device.

    To a card it goes by way of page-locked memory: the copy then takes its turn there while the program goes on,
    whereas a copy from ordinary memory waits until everything that was launched before it is done.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        # Contiguous: rows that an expanded tensor shares cannot be copied into locked memory one by one.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
