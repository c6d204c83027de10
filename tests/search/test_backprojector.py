from pathlib import Path

import pytest
import torch
from pose_simulation import Particle, simulate

from halfmap.errors import FileFormatError, ShapeError
from halfmap.ops import symmetry
from halfmap.ops.rotations import random_rotations
from halfmap.ops.slices import extract_slices, finish_reconstruction, prepare_volume
from halfmap.search.backprojector import Backprojection, _factorised, _mates, _summed, _turned, few_turns
from halfmap.search.disc import DiscImages, FourierDisc

BOX, RADIUS = 32, 12
PARTICLE = Particle.random(BOX, count=40, radius_px=9.0)
DISC = FourierDisc(BOX, RADIUS)


def _sums(images: DiscImages, rotations: torch.Tensor, shifts: torch.Tensor, **more) -> Backprojection:
    sums = Backprojection.empty(BOX, RADIUS, **more)
    sums.add(images, rotations, shifts)
    return sums


def _few(n: int = 6):
    truth = simulate(PARTICLE, DISC, n, snr=0.5)
    return truth.images, truth.rotations, truth.shifts_px


def test_adding_is_adjoint_to_cutting():
    images, rotations, shifts = _few()
    volume = prepare_volume(PARTICLE.volume(), radius_px=RADIUS)
    slices = DISC.pack(extract_slices(volume, rotations, size=DISC.side))
    weights = torch.rand(6, dtype=torch.float64)
    moved = images.linear * DISC.shifts(shifts) * weights[:, None]
    sums = Backprojection.empty(BOX, RADIUS, dtype=torch.float64)
    sums.add(images, rotations, shifts, weights)
    left = (slices.to(torch.complex128).conj() * moved).real.sum()
    right = (volume.values.conj() * sums.sums.values).real.sum()
    assert abs(float(left - right)) < 1e-5 * float((slices.abs() * moved.abs()).sum())
    assert float(sums.sums.weights.sum()) == pytest.approx(float((images.squared * weights[:, None]).sum()))


@pytest.mark.parametrize("group", ["C1", "C2", "C4", "C7", "D2", "D3", "D7", "T", "O", "I1", "I3"])
def test_group_is_factorised(group: str):
    turns, on_grid = _factorised(group)
    products = (turns[:, None] @ on_grid).reshape(-1, 1, 3, 3)
    assert len(products) == symmetry.order(group)
    gaps = (products - symmetry.operators(group)).abs().amax((2, 3))
    assert torch.equal((gaps < 1e-6).sum(0), torch.ones(len(products), dtype=torch.long))


@pytest.mark.parametrize(("group", "turns"), [("C4", 4), ("D2", 4), ("D4", 6), ("O", 9), ("C7", 1)])
def test_turns_in_turn_make_the_group(group: str, turns: int):
    on_grid = _factorised(group)[1]
    sets = few_turns(on_grid)
    assert sum(map(len, sets)) == turns
    products = torch.eye(3, dtype=on_grid.dtype)[None]
    for each in sets:
        products = (products[:, None] @ each).flatten(0, 1)
    gaps = (products[:, None] - on_grid).abs().amax((2, 3))
    assert torch.equal((gaps < 1e-6).sum(0), torch.ones(len(on_grid), dtype=torch.long))


@pytest.mark.parametrize("group", ["C3", "C4", "D3", "T", "O"])
def test_symmetry_is_adding_all_equivalents(group: str):
    images, rotations, shifts = _few(3)
    found = _sums(images, rotations, shifts, group=group, dtype=torch.float64)
    every = Backprojection.empty(BOX, RADIUS, dtype=torch.float64)
    for operator in symmetry.operators(group):
        every.add(images, rotations @ operator, shifts)
    a, b = (finish_reconstruction(sums.sums) for sums in (found.symmetrised(), every))
    assert float((a - b).abs().max()) < 1e-9 * float(b.abs().max())


@pytest.mark.parametrize("group", ["C2", "C4", "D4", "O"])
def test_compiled_and_plain_symmetry_agree(group: str):
    images, rotations, shifts = _few(3)
    sums = _sums(images, rotations, shifts, group=group, dtype=torch.float64).sums
    operators, before = _factorised(group)[1], sums.data.clone()
    compiled = _summed(sums, operators)
    assert torch.equal(sums.data, before)
    plain = before.clone()
    plain[:, :, 0] += _mates(before[:, :, 0])
    for turns in few_turns(operators):
        plain = _turned(plain, turns)
    plain[:, :, 0] /= 2
    torch.testing.assert_close(
        compiled[..., :3], plain[..., :3], rtol=0, atol=1e-12 * float(plain.abs().max())
    )


def test_shards_add_up_and_are_kept_in_files(tmp_path: Path):
    images, rotations, shifts = _few()
    whole = _sums(images, rotations, shifts, group="C2")
    total = Backprojection.empty(BOX, RADIUS, group="C2")
    for i, part in enumerate((slice(0, 2), slice(2, 6))):
        few = DiscImages(DISC, images.linear[part], images.squared[part])
        _sums(few, rotations[part], shifts[part], group="C2").save(tmp_path / f"{i}.npz")
        total = total + Backprojection.load(tmp_path / f"{i}.npz")
    assert total.group == "C2"
    torch.testing.assert_close(total.sums.data[..., :3], whole.sums.data[..., :3], rtol=1e-5, atol=1e-5)


def test_several_weighted_poses_of_one_image():
    images, rotations, shifts = _few(2)
    owner, weights = torch.tensor([0, 0, 1]), torch.tensor([0.25, 0.75, 1.0])
    turned = random_rotations(1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    poses = torch.cat([rotations[:1], turned, rotations[1:]]), shifts[owner]
    found = Backprojection.empty(BOX, RADIUS, dtype=torch.float64)
    found.add(images, *poses, weights, owner=owner)
    scaled = DiscImages(
        DISC, images.linear[owner] * weights[:, None], images.squared[owner] * weights[:, None]
    )
    expected = _sums(scaled, *poses, dtype=torch.float64)
    torch.testing.assert_close(found.sums.data, expected.sums.data)


def test_refusals(tmp_path: Path):
    images, rotations, shifts = _few(2)
    with pytest.raises(ShapeError, match="do not fit"):
        Backprojection.empty(BOX, RADIUS - 2).add(images, rotations, shifts)
    with pytest.raises(ShapeError, match="cannot be added"):
        _ = Backprojection.empty(BOX, RADIUS) + Backprojection.empty(BOX, RADIUS, group="C2")
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="no sums"):
        Backprojection.load(tmp_path / "x.npz")
