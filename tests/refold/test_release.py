"""Releases: what a thief, a vandal or a mix-up could send, and what happens to it."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import bundle, release
from strategies import nudge, rngs, site, state, widths

import refold.release as module
from refold import ActivationScale, Bundle, NormState, SigningKey
from refold.errors import NormStateError, RefoldError, ReleaseError, SignatureError
from refold.release import Release, admit, decode, digest, encode, open_signed, seal
from refold.signing import KeyRing
from refold.v1 import norms_pb2 as pb

KEY = SigningKey.generate()
RING = KeyRing([KEY.public])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle(tmp_path_factory.mktemp("b") / "m.refold")


def admitted(r: Release, b: Bundle, now: int = 0) -> None:
    admit(r, b.norms, bundle_digest=b.digest, cohort="roof", now_unix_ms=now)


@given(rngs, widths, st.integers(1, 2**63), st.text(max_size=20), st.floats(2**-20, 2**20, width=32))
def test_encoding_survives_the_round_trip(rng, n, version, note, scale):
    s = site(rng, n)
    r = Release("d" * 64, "roof", version, {s.name: nudge(rng, s.exported)}, parent_version=3, created_unix_ms=5,
                expires_unix_ms=7, domain="d1", activations=(ActivationScale("input", scale, 4, "a", "b"),), samples=9,
                statistics_frames=11, metrics={"agreement": 0.5}, note=note)  # fmt: skip
    payload = encode(r)
    assert decode(payload) == r and encode(decode(payload)) == payload


def test_a_good_release_is_admitted(tiny):
    r = release(tiny, states={s.name: nudge(np.random.default_rng(0), s.exported) for s in tiny.norms.norms})
    assert open_signed(seal(r, KEY), RING) == r
    admitted(r, tiny)
    assert len(digest(encode(r))) == 64


def test_a_release_signed_by_a_stranger_is_refused(tiny):
    with pytest.raises(SignatureError) as e:
        open_signed(seal(release(tiny), SigningKey.generate()), RING)
    assert e.value.code == "unsigned" and e.value.exit_code == 6


def test_an_unsigned_release_is_refused(tiny):
    with pytest.raises(SignatureError):
        open_signed(pb.SignedRelease(payload=encode(release(tiny))), RING)


@given(st.data())
def test_a_release_changed_on_its_way_is_refused(tiny, data):
    signed = seal(release(tiny), KEY)
    raw = bytearray(signed.payload)
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SignatureError) as e:
        open_signed(pb.SignedRelease(payload=bytes(raw), signatures=signed.signatures), RING)
    assert e.value.code == "bad-signature"


def test_one_signature_counts_once_towards_the_threshold(tiny):
    other = SigningKey.generate()
    ring = KeyRing([KEY.public, other.public], threshold=2)
    with pytest.raises(SignatureError, match="1 trusted signature"):
        open_signed(seal(release(tiny), KEY, KEY), ring)
    open_signed(seal(release(tiny), KEY, other), ring)


def test_a_good_signature_does_not_excuse_a_forged_one(tiny):
    signed = seal(release(tiny), KEY)
    signed.signatures.append(pb.Signature(key_id=KEY.key_id, ed25519=bytes(64)))
    with pytest.raises(SignatureError):
        open_signed(signed, RING)


def test_unsigned_bytes_are_never_parsed(monkeypatch, tiny):
    monkeypatch.setattr(module, "decode", lambda _: pytest.fail("parsed before it was verified"))
    with pytest.raises(SignatureError):
        open_signed(pb.SignedRelease(payload=b"\xff\xff"), RING)


@given(st.binary(max_size=300))
def test_random_bytes_are_one_clear_error(payload):
    with pytest.raises(RefoldError):
        decode(payload)


def test_an_endless_release_is_refused_unread(tiny, monkeypatch):
    signed = seal(release(tiny), KEY)
    monkeypatch.setattr(module, "LIMITS", module.LIMITS.__class__(release_bytes=100))
    for use in (lambda: open_signed(signed, RING), lambda: decode(signed.payload), lambda: encode(release(tiny))):
        with pytest.raises(ReleaseError) as e:
            use()
        assert e.value.code == "release-too-large"


def test_a_newer_release_format_asks_for_an_update(tiny):
    message = pb.Release.FromString(encode(release(tiny)))
    message.format = 2
    with pytest.raises(ReleaseError, match="update"):
        decode(message.SerializeToString())


@pytest.mark.parametrize("what", ["twice", "short", "long", "lengths", "garbage", "bomb", "sites"])
def test_states_that_do_not_belong_together_are_refused(tiny, what):
    message = pb.Release.FromString(encode(release(tiny)))
    packed = message.states
    raw = zlib.decompress(packed.planes)
    if what == "twice":
        packed.site.append(packed.site[0])
        packed.lengths.extend(packed.lengths[:4])
    elif what == "sites":
        packed.site.append("another")
    elif what == "lengths":
        packed.lengths[0] = 2**31
    else:
        new = {"short": raw[:-4], "long": raw + bytes(4), "bomb": bytes(64 << 20), "garbage": b""}[what]
        packed.planes = zlib.compress(new) if new else b"garbage"
    with pytest.raises(ReleaseError) as e:
        decode(message.SerializeToString())
    assert e.value.code == "damaged"


@pytest.mark.parametrize(
    ("change", "code"),
    [({"bundle_digest": "e" * 64}, "wrong-bundle"), ({"cohort": "cellar"}, "wrong-cohort"), ({"version": 0}, "version"),
     ({"expires_unix_ms": 10}, "expired")],
)  # fmt: skip
def test_a_release_for_somebody_else_is_refused(tiny, change, code):
    with pytest.raises(ReleaseError) as e:
        admitted(release(tiny, **change), tiny, now=11)
    assert e.value.code == code


def test_an_inadmissible_state_is_refused_whoever_signed_it(tiny):
    s = tiny.norms.norms[0]
    with pytest.raises(NormStateError):
        admitted(release(tiny, states={s.name: replace(s.exported, gamma=-s.exported.gamma)}), tiny)
    with pytest.raises(NormStateError):
        admitted(release(tiny, states={"another.net": s.exported}), tiny)
    with pytest.raises(NormStateError):
        admitted(release(tiny, states={s.name: replace(s.exported, beta=np.full(4, 1e30))}), tiny)


def test_a_state_wider_than_any_layer_is_refused(tiny, monkeypatch):
    import refold.codec as codec

    monkeypatch.setattr(codec, "LIMITS", codec.LIMITS.__class__(channels=2))
    with pytest.raises(ReleaseError, match="limits"):
        decode(encode(release(tiny, states={"x": NormState([1, 1, 1], [0, 0, 0])})))


def test_a_release_without_states_is_a_release(tiny):
    assert decode(encode(release(tiny, states={}))).states == {}


def test_packing_saves_a_tenth(tiny):
    rng = np.random.default_rng(0)
    states = {f"s{i}": nudge(rng, state(rng, 256)) for i in range(8)}
    assert len(encode(release(tiny, states=states))) < 0.9 * 8 * 256 * 16
