"""Attacks on a device's updates, one test each: what they try and why it fails. No disk, no network."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_bundle import COHORT, bundle, release

from edge.trust import Home, Memory, examine
from refold import NormState, SigningKey
from refold.errors import NormStateError, ReleaseError, SignatureError
from refold.release import digest, encode, seal
from refold.signing import KeyRing
from refold.v1 import norms_pb2 as pb

KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def b(tmp_path_factory):
    return bundle(tmp_path_factory.mktemp("b") / "m.refold")


@pytest.fixture
def home(b):
    return Home(b.digest, COHORT, b.norms, KeyRing([KEY.public]))


def seen(*releases, highest=None, **fields):
    names = {r.version: digest(encode(r)) for r in releases}
    current = names[releases[-1].version] if releases else ""
    return Memory(current, max(names, default=0) if highest is None else highest, names, **fields)


def refused(code, kind=ReleaseError):
    class Expect:
        def __enter__(self):
            self.raises = pytest.raises(kind)
            self.info = self.raises.__enter__()

        def __exit__(self, *error):
            swallowed = self.raises.__exit__(*error)
            assert self.info.value.code == code
            return swallowed

    return Expect()


def ask(signed, home, memory=None, *, ordered=True, now=1000):
    return examine(signed, home, memory or Memory(), ordered=ordered, now_unix_ms=now)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_newer_release_is_accepted_from_anywhere(b, home, ordered):
    assert ask(seal(release(b, 2), KEY), home, seen(release(b, 1)), ordered=ordered).version == 2


def test_a_replayed_old_release_is_refused(b, home):
    with refused("replayed"):
        ask(seal(release(b, 1), KEY), home, seen(release(b, 1), release(b, 2)), ordered=False)


def test_a_replay_after_an_ordered_rollback_is_refused(b, home):
    """The device went 1, 5, back to 1 by order; version 5 is signed, and yet nobody wants it any more."""
    memory = seen(release(b, 5), release(b, 1), highest=5)
    for version in (3, 5):
        with refused("replayed"):
            ask(seal(release(b, version), KEY), home, memory, ordered=False)


def test_a_replay_after_a_return_to_the_exported_state_is_refused(b, home):
    with refused("replayed"):
        ask(seal(release(b, 2), KEY), home, Memory(highest_version=2), ordered=False)


def test_the_cloud_may_order_an_older_release(b, home):
    assert ask(seal(release(b, 1), KEY), home, seen(release(b, 1), release(b, 2))).version == 1


def test_an_old_release_the_device_never_saw_may_be_ordered(b, home):
    assert ask(seal(release(b, 1), KEY), home, seen(release(b, 4))).version == 1


def test_the_release_in_use_may_be_offered_again(b, home):
    assert ask(seal(release(b, 2), KEY), home, seen(release(b, 2)), ordered=False).version == 2


def test_two_releases_of_one_version_are_refused(b, home):
    with refused("equivocation"):
        ask(seal(release(b, 2, note="another"), KEY), home, seen(release(b, 2)))


def test_a_release_that_failed_here_is_refused_even_when_ordered(b, home):
    bad = release(b, 3)
    with refused("failed-before"):
        ask(seal(bad, KEY), home, Memory(refused={digest(encode(bad)): "Half the canary's answers changed."}))


def test_a_stranger_cannot_order_anything(b, home):
    with refused("unsigned", SignatureError):
        ask(seal(release(b, 2), SigningKey.generate()), home)


def test_a_withdrawn_key_signs_nothing(b, home):
    new = SigningKey.generate()
    with refused("unsigned", SignatureError):
        ask(seal(release(b, 2), KEY), replace(home, ring=KeyRing([new.public])))


def test_one_stolen_key_is_not_enough_where_two_must_sign(b, home):
    other = SigningKey.generate()
    both = replace(home, ring=KeyRing([KEY.public, other.public], threshold=2))
    with refused("unsigned", SignatureError):
        ask(seal(release(b, 2), KEY, KEY), both)
    assert ask(seal(release(b, 2), KEY, other), both).version == 2


def test_a_truncated_release_is_refused(b, home):
    signed = seal(release(b, 2), KEY)
    with refused("bad-signature", SignatureError):
        ask(pb.SignedRelease(payload=signed.payload[:-7], signatures=signed.signatures), home)


def test_parts_of_two_releases_cannot_be_mixed(b, home):
    first, second = seal(release(b, 2), KEY), seal(release(b, 3), KEY)
    with refused("bad-signature", SignatureError):
        ask(pb.SignedRelease(payload=first.payload, signatures=second.signatures), home)


def test_endless_data_is_refused_unread(home):
    with refused("release-too-large"):
        ask(pb.SignedRelease(payload=bytes(5 * 2**20)), home)
    with refused("release-too-large"):
        ask(pb.SignedRelease(payload=b"x", signatures=[pb.Signature()] * 9), home)


def test_a_release_for_another_model_or_site_is_refused(b, home):
    with refused("wrong-bundle"):
        ask(seal(release(b, 2, bundle_digest="e" * 64), KEY), home)
    with refused("wrong-cohort"):
        ask(seal(release(b, 2, cohort="cellar"), KEY), home)
    with refused("shape", NormStateError):
        ask(seal(release(b, 2, states={"other": b.norms.norms[0].exported}), KEY), home)


def test_an_inadmissible_state_is_refused_whoever_signed_it(b, home):
    exported = b.norms.norms[0].exported
    with refused("sign-flip", NormStateError):
        ask(seal(release(b, 2, states={"conv": replace(exported, gamma=-exported.gamma)}), KEY), home)
    with refused("not-finite", NormStateError):
        state = NormState(exported.gamma, exported.beta * float("nan"), exported.mean, exported.variance)
        ask(seal(release(b, 2, states={"conv": state}), KEY), home)


def test_an_expired_release_is_refused(b, home):
    signed = seal(release(b, 2, expires_unix_ms=2000), KEY)
    assert ask(signed, home, now=1999).version == 2
    with refused("expired"):
        ask(signed, home, now=2001)


def test_a_clock_set_back_does_not_revive_an_expired_release(b, home):
    """A later release was seen once: it is at least as late as when that one was made."""
    with refused("expired"):
        ask(seal(release(b, 2, expires_unix_ms=2000), KEY), home, Memory(newest_unix_ms=5000), now=0)
