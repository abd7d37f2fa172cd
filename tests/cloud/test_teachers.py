"""Teachers: loaded from programs, files and modules with plain weights; adapted to a population; averaged."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from distil_bundles import SmallNet

from cloud.distil import DistilSettings, Teacher, Teachers, load_teachers
from refold.errors import InputError, ModelError, UsageError
from refold.preprocess import Preprocess

PREPROCESS = Preprocess(16, 16)
FILE = str(Path(__file__).with_name("distil_bundles.py"))
PICTURES = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)


@dataclass
class Source:
    spec: str
    weights: str = ""


@pytest.fixture(scope="module")
def network() -> SmallNet:
    torch.manual_seed(3)
    return SmallNet().eval()


def expected(network: SmallNet) -> np.ndarray:
    x = torch.from_numpy(PREPROCESS.apply(PICTURES))
    with torch.no_grad():
        return ((torch.softmax(network(x), 1) + torch.softmax(network(x.flip(3)), 1)) / 2).numpy()


def test_weights_of_every_plain_format_fill_a_network(network: SmallNet, tmp_path: Path) -> None:
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    np.savez(tmp_path / "w.npz", **{k: v.numpy() for k, v in state.items()})
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pt")
    for name in ("w.npz", "w.safetensors", "w.pt"):
        teachers = load_teachers([Source(f"{FILE}:SmallNet", str(tmp_path / name))], PREPROCESS)
        assert np.allclose(teachers.probabilities(PICTURES), expected(network), atol=1e-5)


def test_an_exported_program_is_a_teacher(network: SmallNet, tmp_path: Path) -> None:
    program = torch.export.export(
        network, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},)
    )
    torch.export.save(program, tmp_path / "t.pt2")
    teachers = load_teachers([Source(str(tmp_path / "t.pt2"))], PREPROCESS)
    assert np.allclose(teachers.probabilities(PICTURES), expected(network), atol=1e-5)


def test_votes_are_averaged_over_teachers_and_views(network: SmallNet) -> None:
    torch.manual_seed(4)
    other = SmallNet().eval()
    both = Teachers([Teacher("a", network), Teacher("b", other)], PREPROCESS)
    alone = Teachers([Teacher("b", other)], PREPROCESS)
    assert np.allclose(both.probabilities(PICTURES), (expected(network) + alone.probabilities(PICTURES)) / 2, atol=1e-6)
    moved = Teachers([Teacher("a", network)], PREPROCESS, DistilSettings(shifts=1))
    assert np.allclose(moved.probabilities(PICTURES).sum(1), 1, atol=1e-5)
    assert not np.allclose(moved.probabilities(PICTURES), expected(network), atol=1e-6)


def test_a_teacher_adapts_to_one_domain_and_keeps_its_own_statistics(network: SmallNet) -> None:
    teachers = Teachers([Teacher("a", network)], PREPROCESS, DistilSettings(batch=5))
    before = teachers.probabilities(PICTURES, "home")
    teachers.adapt("dark", PICTURES // 4)
    assert not np.allclose(teachers.probabilities(PICTURES // 4, "dark"), teachers.probabilities(PICTURES // 4, "home"))
    assert np.array_equal(teachers.probabilities(PICTURES, "home"), before)
    teachers.adapt("empty", PICTURES[:0])
    assert np.array_equal(teachers.probabilities(PICTURES, "empty"), before)


@pytest.mark.parametrize(
    ("spec", "error", "what"),
    [
        ("missing.pt2", UsageError, "no teacher at"),
        ("nothing", UsageError, "names no teacher"),
        ("missing.py:net", UsageError, "cannot be found"),
        ("no.such.module:net", UsageError, "cannot be found"),
        (f"{FILE}:NoSuchNet", UsageError, "cannot be found"),
        (f"{FILE}:bundle_of", ModelError, "cannot be made"),
        ("builtins:dict", ModelError, "not a torch network"),
    ],
)
def test_what_is_no_teacher_is_refused_in_a_sentence(spec: str, error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        load_teachers([Source(spec)], PREPROCESS)


def test_a_damaged_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.pt2").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_teachers([Source(str(tmp_path / "t.pt2"))], PREPROCESS)


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(network: SmallNet, tmp_path: Path) -> None:
    state = {k: v.numpy() for k, v in network.state_dict().items()}
    np.savez(tmp_path / "short.npz", **{k: v for k, v in state.items() if k != "conv2.weight"})
    np.savez(tmp_path / "nan.npz", **{k: v * np.nan if k == "head.bias" else v for k, v in state.items()})
    (tmp_path / "text.npz").write_text("no archive")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, what in (("short", "conv2.weight"), ("nan", "not finite"), ("text", "cannot be read")):
        with pytest.raises(InputError, match=what):
            load_teachers([Source(f"{FILE}:SmallNet", str(tmp_path / f"{name}.npz"))], PREPROCESS)
    with pytest.raises(InputError, match="not a mapping"):
        load_teachers([Source(f"{FILE}:SmallNet", str(tmp_path / "list.pt"))], PREPROCESS)
    with pytest.raises(UsageError, match="no weights"):
        load_teachers([Source(f"{FILE}:SmallNet", str(tmp_path / "absent.npz"))], PREPROCESS)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("/tmp/refold-pickle-ran"),))  # type: ignore[return-value]


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    marker = Path("/tmp/refold-pickle-ran")
    marker.unlink(missing_ok=True)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match="without running code"):
        load_teachers([Source(f"{FILE}:SmallNet", str(tmp_path / "evil.pt"))], PREPROCESS)
    assert not marker.exists()


def test_no_teacher_and_no_pictures_are_refused(network: SmallNet) -> None:
    with pytest.raises(UsageError, match="at least one teacher"):
        load_teachers([], PREPROCESS)
    with pytest.raises(InputError, match="no pictures"):
        Teachers([Teacher("a", network)], PREPROCESS).probabilities(PICTURES[:0])


def test_votes_are_each_teachers_own_and_their_mean_is_the_prediction(network: SmallNet) -> None:
    torch.manual_seed(7)
    other = SmallNet().eval()
    teachers = Teachers([Teacher("a", network), Teacher("b", other)], PREPROCESS, DistilSettings(batch=5))
    assert np.allclose(teachers.votes(PICTURES)[0], expected(network), atol=1e-6)
    teachers.adapt("dark", PICTURES // 4)
    votes = teachers.votes(PICTURES // 4, "dark")
    assert votes.shape == (2, 12, 4)
    assert np.allclose(votes.mean(0), teachers.probabilities(PICTURES // 4, "dark"), atol=1e-6)
    teachers.forget("dark")
    assert np.array_equal(teachers.votes(PICTURES, "dark"), teachers.votes(PICTURES))
    with pytest.raises(InputError, match="no pictures"):
        teachers.votes(PICTURES[:0])
