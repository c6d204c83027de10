"""Filters of references: what they take away and leave, whom they learn from, and those that others add."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.errors import FileFormatError, ParameterError
from halfmap.io.models import read_model
from halfmap.nets.map_prior import MapPrior, Shape, load_map_prior, loss, save_map_prior
from halfmap.nets.weights import shipped
from halfmap.ops.filters import radial_average, radial_profile_to_grid
from halfmap.ops.fourier import irfft3, rfft3
from halfmap.ops.fsc import fsc as correlation_of
from halfmap.ops.grids import frequency_radius
from halfmap.ops.masks import soft_sphere
from halfmap.search.backprojector import Backprojection
from halfmap.search.disc import FourierDisc
from halfmap.search.halfmaps import HalfSums, believed, solved, solved_towards
from halfmap.search.model_density import model_map
from halfmap.search.regularise import Evidence, Filter, named
from halfmap.search.regularise.fsc import fsc
from halfmap.search.regularise.learned import WEIGHTS, Learned, White, ending, posterior_mean
from halfmap.search.regularise.nonuniform import nonuniform
from halfmap.search.regularise.sidesplitter import sidesplitter

BOX, RADIUS, PIXEL = 32, 14, 3.0
WIDE, REACH = 56, 26
"""Of maps in which places differ: windows hold as many voxels in any box."""


def _sums(particle: Particle, n: int, snr: float, seed: int) -> Backprojection:
    box, radius = (WIDE, REACH) if particle.box == WIDE else (BOX, RADIUS)
    drawn = simulate(particle, FourierDisc(box, radius), n, snr=snr, seed=seed)
    sums = Backprojection.empty(box, radius)
    sums.add(drawn.images, drawn.rotations, drawn.shifts_px)
    return sums


def _found(halves: tuple[Backprojection, Backprojection], mask: torch.Tensor) -> Evidence:
    sums = HalfSums.of(halves)
    maps = sums.unfiltered()
    agreed = believed(correlation_of(maps[0] * mask, maps[1] * mask).float().nan_to_num())
    return Evidence(maps, mask, agreed, sums.prior(agreed), sums.least, PIXEL, len(mask), 3, "near")


@pytest.fixture(scope="module")
def lopsided() -> tuple[Evidence, tuple[Backprojection, Backprojection], torch.Tensor]:
    """A small particle in a mask that holds as much empty space beside it."""
    particle = Particle.random(WIDE, count=60, radius_px=8.0)
    particle = Particle(particle.atoms + torch.tensor([0.0, 0.0, 11.0]), WIDE)
    halves = _sums(particle, 300, 0.01, 0), _sums(particle, 300, 0.01, 1)
    mask = soft_sphere((WIDE,) * 3, radius=24.0, edge=2.0)
    return _found(halves, mask), halves, particle.volume()


def _error(maps: tuple[torch.Tensor, torch.Tensor], truth: torch.Tensor, mask: torch.Tensor) -> float:
    low = frequency_radius((WIDE,) * 3) * WIDE <= REACH - 1
    known = irfft3(rfft3(truth) * low, shape=truth.shape)
    errors = [((irfft3(rfft3(each) * low, shape=each.shape) - known) * mask).square().sum() for each in maps]
    return float(sum(errors) / (2 * (known * mask).square().sum()))


def test_noise_is_taken_where_there_is_nothing_else(lopsided):
    """Cut-offs that vary over the map leave less error than one filter for all of it."""
    evidence, halves, truth = lopsided
    uniform, local = (each(evidence)(halves, "") for each in (fsc, nonuniform))
    assert _error(local, truth, evidence.mask) < 0.85 * _error(uniform, truth, evidence.mask)


def test_what_stands_out_of_the_noise_is_kept_and_the_rest_is_not(lopsided):
    evidence, halves, truth = lopsided
    kept = sidesplitter(evidence)(halves, "")
    empty = soft_sphere((WIDE,) * 3, radius=6.0, edge=1.0).roll(-12, 0) > 0.5
    uniform = fsc(evidence)(halves, "")
    assert float(kept[0][empty].square().mean()) < 0.3 * float(uniform[0][empty].square().mean())
    assert _error(kept, truth, evidence.mask) < 0.85 * _error(uniform, truth, evidence.mask)


@pytest.mark.parametrize("regulariser", [fsc, nonuniform, sidesplitter])
def test_a_map_is_of_its_own_sums(lopsided, regulariser):
    """By the filter that is found, what is in the other half's sums does not matter."""
    evidence, halves, _ = lopsided
    made: Filter = regulariser(evidence)
    particle = Particle.random(WIDE, count=30, radius_px=8.0, seed=5)
    other = _sums(particle, 50, 0.5, 7)
    assert torch.equal(made(halves, "")[0], made((halves[0], other), "")[0])
    assert not torch.equal(made(halves, "")[1], made((halves[0], other), "")[1])


def test_noise_alone_leaves_next_to_nothing():
    particle = Particle.random(BOX, count=30, radius_px=8.0)
    halves = _sums(particle, 200, 1e-9, 0), _sums(particle, 200, 1e-9, 1)
    evidence = _found(halves, soft_sphere((BOX,) * 3, radius=12.0, edge=2.0))
    raw = solved(halves[0], least=evidence.least[0])
    fine = frequency_radius((BOX,) * 3) * BOX > 6
    for regulariser in (fsc, nonuniform, sidesplitter):
        left = regulariser(evidence)(halves, "")[0] * evidence.mask
        power = [float((rfft3(each)[fine]).abs().square().sum()) for each in (left, raw * evidence.mask)]
        assert power[0] < 0.05 * power[1], regulariser


def test_a_map_is_between_its_images_and_what_is_expected():
    """In each voxel of the transform the mean of both by their weights."""
    particle = Particle.random(BOX, count=30, radius_px=9.0)
    sums = _sums(particle, 1500, 0.2, 0)
    expected = torch.randn(BOX, BOX, BOX, generator=torch.Generator().manual_seed(0))
    mask = soft_sphere((BOX,) * 3, radius=12.0, edge=2.0)
    expected = expected * mask
    low = frequency_radius((BOX,) * 3) * BOX <= RADIUS - 1

    def towards(prior: float) -> torch.Tensor:
        return solved_towards(sums, torch.full((RADIUS + 1,), prior), rfft3(expected) * low)

    weight = float(sums.sums.weights[sums.sums.weights > 0].mean())
    nearly = solved(sums, torch.full((RADIUS + 1,), 1e-6 * weight))
    assert float((towards(1e-6 * weight) - nearly).abs().max()) < 1e-3 * float(nearly.abs().max())
    filtered = irfft3(rfft3(expected) * low, shape=expected.shape)
    assert float((towards(1e6 * weight) - filtered).abs().max()) < 1e-3 * float(filtered.abs().max())
    # Shares of both add up to one: of a map that is expected as it is, nothing is lost.
    map_now = solved(sums, least=HalfSums.of((sums, sums)).least[0])
    prior = torch.full((RADIUS + 1,), weight)
    both = solved_towards(sums, prior, rfft3(map_now))
    ratio = radial_average((rfft3(both) * rfft3(map_now).conj()).real, shape=both.shape)
    ratio /= radial_average(rfft3(map_now).abs().square(), shape=both.shape)
    torch.testing.assert_close(ratio[2 : RADIUS - 2], torch.ones(RADIUS - 4), atol=0.08, rtol=0)


def test_a_map_is_made_white_and_back():
    particle = Particle.random(BOX, count=60, radius_px=9.0)
    truth = particle.volume()
    mask = soft_sphere((BOX,) * 3, radius=11.0, edge=2.0)
    agreed = torch.cat([torch.linspace(1, 0.2, 12), torch.zeros(5)])
    white = White.of(truth, mask, agreed, multiple=8)
    assert all((part.stop - part.start) % 8 == 0 for part in white.place)
    whole = White.of(truth, torch.ones(BOX, BOX, BOX), agreed, multiple=8)
    back = irfft3(whole.restored(whole.target(truth), BOX), shape=truth.shape)
    ends = ending(torch.nn.functional.pad(agreed, (0, BOX // 2 + 1 - len(agreed))))
    assert float(ends[5]) == 1
    assert float(ends[12:].max()) == 0
    radius = (frequency_radius((BOX,) * 3) * BOX).round().long()
    wanted = rfft3(truth) * torch.nn.functional.pad(ends, (0, 60))[radius]
    torch.testing.assert_close(rfft3(back), wanted, atol=1e-3 * float(wanted.abs().max()), rtol=1e-3)
    # What the network sees is white: as much in every shell that it is shown whole.
    seen = whole.seen(truth)[1]
    power = radial_average(rfft3(seen * mask).abs().square(), shape=seen.shape)[3:8]
    assert float(power.max() / power.min()) < 3


def _weights(folder, share: float) -> Learned:
    network = MapPrior(Shape(filters=8, levels=2, blocks=1))
    with torch.no_grad():
        list(network.leave.parameters())[1][8:] = -0.35
    record = {"error": {"correlation": [0.0, 1.0], "share": [share, share], "power": [0.5, 0.5]}}
    save_map_prior(folder / "w.npz", network, record)
    return Learned(folder / "w.npz")


def test_a_network_that_knows_nothing_changes_little(lopsided, tmp_path):
    """Untrained it says what Wiener's filter does; believed to err by much, all is as without it."""
    evidence, halves, _ = lopsided
    uniform = fsc(evidence)(halves, "")[0]
    distrusted = _weights(tmp_path, 1e4)(evidence)(halves, "")[0]
    # Without any prior it is the unfiltered map to the resolution.
    assert float(distrusted.square().sum()) > float(uniform.square().sum())
    trusted = _weights(tmp_path, 0.3)(evidence)(halves, "")[0]
    both = torch.stack([(trusted * evidence.mask).flatten(), (uniform * evidence.mask).flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_a_network_that_is_a_filter_is_no_better_nor_worse_than_it(lopsided, tmp_path):
    """Its errors are those of the images, so that the best mean of both is the network's alone."""
    evidence, halves, truth = lopsided
    learned = _weights(tmp_path, 1e-3)(evidence)(halves, "")
    errors = [_error(maps, truth, evidence.mask) for maps in (learned, fsc(evidence)(halves, ""))]
    assert errors[0] == pytest.approx(errors[1], rel=0.12)


@pytest.mark.parametrize("model", ["4hhb.cif.gz", "t20s"])
def test_the_shipped_network_knows_proteins_from_noise(shared_data, model):
    """Structures that it has not seen, at a signal-to-noise ratio as in the middle of a refinement."""
    [path] = (shared_data / "models").glob(f"{model.partition('.')[0]}*")
    structure = read_model(path).centred()
    box = 56
    pixel = max(2.2, 1.3 * structure.diameter / box)
    truth = model_map(structure, shape=(box,) * 3, pixel_size=pixel, origin=[-(box // 2) * pixel] * 3)
    mask = soft_sphere((box,) * 3, radius=0.6 * structure.diameter, edge=3 * pixel, pixel_size=pixel)
    level = 1.2 * float((truth * mask).std())
    halves = [
        truth + level * torch.randn(truth.shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    agreed = believed(correlation_of(halves[0] * mask, halves[1] * mask).float())
    network = Learned(shipped(WEIGHTS)).network()
    wiener = irfft3(
        rfft3(halves[0]) * radial_profile_to_grid(agreed * ending(agreed), shape=truth.shape),
        shape=truth.shape,
    )
    learned = posterior_mean(halves[0], mask, agreed, *network)
    errors = [float(((each - truth) * mask).square().sum()) for each in (learned, wiener)]
    assert errors[0] < 0.95 * errors[1]
    # What half maps do not agree in stays out.
    agreed[16:] = 0
    coarse = posterior_mean(halves[0], mask, agreed, *network)
    beyond = frequency_radius(truth.shape) * box > 18
    assert float(rfft3(coarse)[beyond].abs().max()) < 1e-6 * float(rfft3(coarse).abs().max())


def test_what_is_no_protein_is_not_made_worse_by_the_shipped_network(lopsided):
    """A cloud of Gaussian blobs."""
    evidence, halves, truth = lopsided
    learned = Learned(shipped(WEIGHTS))(evidence)(halves, "")
    assert _error(learned, truth, evidence.mask) < _error(fsc(evidence)(halves, ""), truth, evidence.mask)


def test_cut_offs_are_the_same_on_any_scale(lopsided):
    """Other programs' maps are in other units."""
    evidence, halves, _ = lopsided
    factor = 1e-7
    small = replace(evidence, maps=(factor * evidence.maps[0], factor * evidence.maps[1]))
    first, second = nonuniform(evidence)(halves, "")[0], nonuniform(small)(halves, "")[0]
    assert float((first - second).abs().max()) < 1e-3 * float(first.abs().max())


def test_where_nothing_was_seen_nor_known_there_is_nothing():
    sums = Backprojection.empty(BOX, RADIUS)
    found = solved_towards(sums, torch.zeros(RADIUS + 1), torch.ones(BOX, BOX, BOX // 2 + 1) + 0j)
    assert float(found.abs().max()) == 0


def test_beyond_the_resolution_the_network_says_nothing(lopsided, tmp_path):
    evidence, halves, _ = lopsided
    cut = replace(evidence, correlation=evidence.correlation * (torch.arange(len(evidence.correlation)) < 6))
    cut = replace(cut, prior=HalfSums.of(halves).prior(cut.correlation))
    found = _weights(tmp_path, 0.1)(cut)(halves, "")[0]
    power = radial_average(rfft3(found).abs().square(), shape=found.shape)
    assert float(power[9:].max()) < 1e-3 * float(power[2:5].mean())


def test_loss_is_least_for_the_truth_and_the_error_that_it_has():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 1, 8, 8, 8, generator=generator)
    noise = 0.5 * torch.randn(truth.shape, generator=generator)

    def of(mean: torch.Tensor, deviation: float) -> float:
        spread = torch.full_like(mean, deviation).log()
        return float(loss(torch.cat([mean, spread], 1), truth, torch.ones_like(truth)))

    assert of(truth + noise, 0.5) < min(of(truth + noise, 0.3), of(truth + noise, 0.9))
    assert of(truth, 0.5) < of(truth + noise, 0.5)


def test_files_that_hold_no_prior_are_refused(tmp_path):
    _weights(tmp_path, 0.5)
    record = tmp_path / "w.json"
    record.write_text(record.read_text().replace('"share"', '"shares"'))
    with pytest.raises(FileFormatError, match=r"w\.npz"):
        load_map_prior(tmp_path / "w.npz")


def test_a_package_may_add_one(monkeypatch):
    """An entry point is a function of what was found; its errors say whose they are."""

    def mine(evidence: Evidence) -> Filter:
        return fsc(evidence)

    def broken():
        raise ImportError("no module named gone")

    points = [SimpleNamespace(name="mine", load=lambda: mine), SimpleNamespace(name="bad", load=broken)]
    monkeypatch.setattr(
        named, "entry_points", lambda group: points if group == "halfmap.regularisers" else []
    )
    assert named.find("mine") is mine
    with pytest.raises(ParameterError, match="bad"):
        named.find("bad")
    with pytest.raises(ParameterError, match="fcs"):
        named.find("fcs")
