"""Why the cloud is not reached: gRPC's own reason and what it means are in the sentence, over real sockets and real TLS."""

from __future__ import annotations

import socket
import threading
from concurrent import futures

import grpc
import pytest
from cloud_double import Authority, Cloud

from edge.channel import Link
from edge.enrol import enrol
from edge.link_settings import EnrolSettings
from refold.errors import NetworkError, RefoldError
from refold.v1 import adaptation_pb2


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def cloud(authority):
    cloud = Cloud(authority)
    cloud.start()
    yield cloud
    cloud.stop()


def sentence_of(address, identity, server_name="", service="adaptation", method="PollRelease"):
    link = Link(address, identity, server_name)
    try:
        with pytest.raises(RefoldError) as e:
            link.call(service, method, adaptation_pb2.PollReleaseRequest(), 10.0)
    finally:
        link.close()
    return e.value


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_nobody_listens(authority):
    error = sentence_of(f"127.0.0.1:{free_port()}", authority.identity())
    assert error.code == "unavailable" and "cannot be reached" in error.message
    assert "Connection refused" in error.message and "is the port right" in error.message


def test_a_name_that_nobody_knows(authority):
    error = sentence_of("no-such-host.invalid:7443", authority.identity())
    assert error.code == "unavailable" and "no-such-host.invalid" in error.message and "name is not known" in error.message


def test_another_authority_and_another_name(authority, cloud):
    error = sentence_of(f"localhost:{cloud.port}", Authority("other").identity())
    assert error.code == "tls" and "CERTIFICATE_VERIFY_FAILED" in error.message and "not under the CA" in error.message
    error = sentence_of(f"localhost:{cloud.port}", authority.identity(), server_name="cloud.example.org")
    assert error.code == "tls" and "Hostname Verification" in error.message and "server_name" in error.message


def test_a_port_that_does_not_speak_tls(authority):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        error = sentence_of(f"127.0.0.1:{port}", authority.identity())
    finally:
        server.stop(None).wait()
    assert error.code == "tls" and "does not speak TLS" in error.message


def test_the_other_port_of_the_service(authority, cloud, tmp_path):
    """Enrolment at the port for devices, and a device at a port that does not know its calls."""
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    settings = EnrolSettings(address=f"localhost:{cloud.port}", ca=tmp_path / "ca.pem")
    with pytest.raises(NetworkError, match=r"certificate of the fleet|client certificate|enrolment"):
        enrol(settings, "good", tmp_path / "identity")
    key, certificate = authority.server()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    try:
        error = sentence_of(f"localhost:{port}", authority.identity())
    finally:
        server.stop(None).wait()
    assert error.code == "unimplemented" and "7443" in error.message and "7444" in error.message


def test_a_fingerprint_is_asked_for_at_an_address_where_nobody_is(tmp_path):
    settings = EnrolSettings(address=f"127.0.0.1:{free_port()}", fingerprint="ab" * 32)
    with pytest.raises(NetworkError, match=r"Connection refused.*is the port right"):
        enrol(settings, "token", tmp_path / "identity")


def test_a_silent_port_ends_with_the_deadline(authority):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        link = Link(f"127.0.0.1:{silent.getsockname()[1]}", authority.identity())
        try:
            with pytest.raises(NetworkError, match=r"did not answer in time|cannot be reached|No secure connection"):
                link.call("adaptation", "PollRelease", adaptation_pb2.PollReleaseRequest(), 0.5)
        finally:
            link.close()
    assert threading.active_count() < 50
