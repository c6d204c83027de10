"""Maps that another program makes of the sums, as it would for RELION (``--external_reconstruct``)."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.mrc import read_header, read_mrc
from halfmap.io.mrc_writer import write_mrc
from halfmap.io.star import write_star
from halfmap.ops.fourier import resample
from halfmap.search.regularise import Evidence, Filter, Pair
from halfmap.search.regularise.external_files import SUFFIX, Request, write

VARIABLE = "RELION_EXTERNAL_RECONSTRUCT_EXECUTABLE"
"""Environment variable in which RELION looks for the program."""

FOLDER = "External"
_LOOK_s = 0.05


@dataclass(frozen=True)
class External:
    """Let a program that was written for RELION make the maps.

    It is given the sums of one half set and, shell by shell, the power of the signal and the correlation of
    the half maps; two copies run at the same time, one for each half set. What they make of each other's
    files is up to them.

    Parameters
    ----------
    folder : path
        Of the job. Files lie in a folder for each iteration and part below ``External``, and are removed once
        the maps are read.
    diameter : float, optional
        Of the particle, Å, for programs that ask.
    program : str, optional
        With arguments, as a shell would split them; the name of the STAR file is added. By default that of
        the environment variable which RELION looks at.

    References
    ----------
    .. [1] Ramlaul, Palmer, Nakane & Aylett 2020, J. Struct. Biol. 211, 107545, DOI 10.1016/j.jsb.2020.107545
    .. [2] Kimanius et al. 2021, IUCrJ 8, 60-75, DOI 10.1107/S2052252520014384
    """

    folder: Path
    diameter: float | None = None
    program: str | None = None

    def __call__(self, evidence: Evidence) -> Filter:
        """Filter for all sums of an iteration."""
        command = self.command()

        def made(halves: Pair, name: str) -> tuple[Tensor, Tensor]:
            folder = (self.folder / FOLDER / f"it{evidence.iteration:03d}_{name}").resolve()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                requests = self._ask(folder, evidence, halves)
                _run(command, requests)
                first, second = (_result(each, evidence, command) for each in requests)
            except BaseException:
                for large in folder.glob("*.mrc"):
                    large.unlink(missing_ok=True)
                raise
            shutil.rmtree(folder)
            with suppress(OSError):
                folder.parent.rmdir()
            return first, second

        return made

    def command(self) -> list[str]:
        """Words that start the program.

        Raises
        ------
        ParameterError
            If none is given, or it is not there.
        """
        words = os.environ.get(VARIABLE, "") if self.program is None else self.program
        try:
            command = shlex.split(words)
        except ValueError as error:
            raise ParameterError(f"{words!r} cannot be split into words: {error}") from error
        if not command:
            raise ParameterError(
                "no program is given that makes maps",
                hint=f"name it with --external-program, or in the environment variable {VARIABLE}",
            )
        if shutil.which(command[0]) is None:
            raise ParameterError(
                f"there is no program {command[0]!r} that could be started",
                hint="give its whole path, and make it executable",
            )
        return command

    def _ask(self, folder: Path, evidence: Evidence, halves: Pair) -> list[Request]:
        """Write what the program is to read."""
        pixel_size = evidence.pixel_size * len(evidence.mask) / evidence.box
        _write_job(folder, evidence, pixel_size)
        return [
            write(
                folder / f"run_it{evidence.iteration:03d}_half{half + 1}_class001{SUFFIX}",
                own,
                box=evidence.box,
                prior=evidence.prior[half],
                correlation=evidence.correlation,
                pixel_size=pixel_size,
                diameter=self.diameter,
            )
            for half, own in enumerate(halves)
        ]


def _write_job(folder: Path, evidence: Evidence, pixel_size: float) -> None:
    """Write a mask and a `job.star`, in which scripts look for the mask and the number of threads."""
    mask = resample(evidence.mask.cpu().float(), new_shape=(evidence.box,) * 3).clamp(0, 1)
    write_mrc(folder / "mask.mrc", mask.numpy(), pixel_size=pixel_size, stack=False)
    options = {"fn_mask": str(folder / "mask.mrc"), "nr_threads": str(torch.get_num_threads())}
    table = pl.DataFrame({"rlnJobOptionVariable": list(options), "rlnJobOptionValue": list(options.values())})
    write_star(folder / "job.star", {"joboptions_values": table}, durable=False)


def _run(command: Sequence[str], requests: Sequence[Request]) -> None:
    """Run the program for all requests at a time; if it fails for one, end the others, which may wait for it.

    Raises
    ------
    ParameterError
        If it cannot be started or fails.
    """
    running: list[tuple[subprocess.Popen[bytes], Request]] = []
    with ExitStack() as stack:
        for request in requests:
            out, err = (stack.enter_context(path.open("wb")) for path in _said(request))
            try:
                process = subprocess.Popen(
                    [*command, str(request.star)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    # Of its own, so that what it has started ends with it.
                    start_new_session=True,
                )
            except OSError as error:
                raise ParameterError(
                    f"{command[0]} cannot be started: {(error.strerror or '').lower()}",
                    hint="give its whole path, and make it executable",
                ) from error
            stack.callback(_end, process)
            running.append((process, request))
        while running:
            time.sleep(_LOOK_s)
            for process, request in list(running):
                code = process.poll()
                if code:
                    raise ParameterError(
                        f"{shlex.join(command)} ended with code {code}{_last_words(request)}",
                        hint=f"see {_said(request)[1]} and {_said(request)[0].name}",
                    )
                if code == 0:
                    running.remove((process, request))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it has started, unless it has ended."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _said(request: Request) -> tuple[Path, Path]:
    """Files of what the program says: others than those in which scripts keep what theirs say."""
    stem = request.star.with_name(request.star.stem.removesuffix(SUFFIX))
    return stem.with_suffix(".out"), stem.with_suffix(".err")


def _last_words(request: Request) -> str:
    for path in reversed(_said(request)):
        lines = path.read_text(errors="replace").split("\n")
        for line in reversed(lines):
            if line.strip():
                return f": {line.strip()[:200]}"
    return ""


def _result(request: Request, evidence: Evidence, command: Sequence[str]) -> Tensor:
    """Map (d, d, d) of a result, in the box and on the scale of those that `solved` gives.

    Raises
    ------
    FileFormatError
        If the program has written none, or none that can be used.
    """
    path, box, small = request.result, request.box, len(evidence.mask)
    hint = f"{shlex.join(command)} should have made it: see {_said(request)[1]} and {_said(request)[0].name}"
    if not path.exists():
        raise FileFormatError("there is no such map", path=path, hint=hint)
    shape = tuple(read_header(path).shape)
    if shape != (box,) * 3:
        raise FileFormatError(
            f"is {' × '.join(map(str, shape))}, and {box} × {box} × {box} are asked for", path=path, hint=hint
        )
    values = read_mrc(path)
    if not np.isfinite(values).all():
        raise FileFormatError("holds values that are not numbers", path=path, hint=hint)
    volume = torch.from_numpy(np.array(values, np.float32))
    # The transform's coefficients are kept, and not its values.
    cut = resample(volume, new_shape=(small,) * 3) * (box / small) ** 3
    return cut.to(evidence.mask)
