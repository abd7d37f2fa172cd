"""Keys: made once, kept private, refused when they are something else."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from refold import SigningKey
from refold.errors import UsageError
from refold.signing import KeyRing, key_id


def test_a_saved_key_signs_as_before_and_is_private(tmp_path):
    key = SigningKey.generate()
    key.save(tmp_path / "k.pem")
    again = SigningKey.load(tmp_path / "k.pem")
    assert again.public == key.public and again.key_id == key_id(key.public)
    assert (tmp_path / "k.pem").stat().st_mode & 0o777 == 0o600
    KeyRing([key.public]).verify(b"payload", [again.sign(b"payload")])


def test_a_key_is_never_overwritten(tmp_path):
    SigningKey.generate().save(tmp_path / "k.pem")
    before = (tmp_path / "k.pem").read_bytes()
    with pytest.raises(UsageError, match="never overwritten"):
        SigningKey.generate().save(tmp_path / "k.pem")
    assert (tmp_path / "k.pem").read_bytes() == before


def test_other_files_are_not_keys(tmp_path):
    (tmp_path / "text").write_text("hello")
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ec.pem").write_bytes(other)
    for name, sentence in (("none", "cannot be read"), ("text", "not a signing key"), ("ec.pem", "another kind")):
        with pytest.raises(UsageError, match=sentence):
            SigningKey.load(tmp_path / name)


def test_a_ring_refuses_short_keys_and_impossible_thresholds():
    with pytest.raises(UsageError, match="32 raw bytes"):
        KeyRing([b"short"])
    for threshold in (0, 2):
        with pytest.raises(UsageError, match="threshold"):
            KeyRing([SigningKey.generate().public], threshold)
    assert len(KeyRing([SigningKey.generate().public])) == 1
