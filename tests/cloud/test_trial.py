"""`refold cloud add-bundle --teacher`: every teacher is run once, and what cannot teach is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent))

from distil_bundles import SmallNet

from cloud.cli import cloud
from cloud.lesson import make_lesson
from cloud.provision import LOCAL, provision
from cloud.store import Store
from cloud.training.answers import check_answers
from cloud.training.trial import figures
from export.pictures import Pictures
from export.pipeline import Options, export_model
from refold.bundle import Bundle
from refold.errors import InputError, ModelError, RefoldError
from refold.preprocess import Preprocess

FILE = str(Path(__file__).with_name("distil_bundles.py"))
PREPROCESS = Preprocess(16, 16)
TEACHERS = """
import sys, torch
sys.path.insert(0, {folder!r})
from distil_bundles import SmallNet

def net(): return SmallNet(4)
def thousand(): return SmallNet(1000)
class Constant(SmallNet):
    def forward(self, x): return super().forward(x) * 0 + torch.tensor([0.0, 3.0, 0.0, 0.0])
class Dictionary(SmallNet):
    def forward(self, x): return {{"logits": super().forward(x)}}
class Broken(SmallNet):
    def forward(self, x): return super().forward(x) / 0 * 0
"""


def centred(seed: int, images: np.ndarray) -> tuple[SmallNet, np.ndarray]:
    """A network that answers all of its classes, and what it answers."""
    torch.manual_seed(seed)
    net = SmallNet(4).eval()
    with torch.no_grad():
        logits = net(torch.from_numpy(PREPROCESS.apply(images)))
        net.head.bias -= logits.mean(0)
        return net, (logits - logits.mean(0)).argmax(1).numpy()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported bundle of four classes with labelled calibration images, its own weights, and a file of teachers."""
    folder = tmp_path_factory.mktemp("trial")
    images = np.random.default_rng(1).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    images = (images // 4 + np.random.default_rng(2).integers(0, 190, (64, 1, 1, 3))).astype(np.uint8)
    net, labels = centred(5, images)
    export_model(net, folder / "m.refold", PREPROCESS, Pictures(images, labels.astype(np.int64)), Options(min_agreement=0.5))
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    np.savez(folder / "w.npz", **state)
    np.savez(folder / "more.npz", **state, **{"head2.weight": np.zeros(3, np.float32)})
    np.savez(folder / "less.npz", **{k: v for k, v in state.items() if k != "head.bias"})
    np.savez(folder / "wide.npz", **{**state, "head.bias": np.zeros(5, np.float32)})
    np.savez(folder / "other.npz", **{k: v.numpy() for k, v in centred(6, images)[0].state_dict().items()})
    (folder / "t.py").write_text(TEACHERS.format(folder=str(Path(__file__).parent)))
    (folder / "raises.py").write_text("raise ValueError('no card')\n")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return provision(tmp_path / "fleet", LOCAL, 0, 0, "127.0.0.1")


def add(place: Path, config: Path, *teachers: tuple[str, str], json_: bool = False) -> Result:
    words = [w for spec, weights in teachers for w in ("--teacher", str(place / spec), "--teacher-weights", weights)]
    words = [str(place / w) if w.endswith(".npz") else w for w in words]
    return CliRunner().invoke(
        cloud, ["add-bundle", str(place / "m.refold"), "--config", str(config), *words, *(["--json"] if json_ else [])]
    )


def test_what_a_teacher_is_worth_is_printed(place: Path, config: Path) -> None:
    done = add(place, config, ("t.py:net", "w.npz"), ("t.py:net", "other.npz"), json_=True)
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    itself, other, together = told["trial"]
    assert itself["accuracy"] > 0.9 and itself["agreement"] > 0.9 and itself["images"] == 64
    assert 0.25 <= itself["confidence"] <= 1 and itself["ms_per_image"] > 0
    assert other["accuracy"] < itself["accuracy"] and together["teacher"] == "all together"
    assert told["student_accuracy"] > 0.9 and len(told["teachers"]) == 2
    assert any("worse than its student" in w for w in told["warnings"])
    text = add(place, config, ("t.py:net", "w.npz")).output
    assert "calibration images" in text and "ms per image" in text and "Warning" not in text


@pytest.mark.parametrize(
    ("spec", "weights", "what"),
    [
        ("t.py:nett", "", "did you mean net?"),
        ("t.py:net", "more.npz", "head2.weight not known"),
        ("t.py:net", "less.npz", "head.bias not given"),
        ("t.py:net", "wide.npz", r"head.bias: (5,) there, (4,) here"),
        ("t.py:thousand", "", "knows 1,000 classes, the bundle 4"),
        ("t.py:Constant", "w.npz", "answers class 1 for all 64"),
        ("t.py:Dictionary", "", "cannot be run on 16x16 images"),
        ("t.py:Broken", "", "no probabilities"),
        ("raises.py:net", "", "no card"),
    ],
)
def test_what_cannot_teach_is_refused_and_nothing_is_written(
    place: Path, config: Path, spec: str, weights: str, what: str
) -> None:
    done = add(place, config, ("t.py:net", "w.npz"), (spec, weights))
    assert isinstance(done.exception, RefoldError) and done.exception.exit_code != 0
    assert what in done.exception.message and "\n" not in done.exception.message
    assert not (config.parent / "refold.db").exists() and not (config.parent / "objects").exists()


def test_a_refused_teacher_leaves_the_old_ones(place: Path, config: Path) -> None:
    assert add(place, config, ("t.py:net", "w.npz")).exit_code == 0
    assert add(place, config, ("t.py:thousand", "")).exit_code != 0
    store = Store(f"sqlite:///{config.parent / 'refold.db'}")
    (record,) = store.bundles()
    store.close()
    assert record.teachers == ((f"{place / 't.py'}:net", str(place / "w.npz")),)


def test_a_bundle_that_nobody_teaches_says_so(place: Path, config: Path) -> None:
    done = add(place, config)
    assert done.exit_code == 0 and "Nobody teaches this bundle" in done.output


def test_a_worker_refuses_what_the_settings_file_names(place: Path) -> None:
    bundle = Bundle.open(place / "m.refold")
    with pytest.raises(ModelError, match="1,000 classes"):
        make_lesson(bundle, [(f"{place / 't.py'}:thousand", "")], {}, threads=1)
    with pytest.raises(InputError, match="head2"):
        make_lesson(bundle, [(f"{place / 't.py'}:net", str(place / "more.npz"))], {}, threads=1)


@pytest.mark.parametrize(
    "answers",
    [np.full((2, 4), np.nan), np.full((2, 4), 0.3), np.array([[1.5, -0.5, 0, 0]] * 2), np.full((3, 4), 0.25), np.full(2, 0.5)],
)
def test_answers_that_are_no_probabilities(answers: np.ndarray) -> None:
    with pytest.raises(ModelError):
        check_answers(answers.astype(np.float32), 2, 4, "t")


def test_figures_without_labels_or_images() -> None:
    teacher = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
    student = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 1, 0]]
    found = figures("t", teacher, student, None, 2.0)
    assert found.accuracy is None and found.agreement == pytest.approx(4 / 6) and not found.warnings
    assert "4 images" not in found.sentence() and "6 calibration images" in found.sentence()
    assert "no calibration images" in figures("t", teacher[:0], student[:0], None, 0.0).warnings[0]
    upside_down = figures("t", teacher[:, ::-1], teacher, None, 0.0)
    assert "hardly more often than chance" in upside_down.warnings[0]
