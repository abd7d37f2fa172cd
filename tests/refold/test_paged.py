"""Paged bundles: aligned, streamed, verified record by record, and nothing else passes for one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import bundle as picture_bundle

import refold.bundle as module
from refold import Bundle, NormKind, NormSite, NormState, NormTable, SigningKey
from refold.cli import main
from refold.errors import BundleError, SignatureError, StorageError, UsageError
from refold.experts import (
    Geometry,
    PagedModel,
    PagedWriter,
    Resident,
    Tensor,
    decode,
    dequantise,
    encode,
    quantise,
    write_paged,
)
from refold.experts.write import Rest
from refold.norms import SiteTensors
from refold.signing import KeyRing

GEOMETRY = Geometry("mixtral", (-1, 0, 3), 2, 1, 32, 64, True, "silu", 32)
RESIDENT = {
    "model.embed.weight": np.arange(96, dtype=np.float32).reshape(3, 32),
    "model.norm.weight": np.linspace(0.5, 2, 32).astype(np.float16),
    "model.half": Tensor("BF16", (3,), np.array([0x3F80, 0xC000, 0x4049], "<u2").tobytes()),
}
NORM = NormSite(
    "model.norm.weight",
    NormKind.RMS,
    NormState(RESIDENT["model.norm.weight"], np.zeros(0)),
    tensors=SiteTensors(multiply="model.norm.weight"),
)


def weights(layer, expert):
    rng = np.random.default_rng(abs(layer) * 10 + expert)
    return [rng.normal(size=shape).astype(np.float32) for shape in GEOMETRY.shapes]


@functools.cache
def records():
    return list(_records())


def _records():
    for layer in GEOMETRY.layers:
        for expert in range(GEOMETRY.experts):
            bits = (2, 4, 8)[(abs(layer) + expert) % 3]
            yield layer, expert, bits, encode(layer, expert, [quantise(w, bits, 32) for w in weights(layer, expert)])


def paged(path, *keys, **more):
    rest = {"norms": NormTable((NORM,)), "tokenizer": {"tokenizer.json": b"{}"}, "frequency": {(0, 1): 0.25}}
    return write_paged(path, GEOMETRY, records(), {"model_type": "mixtral"}, RESIDENT, *keys, **rest | more)


def test_what_is_written_is_read(tmp_path):
    paged(tmp_path / "m.refold")
    m = PagedModel.open(tmp_path / "m.refold")
    assert m.records_at % 4096 == 0 and m.config == {"model_type": "mixtral"} and m.index.geometry == GEOMETRY
    assert m.index.frequency == {(0, 1): 0.25} and m.tokenizer_files() == {"tokenizer.json": b"{}"} and not m.bytes_as_tokens
    got = dict(m.resident_tensors())
    assert got["model.half"].numpy().tolist() == [1.0, -2.0, 3.140625]
    for name in ("model.embed.weight", "model.norm.weight"):
        assert np.array_equal(got[name].numpy(), RESIDENT[name]) and got[name].numpy().dtype == RESIDENT[name].dtype
    raw = (tmp_path / "m.refold").read_bytes()
    for layer, expert, bits, record in records():
        r = m.index[layer, expert]
        assert r.bits == bits and raw[m.records_at + r.offset :][: r.size] == record == m.read_record(layer, expert)
        assert np.array_equal(
            dequantise(decode(record, GEOMETRY.shapes, layer, expert)[0]),
            dequantise(quantise(weights(layer, expert)[0], bits, 32)),
        )
    assert m.bundle.norms.site("model.norm.weight").exported == NORM.exported
    assert dict(m.bundle.manifest.experts.bits) == {2: 2, 4: 3, 8: 1}
    assert [p.name for p in tmp_path.iterdir()] == ["m.refold"]


def test_other_tools_read_the_archive(tmp_path):
    m = paged(tmp_path / "m.refold")
    with zipfile.ZipFile(m.path) as z:
        assert z.testzip() is None
        assert len(z.read("experts/records.bin")) == m.index.total
    m.verify()
    m.bundle.verify()
    root = m.bundle.extract(tmp_path / "out")
    assert (root / "experts/records.bin").read_bytes() == b"".join(r[3] for r in records())


def test_the_library_reads_the_resident_part(tmp_path):
    library = pytest.importorskip("safetensors")
    root = paged(tmp_path / "m.refold").bundle.extract(tmp_path / "out")
    with library.safe_open(root / "experts/resident.safetensors", "np") as f:
        assert set(f.keys()) == set(RESIDENT)
        assert np.array_equal(f.get_tensor("model.embed.weight"), RESIDENT["model.embed.weight"])


def test_same_content_is_the_same_file(tmp_path):
    paged(tmp_path / "a.refold", name="m"), paged(tmp_path / "b.refold", name="m")
    assert (tmp_path / "a.refold").read_bytes() == (tmp_path / "b.refold").read_bytes()


def test_a_cut_off_file_is_no_bundle_and_goes_on_to_the_same_bytes(tmp_path):
    whole = paged(tmp_path / "whole.refold", name="m").path.read_bytes()
    given_ = records()
    writer = PagedWriter.begin(tmp_path / "m.refold")
    done = [writer.append(*r) for r in given_[:3]]
    writer.append(*given_[3])  # written, but the journal does not say so
    writer.close()
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "m.refold")
    raw = bytearray((tmp_path / "m.refold").read_bytes())
    raw[4096 + done[2].offset + 70] ^= 1  # a disk that lost a page of the third
    (tmp_path / "m.refold").write_bytes(raw)
    writer = PagedWriter.resume(tmp_path / "m.refold", done)
    assert writer.records == done[:2]
    for r in given_[2:]:
        writer.append(*r)
    tensors = [Resident.of(n, t if isinstance(t, Tensor) else Tensor.of(t)) for n, t in RESIDENT.items()]
    more = {"tokenizer": {"tokenizer.json": b"{}"}, "norms": NormTable((NORM,)), "frequency": {(0, 1): 0.25}}
    writer.finish(GEOMETRY, Rest("m", {"model_type": "mixtral"}, tensors, **more))
    assert (tmp_path / "m.refold").read_bytes() == whole


def test_missing_experts_are_an_error_and_leave_nothing(tmp_path):
    with pytest.raises(BundleError, match="lacks experts"):
        write_paged(tmp_path / "m.refold", GEOMETRY, records()[:-1], {}, {})
    with pytest.raises(UsageError, match="multiple of 4096"):
        write_paged(tmp_path / "m.refold", GEOMETRY, [(0, 0, 4, b"short")], {}, {})
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_named_by_its_expert(tmp_path, capsys):
    m = paged(tmp_path / "m.refold")
    raw = bytearray(m.path.read_bytes())
    raw[m.records_at + m.index[3, 1].offset + 200] ^= 4
    m.path.write_bytes(raw)
    again = PagedModel.open(m.path)  # opening reads no records
    with pytest.raises(BundleError, match="Expert 1 of layer 3") as e:
        again.verify()
    assert e.value.code == "digest"
    with pytest.raises(BundleError, match="Expert 1 of layer 3"):
        again.read_record(3, 1)
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(m.path)])
    assert stop.value.code == 5 and "Expert 1 of layer 3" in capsys.readouterr().err


def test_a_changed_resident_tensor_is_noticed(tmp_path):
    m = paged(tmp_path / "m.refold")
    raw = bytearray(m.path.read_bytes())
    raw[m.resident_places()["model.norm.weight"].start] ^= 1
    m.path.write_bytes(raw)
    with pytest.raises(BundleError, match="digest"):
        list(PagedModel.open(m.path).resident_tensors())


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    path = paged(tmp_path / "m.refold").path
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(BundleError):
        PagedModel.open(path)


@settings(max_examples=60)
@given(st.data())
def test_a_file_with_any_byte_changed_is_read_right_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("m") / "m.refold"
    raw = bytearray(paged(path).path.read_bytes())
    inside = st.integers(0, 100) | st.integers(4090, 4200) | st.integers(len(raw) - 4000, len(raw) - 1)
    at = data.draw(inside | st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    try:
        m = PagedModel.open(path)
        m.verify()
        tensors = dict(m.resident_tensors())
    except BundleError:
        return
    assert {n: t.data for n, t in tensors.items()} == {
        n: t.data if isinstance(t, Tensor) else t.tobytes() for n, t in RESIDENT.items()
    }
    assert [m.read_record(*k) for k in m.index.records] == [r[3] for r in records()]


def test_signatures_hold_for_paged_bundles(tmp_path):
    key = SigningKey.generate()
    m = paged(tmp_path / "m.refold", key)
    m.verify(KeyRing([key.public]))
    with pytest.raises(SignatureError):
        m.verify(KeyRing([SigningKey.generate().public]))


def test_pictures_and_language_are_told_apart(tmp_path):
    m = paged(tmp_path / "m.refold")
    with pytest.raises(BundleError, match="refold edge generate") as e:
        _ = m.bundle.preprocess
    assert e.value.code == "paged"
    with pytest.raises(BundleError, match="refold export experts") as e:
        PagedModel.open(picture_bundle(tmp_path / "p.refold").path)
    assert e.value.code == "not-paged"


def test_only_stored_records_pass_the_limit_on_size(tmp_path, monkeypatch):
    path = paged(tmp_path / "m.refold").path
    monkeypatch.setattr(module, "LIMITS", module.LIMITS.__class__(bundle_bytes=8000))
    Bundle.open(path)  # records and resident part do not count
    with zipfile.ZipFile(path) as z:
        members = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name, content)
    with pytest.raises(BundleError, match="compressed"):
        Bundle.open(path)


def test_inspect_verify_and_extract_know_paged_bundles(tmp_path, capsys):
    path = paged(tmp_path / "m.refold", measured={"perplexity": 4.5}).path
    main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "mixtral" in out and "3 of 4 bits" in out and "perplexity" in out
    main(["inspect", "--json", str(path)])
    assert '"family": "mixtral"' in capsys.readouterr().out
    main(["verify", str(path)])
    assert "records" in capsys.readouterr().out
    main(["extract", str(path), "-o", str(tmp_path / "out")])
    assert (tmp_path / "out/experts/records.bin").stat().st_size == PagedModel.open(path).index.total


def test_a_full_disk_leaves_nothing(tmp_path):
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_paged import paged
from refold.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))
try:
    paged({str(tmp_path / "m.refold")!r})
except StorageError as e:
    print(e.message)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "cannot be written" in done.stdout and not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        paged(tmp_path / "no" / "m.refold")


def test_verify_needs_memory_for_one_chunk_only(tmp_path):
    """48 MiB of records under 32 MiB of extra address space."""
    geometry = Geometry("mixtral", (0,), 3, 1, 32, 64, True, "silu", 32)
    write_paged(tmp_path / "m.refold", geometry, ((0, e, 4, bytes(16 << 20)) for e in range(3)), {}, {})
    program = f"""
import resource
from refold import Bundle
from refold.experts import PagedModel
m = PagedModel.open({str(tmp_path / "m.refold")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
m.verify()
m.bundle.extract({str(tmp_path / "out")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=dict(os.environ))
    assert int(done.stdout) < 12 << 10
