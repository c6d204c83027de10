"""From the table of micrographs to those accepted and those rejected."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from halfmap.data import MicrographSet
from halfmap.errors import ItemsFailedError, TableError
from halfmap.io.names import unique_stems
from halfmap.io.tables import write_micrographs
from halfmap.log import log
from halfmap.steps.curate import criteria
from halfmap.steps.curate.micrograph import MicrographItem
from halfmap.steps.curate.objects import DIAMETER_A

if TYPE_CHECKING:
    from halfmap.engine import Context
    from halfmap.steps.curate.step import CurateStep

_MANY = 0.1
_SHARE = 0.5


def list_micrographs(ctx: Context, micrographs: MicrographSet) -> list[MicrographItem]:
    """Every micrograph with its pixel size; sums without dose weighting where the table names them.

    Raises
    ------
    TableError
        If a pixel size is missing, or a micrograph comes twice.
    """
    rows = micrographs.rows.to_dicts()
    sizes = micrographs.column("rlnMicrographPixelSize").to_list()
    keys = unique_stems([row["rlnMicrographName"] for row in rows], table=micrographs.path)
    items = []
    for number, (row, key, size) in enumerate(zip(rows, keys, sizes, strict=True), start=1):
        if size is None or not math.isfinite(size):
            message, hint = "has no rlnMicrographPixelSize", "import the micrographs with their pixel size"
            raise TableError(message, path=micrographs.path, row=number, hint=hint)
        name = row["rlnMicrographName"]
        path = ctx.resolve(row.get("rlnMicrographNameNoDW") or name)
        items.append(MicrographItem(name=name, key=key, path=path, pixel_size=float(size)))
    return items


def tabulate(ctx: Context, micrographs: MicrographSet, done: list[dict[str, Any]]) -> MicrographSet:
    """Add mask and measures to the rows of the micrographs that could be segmented."""
    by_name = {row["name"]: row for row in done}
    kept = micrographs.rows.filter(pl.col("rlnMicrographName").is_in(list(by_name)))
    rows = [by_name[name] for name in kept["rlnMicrographName"]]
    columns: dict[str, list[Any]] = {
        "hmMicrographMask": [ctx.relative(ctx.folder / row["mask"]) for row in rows]
    }
    for label in rows[0]:
        if label.startswith("hm"):
            columns[label] = [row[label] for row in rows]
    carried = kept.drop([label for label in columns if label in kept.columns])
    return MicrographSet(micrographs.optics, pl.concat([carried, pl.DataFrame(columns)], how="horizontal"))


def write_tables(
    folder: Path,
    table: MicrographSet,
    judgements: list[criteria.Judgement],
    words: list[list[str]],
) -> None:
    """Write those accepted and those rejected, and say how many are why.

    Raises
    ------
    ItemsFailedError
        If all are rejected; the table that says why is written before.
    """
    keep = pl.Series([not own for own in words])
    total, kept = len(words), int(keep.sum())
    (folder / "micrographs_rejected.star").unlink(missing_ok=True)  # of an earlier run with others
    if kept < total:
        because = pl.Series("hmReason", ["; ".join(own) for own in words])
        rejected = table.with_columns(because).select(~keep)
        write_micrographs(folder / "micrographs_rejected.star", rejected)
    found = ", ".join(f"{title}: {count}" for title, count in criteria.tally(judgements, words))
    micrographs = f"micrograph{'' if total == 1 else 's'}"
    log.info("%d of %d %s kept%s", kept, total, micrographs, f"; rejected by {found}" if found else "")
    if not kept:
        raise ItemsFailedError(
            f"all {total} micrographs are rejected ({found})",
            hint="micrographs_rejected.star says why; widen the limits, or judge with --no-automatic",
        )
    write_micrographs(folder / "micrographs.star", table.select(keep))


def warn(table: MicrographSet, judgements: list[criteria.Judgement], step: CurateStep) -> None:
    """Log what is not judged, limits that tell nothing apart, and masks that may be particles."""
    rows = table.rows
    unknown = criteria.missing(table)
    if unknown:
        log.info("not judged, as the table lacks their columns: %s", ", ".join(unknown))
    if step.diameter is None:
        text = (
            "what may be a particle of %.0f Å is not masked; the particle's --diameter masks smaller things"
        )
        log.info(text, DIAMETER_A)
    smallest = min(Counter(rows["rlnOpticsGroup"]).values())
    if step.automatic and smallest < criteria.FEWEST:
        text = "optics groups of fewer than %d micrographs are not compared: only useless ones are rejected"
        log.info(text, criteria.FEWEST)
    for judgement in judgements:
        option, title = judgement.option(step), judgement.criterion.in_text
        without = int(np.isnan(judgement.values).sum())
        if option and without:
            log.warning("%d of %d have no %s and are kept whatever %s", without, rows.height, title, option)
        if not option and step.automatic and judgement.is_loose():
            text = "too many micrographs are poor by their %s to tell them from the others: see summary.png, "
            log.warning(text + "and give a limit", title)
    other = (pl.col("hmMicrographMaskedFraction") > _MANY) & ~pl.col("hmMaskedBy").str.contains("carbon")
    if step.diameter is None and rows.filter(other).height > _SHARE * rows.height:
        log.warning(
            "most micrographs are masked by more than %d %%: give --diameter if particles are above 300 Å",
            round(100 * _MANY),
        )
