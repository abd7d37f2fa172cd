"""Bundles: what is written is what is read, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import PARTS, bundle, manifest

import refold.bundle as module
from refold import Bundle, SigningKey, write_bundle
from refold.errors import BundleError, SignatureError, StorageError
from refold.signing import KeyRing


def rewrite(path: Path, change: dict[str, bytes | None]) -> Path:
    """The same archive with members replaced, added or (None) left out."""
    with zipfile.ZipFile(path) as z:
        members = {n: z.read(n) for n in z.namelist()}
    members.update({k: v for k, v in change.items() if v is not None})
    with zipfile.ZipFile(path, "w") as z:
        for name, content in members.items():
            if change.get(name, b"") is not None:
                z.writestr(name, content)
    return path


def test_what_is_written_is_read(tmp_path):
    b = bundle(tmp_path / "m.refold")
    again = Bundle.open(tmp_path / "m.refold")
    assert again.digest == b.digest and {p.path: again.read(p.path) for p in again.parts} == PARTS
    assert again.target().name == again.target("ort-x86-avx2").name
    again.verify()
    assert [p.name for p in tmp_path.iterdir()] == ["m.refold"]


def test_same_content_is_the_same_file(tmp_path):
    bundle(tmp_path / "a.refold"), bundle(tmp_path / "b.refold")
    assert (tmp_path / "a.refold").read_bytes() == (tmp_path / "b.refold").read_bytes()


def test_extract_writes_every_part(tmp_path):
    root = bundle(tmp_path / "m.refold").extract(tmp_path / "out")
    assert {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".pb"} == PARTS


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path, keep):
    path = bundle(tmp_path / "m.refold").path
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(BundleError) as e:
        Bundle.open(path)
    assert e.value.code == "damaged" and str(path) in e.value.message


def test_changed_part_is_refused_when_read(tmp_path):
    path = rewrite(bundle(tmp_path / "m.refold").path, {"targets/ort-x86-avx2/taps.onnx": b"tapz"})
    b = Bundle.open(path)
    for use in (lambda: b.read("targets/ort-x86-avx2/taps.onnx"), b.verify, lambda: b.extract(tmp_path / "out")):
        with pytest.raises(BundleError) as e:
            use()
        assert e.value.code == "digest"
    assert not (tmp_path / "out/targets/ort-x86-avx2/taps.onnx").exists()


@pytest.mark.parametrize(
    "change",
    [{"targets/ort-x86-avx2/taps.onnx": b"longer"}, {"targets/ort-x86-avx2/taps.onnx": None}, {"stowaway": b"x"},
     {"manifest.pb": None}, {"manifest.pb": b"\xff\xff\xff"}, {"manifest.pb": b""}, {"../evil": b"x"}, {"/etc/evil": b"x"}],
)  # fmt: skip
def test_inconsistent_archives_are_refused(tmp_path, change):
    path = rewrite(bundle(tmp_path / "m.refold").path, change)
    with pytest.raises(BundleError) as e:
        Bundle.open(path)
    assert e.value.code == "damaged"


def test_newer_format_is_refused(tmp_path):
    m = manifest()
    b = bundle(tmp_path / "m.refold")
    m.CopyFrom(b.manifest)
    m.format = 99
    with pytest.raises(BundleError, match="Update Refold") as e:
        Bundle.open(rewrite(b.path, {"manifest.pb": m.SerializeToString()}))
    assert e.value.code == "newer-format"


def test_oversized_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = bundle(tmp_path / "m.refold").path
    for limit, value in (("bundle_bytes", 100), ("bundle_parts", 2), ("manifest_bytes", 10)):
        with monkeypatch.context() as m:
            m.setattr(module, "LIMITS", module.LIMITS.__class__(**{limit: value}))
            with pytest.raises(BundleError, match="limit"):
                Bundle.open(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "m.refold", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("zeros", bytes(8 << 20))
    monkeypatch.setattr(module, "LIMITS", module.LIMITS.__class__(bundle_bytes=1 << 20))
    with pytest.raises(BundleError, match="unpack"):
        Bundle.open(tmp_path / "m.refold")


def test_missing_things_are_named(tmp_path):
    with pytest.raises(BundleError, match="no bundle at") as e:
        Bundle.open(tmp_path / "none.refold")
    assert e.value.exit_code == 5
    b = bundle(tmp_path / "m.refold")
    with pytest.raises(BundleError, match="no part"):
        b.read("nothing")
    with pytest.raises(BundleError, match="it has: ort-x86-avx2"):
        b.target("tpu")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path)


def test_signed_bundle_is_trusted_only_with_its_key(tmp_path):
    key, other = SigningKey.generate(), SigningKey.generate()
    b = bundle(tmp_path / "m.refold", key)
    b.verify(KeyRing([key.public]))
    with pytest.raises(SignatureError):
        b.verify(KeyRing([other.public]))
    with pytest.raises(SignatureError):
        bundle(tmp_path / "unsigned.refold").verify(KeyRing([key.public]))
    with pytest.raises(BundleError, match="signatures"):
        Bundle.open(rewrite(b.path, {"manifest.sig": b"\xff\xff"})).verify(KeyRing([key.public]))


def test_unwritable_folder_is_one_sentence(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        bundle(tmp_path / "no" / "such" / "folder.refold")


def test_a_full_disk_leaves_the_old_bundle(tmp_path):
    """A real write that fails half-way: the process may write only 4 KiB per file."""
    old = bundle(tmp_path / "m.refold").path.read_bytes()
    program = f"""
import resource, signal, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from samples import manifest
from refold import write_bundle
from refold.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_bundle({str(tmp_path / "m.refold")!r}, manifest(), {{"big": os.urandom(100000)}})
except StorageError as e:
    print(e.message)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot be written" in done.stdout
    assert (tmp_path / "m.refold").read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["m.refold"]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "m.refold", manifest(), PARTS)
    assert not list(tmp_path.iterdir())


@given(st.data())
def test_a_file_with_any_byte_changed_is_read_right_or_refused(data):
    """Opening and verifying may fail with a BundleError and with nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = bundle(Path(folder) / "m.refold").path
        raw = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bytes(raw))
        try:
            b = Bundle.open(path)
            b.verify()
        except BundleError:
            return
        assert {p.path: b.read(p.path) for p in b.parts} == PARTS


@given(st.data())
def test_a_manifest_with_any_byte_changed_is_one_clear_error_or_another_bundle(data):
    with tempfile.TemporaryDirectory() as folder:
        b = bundle(Path(folder) / "m.refold")
        raw = bytearray(zipfile.ZipFile(b.path).read("manifest.pb"))
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            other = Bundle.open(rewrite(b.path, {"manifest.pb": bytes(raw)}))
        except BundleError:
            return
        assert other.digest != b.digest
