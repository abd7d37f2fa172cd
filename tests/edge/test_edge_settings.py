"""Settings: file, environment, flags, in that order; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge.settings import EdgeSettings, load_settings
from refold.errors import UsageError

ROOT = Path(__file__).parents[2]


def load(tmp_path, text="", flags=None, environment=None):
    path = tmp_path / "edge.toml"
    path.write_text(text)
    return load_settings(path, flags, environment or {})


def test_later_sources_win(tmp_path):
    text = "bundle = 'a.refold'\n[source]\nfps = 5\nloop = true\n[adapt]\nmix = 0.25\n"
    environment = {"REFOLD_EDGE_SOURCE__FPS": "7", "REFOLD_EDGE_ENGINE__THREADS": "3", "OTHER": "x"}
    s = load(tmp_path, text, {"source": {"fps": 9.0, "loop": None}, "adapt": {"enabled": False}}, environment)
    assert (s.source.fps, s.source.loop, s.engine.threads) == (9.0, True, 3)
    assert s.adapt_settings().mix == 0.25 and not s.adapt_settings().enabled
    assert load(tmp_path, text, environment=environment).source.fps == 7


def test_paths_of_a_file_are_relative_to_it(tmp_path):
    text = "bundle = 'a.refold'\ndata = '/var/x'\nsource.path = 'pictures'\npredictions.path = '-'\nidentity = 'id'\n"
    s = load(tmp_path, text)
    assert s.bundle == str(tmp_path / "a.refold") and s.data == "/var/x" and s.predictions.path == "-"
    assert s.source.path == str(tmp_path / "pictures") and s.identity_folder == tmp_path / "id"
    assert load(tmp_path, "source.path = 'camera:0'\n").source.path == "camera:0"
    assert load(tmp_path, "", {"bundle": "b.refold"}).bundle == "b.refold"


def test_selection_follows_the_cloud(tmp_path):
    assert load(tmp_path).selection is None and load(tmp_path).cloud is None
    assert load(tmp_path, "cloud.address = 'c:1'\n").selection.name == "budget"
    assert load(tmp_path, "select.name = 'eata'\n").selection.name == "eata"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sorce.path = 'x'", "no setting sorce; did you mean source?"),
        ("[source]\nfsp = 3", "no setting source.fsp; did you mean source.fps?"),
        ("[cloud]\nadress = 'x:1'", "no setting cloud.adress; did you mean cloud.address?"),
        ("[adapt]\nmixx = 0.5", "no setting adapt.mixx; did you mean adapt.mix?"),
        ("zzz = 1", "no setting zzz; known are: bundle"),
        ("source = 'x'", "source is a section"),
        ("[source]\nfps = 'fast'", "source.fps is 'fast'"),
        ("[source]\nfps = -2", "source.fps is -2"),
        ("[adapt]\nmix = 3.0", "share between 0 and 1"),
        ("[cloud]\naddress = 'no port'", "cloud.address"),
        ("[select]\nname = 'psychic'", "select.name"),
        ("[select]\noptions = { rat = 0.5 }", "no setting 'rat'"),
        ("[inference]\nkey = 'k'", "belong together"),
        ("not toml at all", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        load(tmp_path, text + "\n")


def test_a_missing_file_and_a_wrong_variable(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        load_settings(tmp_path / "none.toml", {}, {})
    with pytest.raises(UsageError, match="did you mean source"):
        load_settings(None, {}, {"REFOLD_EDGE_SORCE__FPS": "1"})


def test_every_setting_says_what_it_is():
    for name, section in EdgeSettings.model_fields.items():
        for key, setting in getattr(section.annotation, "model_fields", {}).items():
            assert setting.description, f"{name}.{key}"


def test_the_example_configuration_is_valid():
    load_settings(ROOT / "deploy" / "edge.toml", {}, {})
