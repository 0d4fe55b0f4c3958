"""Fourier transforms, along the rows and beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.oracle import H, case

X = (2, 3, H, 5)


def seen(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part."""
    return x.real, x.imag


def filtered(x: Tensor, w: Tensor) -> Tensor:
    """There and back, with a weight for each frequency."""
    spectrum = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho") * torch.complex(w, w + 1)
    return torch.fft.irfftn(spectrum, s=x.shape[-2:], dim=(-2, -1), norm="ortho")


CASES = {
    "fft of columns": case(lambda x: seen(torch.fft.fft(x)), X, p2p=0),
    "fft of rows": case(lambda x: seen(torch.fft.fft(x, dim=2)), X),
    "fft of more rows": case(lambda x: seen(torch.fft.fft(x, 9, 2)), X),
    "fft of channels": case(lambda x: seen(torch.fft.fft(x, dim=1, norm="forward")), X, p2p=0),
    "ifft of rows": case(lambda x, y: seen(torch.fft.ifft(torch.complex(x, y), dim=-2)), X, X, sharded=2),
    "rfft of rows": case(lambda x: seen(torch.fft.rfft(x, dim=-2)), X),
    "irfft of rows": case(lambda x: torch.fft.irfft(x, n=7, dim=-2), X),
    "fft2": case(lambda x: seen(torch.fft.fft2(x)), X),
    "rfft2 of some": case(lambda x: seen(torch.fft.rfft2(x, s=(3, 4))), X),
    "fftn of pixels": case(lambda x: seen(torch.fft.fftn(x, s=(4, 5))), X),
    "fftn of all": case(lambda x: seen(torch.fft.fftn(x)), X, fallback="fft_fftn"),
    "fft2 of columns sharded": case(lambda x: seen(torch.fft.fft2(x)), (1, 5, 3, H), dim=-1),
    "filtered": case(filtered, X, (H, 3)),
    "autocorrelation": case(lambda x: torch.fft.ifft2(torch.fft.fft2(x).abs().square()).real, X),
    "fftshift": case(lambda x: torch.fft.fftshift(x, dim=(-2, -1)), X),
    "fftshift of all": case(lambda x: torch.fft.fftshift(x), X),
    "ifftshift of rows": case(lambda x: torch.fft.ifftshift(x, dim=2), X),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fourier(case: Callable[[], None]) -> None:
    case()
