"""What messages are made of, and which errors mean that memory was not enough."""

import errno

import pytest
import torch

from rewardsr.errors import UserError, is_out_of_memory, printable


def caught(call) -> BaseException:
    with pytest.raises(BaseException) as raised:
        call()
    return raised.value


def test_real_errors_of_memory_are_known() -> None:
    for call in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)):
        assert is_out_of_memory(caught(call))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_memory(error, expected) -> None:
    assert is_out_of_memory(error) is expected


def test_messages_are_one_line_without_what_steers_a_terminal() -> None:
    text = "a\nb\x1b[31m\udcff\x9b é 日本 😀"
    assert printable(text) == r"a\nb\x1b[31m\udcff\x9b é 日本 😀"
    assert str(UserError(f"no '{text}'")) == f"no '{printable(text.replace(chr(10), ' '))}'"
    assert str(UserError("size mismatch:\n\tgot  2,\r\n\n  expected 3")) == "size mismatch: got  2, expected 3"
