"""Addresses: the form is checked wherever one is given, and the sentence shows the form that is expected."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cloud.cli import cloud
from cloud.settings import load_settings as load_cloud
from edge.cli import edge
from edge.enrol import enrol
from edge.link_settings import EnrolSettings
from edge.settings import load_settings as load_edge
from refold.errors import UsageError
from refold.network import Address, check_host, meaning_of, parse_address, reason_of

GOOD = {
    "cloud.example.org:7443": "cloud.example.org:7443",
    "my_service:1": "my_service:1",
    "192.0.2.7:65535": "192.0.2.7:65535",
    "[::1]:7443": "[::1]:7443",
    "[fe80::1%eth0]:1": "[fe80::1%eth0]:1",
    "localhost.:80": "localhost.:80",
    " cloud:7443\n": "cloud:7443",
    "dns:///cloud:7443": "cloud:7443",
    "dns:cloud:7443": "cloud:7443",
    "ipv4:192.0.2.7:1": "192.0.2.7:1",
    "ipv6:[::1]:7443": "[::1]:7443",
}
BAD = {
    "": "host:port, for example",
    "https://cloud:7443": "URL.* write cloud:7443",
    "https://cloud": "URL.* write cloud:7443",
    "grpc://[::1]": r"URL.* write \[::1\]:7443",
    "https://": "URL.* for example",
    "cloud": "port is missing.* for example cloud:7443",
    "cloud:": "port is missing",
    ":7443": "host is missing",
    "cloud:0": "ports are 1 to 65535",
    "cloud:65536": "ports are 1 to 65535",
    "cloud:7443a": "ports are 1 to 65535",
    "cloud:-1": "ports are 1 to 65535",
    "cloud:٣": "ports are 1 to 65535",
    "cloud:" + "9" * 5000: "ports are 1 to 65535",
    "::1": r"brackets, as in \[::1\]:7443",
    "::1:7443": "brackets",
    "[::1]": r"written \[address\]:port, for example \[::1\]:7443",
    "[::1:7443": "written",
    "[cloud]:7443": "write cloud:7443",
    "[::xyz]:1": "no IPv6 address",
    "1.2.3:4": "no IPv4 address",
    "256.1.1.1:4": "no IPv4 address",
    "cloud:7443/path": "path does not belong",
    "user@cloud:1": "letters, digits and hyphens",
    "two words:1": "letters, digits and hyphens",
    "-cloud:1": "letters, digits and hyphens",
    "a..b:1": "letters, digits and hyphens",
    "münchen.de:1": "xn--",
    "unix:/run/cloud.sock": "only TCP",
    "unix-abstract:cloud": "only TCP",
    "vsock:1:2": "only TCP",
    "dns://8.8.8.8/cloud:1": "resolver cannot be named",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_grpc_takes(text: str) -> None:
    assert str(parse_address(text)) == GOOD[text]


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_another_form_is_refused_with_the_right_one(text: str) -> None:
    with pytest.raises(ValueError, match=BAD[text]):
        parse_address(text)


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_a_sentence(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError as e:
        assert str(e) and not isinstance(e, UnicodeError)
    else:
        assert parse_address(str(address)) == address and 1 <= address.port <= 65_535


def test_hosts_to_listen_on() -> None:
    assert [check_host(h) for h in ("0.0.0.0", "::", "[::]", "localhost", " a.b ")] == [
        "0.0.0.0",
        "::",
        "::",
        "localhost",
        "a.b",
    ]
    assert str(Address("::", 80)) == "[::]:80"
    for text, says in {
        "https://x": "URL",
        "x:7443": "host alone is x",
        "[::1]:7443": "host alone is ::1",
        "": "missing",
        "1.2.3": "IPv4",
        "unix:/x": "name or an address",
        "a b": "letters",
    }.items():
        with pytest.raises(ValueError, match=says):
            check_host(text)


@pytest.mark.parametrize("address", ["https://localhost:7443", "localhost", "localhost:port", "::1:7443", "unix:/x"])
def test_every_place_an_address_is_given(address: str, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("")
    (tmp_path / "cloud.toml").write_text("")
    for setting in (
        "cloud.address",
        "enrol.address",
        "cloud.server_name",
        "enrol.server_name",
        "inference.host",
        "metrics.host",
    ):
        if address == "localhost" and not setting.endswith("address"):
            continue
        if address == "::1:7443" and not setting.endswith("address"):
            continue  # an IPv6 address, as it happens
        with pytest.raises(UsageError, match=f"X: {setting} is"):
            load_edge(None, _nested(setting, address), {}, flag_names={tuple(setting.split(".")): "X"})
    runner = CliRunner()
    for words in (["run", "--cloud", address], ["enrol", "--cloud", address, "--token", "t", "--ca", str(ca)]):
        failure = runner.invoke(edge, words).exception
        assert isinstance(failure, UsageError) and "--cloud: " in failure.message and "host:port" in failure.message
    for fingerprint in ("", "ab" * 32):
        settings = EnrolSettings.model_construct(
            address=address, ca=None, fingerprint=fingerprint, name="", server_name="", cohort=""
        )
        with pytest.raises(UsageError):
            enrol(settings, "token", tmp_path / "identity")
    if address not in ("localhost", "::1:7443"):
        with pytest.raises(UsageError, match=r"server\.address is"):
            load_cloud(tmp_path / "cloud.toml", {"REFOLD_CLOUD_SERVER__ADDRESS": address})
        for words in (["init", str(tmp_path / "f"), "--host", address], ["init", str(tmp_path / "f"), "--address", address]):
            failure = runner.invoke(cloud, words).exception
            assert isinstance(failure, UsageError) and repr(address) in failure.message
        assert not (tmp_path / "f").exists()


def _nested(setting: str, value: str) -> dict[str, dict[str, str]]:
    section, name = setting.split(".")
    return {section: {name: value}}


def test_ports_of_a_new_fleet(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(cloud, ["init", str(tmp_path / "f"), "--port", "70000"]).exit_code == 2
    failure = runner.invoke(cloud, ["init", str(tmp_path / "f"), "--port", "7444"]).exception
    assert isinstance(failure, UsageError) and "a port each" in failure.message and not (tmp_path / "f").exists()


def test_a_reason_is_one_line_without_its_envelope() -> None:
    details = "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:1: connect: Connection refused"
    assert reason_of(details) == "ipv6:[::1]:1: connect: Connection refused"
    assert "is the port right" in meaning_of(details) and meaning_of("something else") == ""
    assert len(reason_of("x" * 5000)) == 300 and reason_of("a\n b.") == "a b"
