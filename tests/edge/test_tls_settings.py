"""TLS settings in every combination: either the port has the protection that was asked for, or it is not opened."""

from __future__ import annotations

import itertools

import grpc
import pytest
from cloud_double import Authority, Cloud

from edge.enrol import enrol
from edge.inference import Handlers, InferenceServer
from edge.link_settings import EnrolSettings
from edge.settings import load_settings
from refold.errors import RefoldError, UsageError
from refold.inference import open_inference_pb2 as pb
from refold.inference import open_inference_pb2_grpc as service

STATES = ("absent", "unset variable", "missing", "empty file", "directory", "no PEM", "another's", "good")


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """(setting, state) to what the setting says; None leaves it out."""
    folder = tmp_path_factory.mktemp("tls")
    other = Authority("other")
    (key, certificate), (other_key, other_certificate) = authority.server(), other.server()
    contents = {
        "certificate": (certificate, other_certificate),
        "key": (key, other_key),
        "client_ca": (authority.pem, other.pem),
    }
    found = {}
    for name, (good, others) in contents.items():
        for state, content in {"empty file": b"", "no PEM": b"-----BEGIN\n", "another's": others, "good": good}.items():
            path = folder / f"{name}-{state}"
            path.write_bytes(content)
            found[name, state] = str(path)
        found |= {(name, "absent"): None, (name, "unset variable"): "", (name, "missing"): str(folder / "nothing")}
        found[name, "directory"] = str(folder)
    return found


@pytest.fixture(scope="module")
def handlers(bundle, factory):
    from edge.engine import EngineSlot
    from edge.serving import ServingState

    return lambda: Handlers(bundle, EngineSlot(factory.build(ServingState())), 8, None)


def answers(address, credentials=None):
    channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
    with channel:
        try:
            service.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=5)
        except grpc.RpcError:
            return False
        return True


def test_a_port_is_protected_as_asked_or_not_opened(files, authority, handlers):
    served = []
    for states in itertools.product(STATES, repeat=3):
        given = dict(zip(("certificate", "key", "client_ca"), states, strict=True))
        values = {name: files[name, state] for name, state in given.items()}
        environment = {f"REFOLD_EDGE_INFERENCE__{n.upper()}": v for n, v in values.items() if v is not None}
        try:
            settings = load_settings(None, {"inference": {"port": 0}}, environment)
            server = InferenceServer(handlers(), settings.inference)
        except UsageError as e:
            assert e.exit_code == 2 and e.message
            continue
        served.append(states)
        address = f"localhost:{server.port}"
        identity = authority.identity()
        try:
            anybody = grpc.ssl_channel_credentials(authority.pem)
            member = grpc.ssl_channel_credentials(authority.pem, identity.key_pem, identity.certificate_pem)
            assert answers(address) == (states == ("absent",) * 3), given
            if states[:2] == ("good", "good"):
                assert answers(address, anybody) == (states[2] == "absent"), given
                assert answers(address, member) == (states[2] in ("absent", "good")), given
        finally:
            server.close()
    assert set(served) == {
        ("absent", "absent", "absent"),
        *itertools.product(("good",), ("good",), ("absent", "good", "another's")),
        *itertools.product(("another's",), ("another's",), ("absent", "good", "another's")),
    }


@pytest.mark.parametrize(
    "names", [("certificate",), ("key",), ("client_ca",), ("certificate", "client_ca"), ("key", "client_ca")]
)
def test_half_given_names_what_is_missing_and_who_gave_the_half(names, tmp_path):
    file = tmp_path / "edge.toml"
    file.write_text("[inference]\n" + "".join(f"{name} = 'x.pem'\n" for name in names))
    with pytest.raises(UsageError, match=r"edge\.toml: inference\.") as e:
        load_settings(file, {}, {})
    assert "TLS" in e.value.message and "\n" not in e.value.message


def test_an_encrypted_key_is_refused(tmp_path, authority, handlers):
    from cryptography.hazmat.primitives import serialization

    key, certificate = authority.server()
    private = serialization.load_pem_private_key(key, None)
    locked = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    )
    (tmp_path / "key").write_bytes(locked)
    (tmp_path / "cert").write_bytes(certificate)
    flags = {"inference": {"port": 0, "certificate": str(tmp_path / "cert"), "key": str(tmp_path / "key")}}
    with pytest.raises(UsageError, match="unencrypted key"):
        InferenceServer(handlers(), load_settings(None, flags, {}).inference)


@pytest.mark.parametrize(
    ("ca", "fingerprint"), list(itertools.product(("absent", "good", "wrong"), ("absent", "good", "of the CA", "wrong")))
)
def test_the_token_goes_only_to_a_server_that_all_given_proofs_fit(ca, fingerprint, tmp_path, authority):
    import hashlib

    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    def digest(pem):
        return hashlib.sha256(x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)).hexdigest()

    cloud = Cloud(authority, mutual=False)
    cloud.start()
    try:
        paths = {"good": authority.pem, "wrong": Authority("other").pem}
        if ca != "absent":
            (tmp_path / "ca.pem").write_bytes(paths[ca])
        prints = {"good": digest(cloud.pair[1]), "of the CA": digest(authority.pem), "wrong": "ab" * 32}
        settings = EnrolSettings(
            address=f"localhost:{cloud.port}",
            ca=None if ca == "absent" else tmp_path / "ca.pem",
            fingerprint=prints.get(fingerprint, ""),
        )
        fits = "wrong" not in (ca, fingerprint) and (ca, fingerprint) != ("absent", "absent")
        if fingerprint == "of the CA" and ca == "absent":
            fits = None  # where the server sends its chain along, and this Python shows it
        try:
            enrol(settings, "good", tmp_path / "identity")
            assert fits is not False
        except RefoldError:
            assert fits is not True
        assert bool(cloud.enrolments) == (tmp_path / "identity" / "identity.json").exists()
        if fits is False:
            assert not cloud.enrolments
    finally:
        cloud.stop()


def test_an_unset_variable_is_no_fingerprint_and_no_ca():
    for setting in ("ENROL__FINGERPRINT", "ENROL__CA", "ENROL__SERVER_NAME", "INFERENCE__CLIENT_CA"):
        with pytest.raises(UsageError, match=f"REFOLD_EDGE_{setting}: .* is '': it is given and empty"):
            load_settings(None, {}, {f"REFOLD_EDGE_{setting}": ""})


def test_trust_that_would_be_ignored_is_refused(tmp_path):
    from click.testing import CliRunner

    from edge.experts.generate_cli import generate
    from edge.experts.release import trust

    with pytest.raises(UsageError, match="A cohort goes with --key"):
        trust(tmp_path, (), "roof")
    for flag, value in (("--key", "ab" * 32), ("--cohort", "roof")):
        failure = CliRunner().invoke(generate, [str(tmp_path / "m.refold"), "text", flag, value]).exception
        assert isinstance(failure, UsageError) and "--release" in failure.message
