"""Values of a STAR file: text to typed columns and back, without loss."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from halfmap.data.columns import COLUMNS
from halfmap.errors import TableError

_INTEGER = r"^(?:0|-?[1-9][0-9]*)$"
_NUMBER = r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?$"
_NOT_FINITE = r"^(?:nan|-?inf)$"
_NEEDS_QUOTES = r"""^$|[ \t]|^["'#_;]|^(?:data_|loop_|save_|global_|stop_)"""
_UNWRITABLE = r"[\x00-\x1f\x7f]"
_INTEGERS = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64)


def convert(series: pl.Series, *, path: Path, row: int = 1) -> pl.Series:
    """Give a column its type: the one stated for its label, or one inferred without loss.

    Parameters
    ----------
    series : Series
        Text, or whole numbers and floats that a parser has read already.
    path : path
        File, for errors.
    row : int
        Row of the file that the first value stands in.

    Raises
    ------
    TableError
        If a value is not of the type stated for the label.
    """
    column = COLUMNS.get(series.name)
    if column is None:
        return _infer(series)
    if column.dtype is str:
        return series
    if column.dtype is float:
        return _checked(series, series.cast(pl.Float64, strict=False), "not a number", path, row)
    numbers = _whole_numbers(series, path, row)
    if column.dtype is int:
        return numbers
    flags = pl.select(pl.when(numbers.is_in([0, 1])).then(numbers == 1)).to_series().alias(series.name)
    return _checked(series, flags, "neither 0 nor 1", path, row)


def _whole_numbers(series: pl.Series, path: Path, row: int) -> pl.Series:
    numbers = series.cast(pl.Int64, strict=False)
    if numbers.null_count():
        # Older programs wrote counts as 12.000000.
        floats = series.cast(pl.Float64, strict=False)
        exact = pl.select(pl.when(floats == floats.round()).then(floats)).to_series()
        numbers = numbers.fill_null(exact.cast(pl.Int64, strict=False))
    return _checked(series, numbers, "not a whole number", path, row)


def _checked(texts: pl.Series, values: pl.Series, problem: str, path: Path, row: int) -> pl.Series:
    if values.null_count():
        index = values.is_null().arg_max() or 0
        text = texts[index]
        shown = "empty" if text is None else repr(text)
        raise TableError(f"_{texts.name} is {shown}, {problem}", path=path, row=row + index)
    return values


def _infer(series: pl.Series) -> pl.Series:
    """Numbers where formatting them again gives equal values, text otherwise."""
    if series.str.contains(_INTEGER).all():
        numbers = series.cast(pl.Int64, strict=False)
        return series if numbers.null_count() else numbers
    finite = series.filter(~series.str.contains(_NOT_FINITE))
    # Without any decimal point, 1e5 and nan are more likely names than numbers.
    if not finite.str.contains(_NUMBER).all() or not finite.str.contains(".", literal=True).any():
        return series
    digits = finite.str.replace(r"[eE].*$", "").str.replace_all(r"^-?0\.0*|[-.]", "").str.len_chars()
    exact = finite.str.contains(".", literal=True)
    if (digits > 17).any() or (digits.filter(~exact) > 15).any():
        return series
    numbers = series.cast(pl.Float64, strict=False)
    overflow = numbers.is_infinite() & ~series.str.contains("inf", literal=True)
    return series if numbers.null_count() or overflow.any() else numbers


def format_column(series: pl.Series, *, path: Path) -> pl.Series:
    """Give a column in a form that polars writes as STAR tokens.

    Raises
    ------
    TableError
        If the column's type or one of its values has no form in a STAR file.
    """
    if series.dtype in (pl.Float32, pl.Float64):
        return _format_floats(series)
    if series.dtype == pl.Boolean:
        series = series.cast(pl.Int8)
    if series.dtype in _INTEGERS:
        if series.null_count():
            row = (series.is_null().arg_max() or 0) + 1
            raise TableError(
                f"_{series.name} has no value", path=path, row=row, hint="fill it before writing"
            )
        return series
    if series.dtype in (pl.Categorical, pl.Enum):
        series = series.cast(pl.String)
    if series.dtype == pl.Null:
        series = series.cast(pl.String)
    if series.dtype != pl.String:
        raise TableError(
            f"_{series.name} is of type {series.dtype}, which a STAR file cannot hold", path=path
        )
    return _format_strings(series.fill_null(""), path)


def _format_floats(series: pl.Series) -> pl.Series:
    series = series.fill_null(float("nan"))
    magnitude = series.abs()
    extreme = (magnitude >= 1e15) | ((magnitude < 1e-3) & (magnitude > 0))
    if not (extreme.any() or series.is_nan().any()):
        return series
    # A decimal point before an exponent marks a number, not a name such as 1e5.
    texts = series.cast(pl.String).str.replace(r"^(-?[0-9]+)e", "${1}.0e")
    return texts.str.replace("NaN", "nan", literal=True)


def _format_strings(series: pl.Series, path: Path) -> pl.Series:
    forbidden = series.str.contains(_UNWRITABLE)
    if forbidden.any():
        row = (forbidden.arg_max() or 0) + 1
        raise TableError(f"_{series.name} holds a control character or a line end", path=path, row=row)
    quoted = series.str.contains(_NEEDS_QUOTES)
    if not quoted.any():
        return series
    ends_double = series.str.contains(r'"(?:[ \t]|$)')
    ends_single = series.str.contains(r"'(?:[ \t]|$)")
    # RELION marks a quote that would end the string with a bell character, but 3.1 cannot read that back.
    marked = series.str.replace_all(r'"([ \t]|$)', '\a"$1')
    text = pl.when(ends_double & ends_single).then('"' + marked + '"')
    text = text.when(ends_double).then("'" + series + "'").otherwise('"' + series + '"')
    return pl.select(pl.when(quoted).then(text).otherwise(series).alias(series.name)).to_series()


def format_value(label: str, value: str | int | float | bool, *, path: Path) -> str:
    """Token of one value; see `format_column`."""
    try:
        series = pl.Series(label, [value])
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        raise TableError(f"_{label} is {value!r}, which a STAR file cannot hold", path=path) from None
    return str(format_column(series, path=path).cast(pl.String).item())
