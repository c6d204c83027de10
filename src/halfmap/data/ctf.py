"""Parameters of the contrast transfer function of every row, as tensors in house conventions."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from halfmap.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

_SHAPES = {
    "beam_tilt_mrad": (2,),
    "magnification": (2, 2),
}


@dataclass(frozen=True, eq=False)
class CTFParameters:
    """What the contrast transfer function of each of n images depends on.

    Parameters
    ----------
    voltage_kV, cs_mm, amplitude_contrast : Tensor (n,)
        The microscope; amplitude contrast as a fraction.
    pixel_size : Tensor (n,)
        Pixel size of the images in Å.
    defocus_u, defocus_v : Tensor (n,)
        Defocus in Å, positive = underfocus, u >= v.
    defocus_angle : Tensor (n,)
        Degrees from the x axis to the direction of u.
    phase_shift : Tensor (n,)
        Phase shift of a phase plate in degrees.
    b_factor : Tensor (n,)
        Envelope exp(-B k² / 4), Å².
    scale : Tensor (n,)
        Factor on the CTF.
    beam_tilt_mrad : Tensor (n, 2)
        Beam tilt along x and y.
    odd_zernike, even_zernike : Tensor (n, k)
        Coefficients in RELION's order, k = 0 if there are none; zeros fill up shorter vectors.
    magnification : Tensor (n, 2, 2)
        Matrix M that takes Fourier coordinates of the image to true ones; the identity if there is none.

    Raises
    ------
    ShapeError
        If the tensors are not of one length, or of other shapes than these.
    """

    voltage_kV: Tensor
    cs_mm: Tensor
    amplitude_contrast: Tensor
    pixel_size: Tensor
    defocus_u: Tensor
    defocus_v: Tensor
    defocus_angle: Tensor
    phase_shift: Tensor
    b_factor: Tensor
    scale: Tensor
    beam_tilt_mrad: Tensor
    odd_zernike: Tensor
    even_zernike: Tensor
    magnification: Tensor

    def __post_init__(self) -> None:
        n = len(self.defocus_u)
        for field in fields(self):
            found = tuple(getattr(self, field.name).shape)
            if field.name in ("odd_zernike", "even_zernike"):
                good = len(found) == 2 and found[0] == n
            else:
                good = found == (n, *_SHAPES.get(field.name, ()))
            if not good:
                raise ShapeError(f"{field.name} of {n} images has the shape {found}")

    def __len__(self) -> int:
        return len(self.defocus_u)

    def __getitem__(self, index: slice | Tensor) -> CTFParameters:
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def for_ctf(self) -> dict[str, Any]:
        """Keyword arguments of `halfmap.ops.ctf.ctf`, without those that would change nothing."""
        always = ("defocus_u", "defocus_v", "defocus_angle", "amplitude_contrast", "phase_shift")
        arguments = self._microscope() | {name: getattr(self, name) for name in always}
        if self.b_factor.any():
            arguments["b_factor"] = self.b_factor
        if (self.scale != 1).any():
            arguments["scale"] = self.scale
        if self.even_zernike.any():
            arguments["even_zernike"] = self.even_zernike
        return arguments

    def for_odd_aberrations(self) -> dict[str, Any] | None:
        """Keyword arguments of `halfmap.ops.ctf.odd_aberration_phase`, or None if it would be 1."""
        names = ("beam_tilt_mrad", "odd_zernike")
        arguments = {name: getattr(self, name) for name in names if getattr(self, name).any()}
        return self._microscope() | arguments if arguments else None

    def _microscope(self) -> dict[str, Any]:
        arguments = {name: getattr(self, name) for name in ("pixel_size", "voltage_kV", "cs_mm")}
        identity = self.magnification.new_tensor([[1.0, 0.0], [0.0, 1.0]])
        if (self.magnification != identity).any():
            arguments["magnification"] = self.magnification
        return arguments

    def to(self, device: str) -> CTFParameters:
        """Give the same parameters on another device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})
