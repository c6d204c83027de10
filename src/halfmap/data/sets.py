"""Movies, micrographs and particles: two tables each, optics groups and rows, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import polars as pl

from halfmap.data import views
from halfmap.data.columns import COLUMNS
from halfmap.data.optics import check_groups, check_optics, per_row
from halfmap.errors import ParameterError, TableError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from halfmap.data.ctf import CTFParameters
    from halfmap.data.poses import Poses

_REMEDIES = {
    "rlnAngleRot": "refine the particles first, or import them with their poses",
    "rlnDefocusU": "estimate the CTF first",
    "rlnDefocusV": "estimate the CTF first",
    "rlnDefocusAngle": "estimate the CTF first",
    "rlnRandomSubset": "split the particles into half sets first",
    "rlnImageSize": "add the box size of the stack to the optics table",
}


@dataclass(frozen=True, eq=False)
class TableSet:
    """What movies, micrographs and particles share.

    Parameters
    ----------
    optics : DataFrame
        One row an optics group, RELION's labels without the underscore.
    rows : DataFrame
        One row an item; ``rlnOpticsGroup`` refers to the optics. Columns that Halfmap does not know survive.
    path : path, optional
        File that the tables were read from, for errors.

    Raises
    ------
    TableError
        If there are no rows, a row refers to no optics group, a group comes twice, a pixel size is NaN or
        not positive, or the columns that say which items these are are missing.
    """

    optics: pl.DataFrame
    rows: pl.DataFrame
    path: Path | None = None

    items: ClassVar[str] = "rows"
    block: ClassVar[str] = ""
    pixel_column: ClassVar[str] = "rlnImagePixelSize"
    required: ClassVar[tuple[tuple[str, ...], ...]] = ((),)
    foreign: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.rows.is_empty():
            raise TableError(f"no {self.items}", path=self.path, hint="the table or the selection is empty")
        check_optics(self.optics, path=self.path)
        check_groups(self.rows, self.optics, path=self.path)
        if not self.holds(self.rows.columns):
            names = " or ".join(" and ".join(f"_{label}" for label in labels) for labels in self.required)
            raise TableError(f"the {self.items} lack {names}", path=self.path, hint="is it the right file?")

    @classmethod
    def holds(cls, columns: list[str]) -> bool:
        """Whether rows of these columns may be such items."""
        return any(set(labels) <= set(columns) for labels in cls.required) and not set(cls.foreign) & set(
            columns
        )

    def __len__(self) -> int:
        return self.rows.height

    def column(self, label: str, *, default: float | str | None = None) -> pl.Series:
        """Value of a column for every row, from the rows or else from their optics groups.

        Raises
        ------
        TableError
            If neither table has the column and there is no default.
        """
        if label in self.rows.columns:
            return self.rows[label]
        if label in self.optics.columns:
            return per_row(label, self.rows, self.optics)
        if default is None:
            where = "optics table" if label in COLUMNS and COLUMNS[label].table == "optics" else "rows"
            hint = _REMEDIES.get(label, f"add _{label} to the {where}")
            raise TableError(f"no _{label} for the {self.items}", path=self.path, hint=hint)
        return pl.Series(label, [default]).new_from_index(0, len(self))

    def single(self, label: str) -> float:
        """Value of an optics column that all rows share.

        Raises
        ------
        TableError
            If the column is missing or the optics groups of the rows differ in it.
        """
        values = self.column(label).unique().sort()
        if len(values) != 1:
            raise TableError(
                f"_{label} differs between optics groups: {', '.join(map(str, values))}",
                path=self.path,
                hint="split the set by optics group, or rescale the images to one size",
            )
        return values.item()

    @property
    def pixel_size(self) -> float:
        """Pixel size in Å that all rows share.

        Raises
        ------
        TableError
            If it is not known or the optics groups of the rows differ in it.
        """
        return float(self.single(self.pixel_column))

    def select(self, mask: pl.Expr | pl.Series | np.ndarray | Tensor) -> Self:
        """Rows for which a condition holds, in order, with all optics groups.

        Parameters
        ----------
        mask : Expr, or boolean Series, array or tensor (n,)

        Raises
        ------
        ParameterError
            If the mask is not boolean or of another length.
        TableError
            If no row is left.
        """
        if not isinstance(mask, pl.Expr):
            mask = pl.Series(mask if isinstance(mask, pl.Series) else mask.tolist())
            if mask.dtype != pl.Boolean or len(mask) != len(self):
                raise ParameterError(
                    f"a mask of {len(mask)} {mask.dtype} does not select from {len(self)} rows"
                )
        # Row numbers no longer are those of the file.
        return replace(self, rows=self.rows.filter(mask), path=None)

    def with_rows(self, rows: pl.DataFrame) -> Self:
        """Give the same optics with other rows."""
        return replace(self, rows=rows)

    def with_columns(self, *columns: pl.Expr | pl.Series) -> Self:
        """Add or replace columns of the rows."""
        return replace(self, rows=self.rows.with_columns(*columns))


@dataclass(frozen=True, eq=False)
class MovieSet(TableSet):
    """Movies; see `TableSet`."""

    items: ClassVar[str] = "movies"
    block: ClassVar[str] = "movies"
    pixel_column: ClassVar[str] = "rlnMicrographOriginalPixelSize"
    required: ClassVar[tuple[tuple[str, ...], ...]] = (("rlnMicrographMovieName",),)


@dataclass(frozen=True, eq=False)
class MicrographSet(TableSet):
    """Micrographs; see `TableSet`."""

    items: ClassVar[str] = "micrographs"
    block: ClassVar[str] = "micrographs"
    pixel_column: ClassVar[str] = "rlnMicrographPixelSize"
    required: ClassVar[tuple[tuple[str, ...], ...]] = (("rlnMicrographName",),)
    foreign: ClassVar[tuple[str, ...]] = ("rlnImageName", "rlnCoordinateX")

    @property
    def ctf(self) -> CTFParameters:
        """CTF of every micrograph; see `ParticleSet.ctf`."""
        return views.ctf(self)

    def with_ctf(self, ctf: CTFParameters) -> Self:
        """Write CTF parameters back; see `ParticleSet.with_ctf`."""
        return views.with_ctf(self, ctf)


@dataclass(frozen=True, eq=False)
class ParticleSet(TableSet):
    """Particles, extracted (with image names) or picked (with micrograph names); see `TableSet`."""

    items: ClassVar[str] = "particles"
    block: ClassVar[str] = "particles"
    required: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("rlnImageName",),
        ("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY"),
    )

    @property
    def box_size(self) -> int:
        """Box size in pixels that all particles share.

        Raises
        ------
        TableError
            If it is not known or the optics groups of the particles differ in it.
        """
        return int(self.single("rlnImageSize"))

    @property
    def poses(self) -> Poses:
        """Rotations and shifts, float32.

        Without origins the shifts are zero; with psi alone (2D classes) rot and tilt are.

        Raises
        ------
        TableError
            If there are no angles, or one is NaN.
        """
        return views.poses(self)

    def with_poses(self, poses: Poses) -> Self:
        """Write rotations and shifts back as Euler angles and origins in Å.

        Angles from float32 rotations are rounded to six decimals, below their precision. What the table says
        of its poses, their errors and how probable they are, is left out.

        Raises
        ------
        ShapeError
            If there is not one pose a particle.
        """
        return views.with_poses(self, poses)

    @property
    def ctf(self) -> CTFParameters:
        """CTF of every particle, float32.

        What a table need not have is zero (phase shift, B-factor, beam tilt, aberrations) or one (scale,
        magnification). Where a file's defocus U is below V the two are exchanged and the angle turned by 90°.

        Raises
        ------
        TableError
            If voltage, Cs, amplitude contrast, pixel size or defocus are missing, or one is NaN.
        """
        return views.ctf(self)

    def with_ctf(self, ctf: CTFParameters) -> Self:
        """Write CTF parameters back, to the rows or to their optics groups, each where it belongs.

        Raises
        ------
        ShapeError
            If there is not one CTF a particle.
        TableError
            If a parameter of the microscope differs within an optics group.
        """
        return views.with_ctf(self, ctf)

    def half(self, number: Literal[1, 2]) -> Self:
        """Particles of one half set.

        Raises
        ------
        TableError
            If the particles are not split, or none is in this half.
        """
        subset = self.column("rlnRandomSubset")
        outside = ~subset.is_in([1, 2])
        if outside.any():
            row = outside.arg_max() or 0
            raise TableError(
                f"_rlnRandomSubset is {subset[row]}, not 1 or 2",
                path=self.path,
                row=row + 1,
                hint="split the particles into half sets first",
            )
        return self.select(subset == number)
