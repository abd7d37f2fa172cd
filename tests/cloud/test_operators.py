"""Operators: made, renewed, revoked and warned of their end, on a running service and on every database."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from fleet_of import COHORT, Fleet
from test_cloud_cli import failure, refold

from cloud.fleet.operators import expiry_warnings
from cloud.identity import Authority
from cloud.provision import LOCAL, provision
from cloud.show import show_operators
from cloud.store import OperatorRecord, Store
from refold.bundle import Bundle
from refold.errors import RefoldError, UsageError
from refold.v1 import adaptation_pb2, admin_pb2

DAY = 86_400_000


def refused(call: object, *args: object) -> str:
    with pytest.raises(grpc.RpcError) as e:
        call(*args, timeout=20)  # type: ignore[operator]
    assert e.value.code() is grpc.StatusCode.PERMISSION_DENIED
    return next(str(m.value) for m in e.value.trailing_metadata() if m.key == "refold-code")


def command(fleet: Fleet, *arguments: str) -> dict[str, object]:
    done = refold("cloud", "operator", *arguments, "--config", str(fleet.config), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def caller(fleet: Fleet, name: str):  # type: ignore[no-untyped-def]
    folder = fleet.directory / "operators"
    return fleet.caller((folder / f"{name}.key").read_bytes(), (folder / f"{name}.pem").read_bytes())


STATUS = admin_pb2.StatusRequest()


def test_an_operator_is_made_and_revoked_while_his_connection_is_open(fleet: Fleet) -> None:
    made = command(fleet, "issue", "anna")
    assert (
        Path(str(made["key"])).stat().st_mode & 0o777 == 0o600 and Path(str(made["key"])).parent.stat().st_mode & 0o777 == 0o700
    )
    anna, first = caller(fleet, "anna"), fleet.operator()
    for one in (anna, first):
        one.admin.Status(STATUS, timeout=20)
    assert command(fleet, "revoke", "anna") == {"operator": "anna", "revoked": 1}
    for one in (anna, caller(fleet, "anna")):  # the connection that was open, and a new one
        for call, request in (
            (one.admin.Status, STATUS),
            (one.admin.ListReleases, admin_pb2.ListReleasesRequest()),
            (one.admin.Rollback, admin_pb2.RollbackRequest()),
        ):
            assert refused(call, request) == "revoked"
    first.admin.Status(STATUS, timeout=20)
    states = {r["operator"]: r["state"] for r in command(fleet, "list")["operators"]}  # type: ignore[union-attr, attr-defined]
    assert states == {"anna": "revoked", "operator": "valid"}


def test_renewal_leaves_the_old_certificate_until_told_otherwise(fleet: Fleet) -> None:
    old = fleet.operator()
    made = command(fleet, "renew", "operator", "--days", "20")
    assert made["certificate"] == str(fleet.directory / "operator.pem")  # in place of the old one
    new = fleet.operator()
    for one in (old, new):
        one.admin.Status(STATUS, timeout=20)
    command(fleet, "renew", "operator", "--replace")
    for one in (old, new):
        assert refused(one.admin.Status, STATUS) == "revoked"
    fleet.operator().admin.Status(STATUS, timeout=20)


def test_the_last_operator_stays(fleet: Fleet) -> None:
    status, message = failure("operator", "revoke", "operator", "--config", str(fleet.config))
    assert status == 2 and "the last operator" in message
    fleet.operator().admin.Status(STATUS, timeout=20)
    command(fleet, "issue", "anna")
    command(fleet, "revoke", "operator")
    assert refused(fleet.operator().admin.Status, STATUS) == "revoked"
    assert "the last operator" in failure("operator", "revoke", "anna", "--config", str(fleet.config))[1]
    assert "no operator 'ana'; known: anna, operator" in failure("operator", "revoke", "ana", "--config", str(fleet.config))[1]


def test_two_operators_who_revoke_each_other_leave_one(database_url: str) -> None:
    store = Store(database_url)
    now = int(time.time() * 1000)
    for name in ("anna", "bert"):
        store.operators.add(OperatorRecord(f"0{name}", name, "operator", now, now + DAY), first=True)
    errors, barrier = [], threading.Barrier(2)

    def revoke(name: str) -> None:
        barrier.wait()
        try:
            store.operators.revoke(name)
        except RefoldError as e:
            errors.append(e.code)

    threads = [threading.Thread(target=revoke, args=(name,)) for name in ("anna", "bert")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == ["last-operator"] and sum(not r.revoked_ms for r in store.operators.all()) == 1
    store.close()


def test_rows_of_operators(database_url: str) -> None:
    store = Store(database_url)
    rows, now = store.operators, int(time.time() * 1000)
    old, new, other = (OperatorRecord(f"{n:02}", "anna", "operator", now + n, now + (n + 1) * DAY) for n in range(3))
    assert rows.adopt(old) == old == rows.adopt(old) == rows.get("00") and rows.adopt(other) is None
    for record, first in ((new, True), (OperatorRecord("09", "bert", "operator", now, now + DAY), False)):
        with pytest.raises(UsageError):
            rows.add(record, first=first)
    rows.add(new, first=False)
    assert rows.replace("anna", "01") == 1 and rows.get("00").revoked_ms and not rows.get("01").revoked_ms  # type: ignore[union-attr]
    rows.add(OperatorRecord("09", "bert", "operator", now, now + DAY), first=True)
    assert (rows.revoke("anna"), rows.revoke("anna")) == (1, 0)
    with pytest.raises(UsageError):  # a revoked one is not renewed
        rows.add(other, first=False)
    rows.add(other, first=True)
    assert [r.serial for r in rows.all()] == ["00", "01", "02", "09"]
    store.close()


def test_operators_of_an_earlier_version_are_recorded_at_their_first_call(fleet: Fleet) -> None:
    """`init` writes no row; neither did any version before. A certificate that was replaced before it called is refused."""
    authority = Authority.load(fleet.directory / "ca.pem", fleet.directory / "ca.key")
    pem, key = authority.issue_operator("carl")
    carl, again = fleet.caller(key, pem), fleet.caller(*authority.issue_operator("carl")[::-1])
    carl.admin.Status(STATUS, timeout=20)
    assert {r.name for r in fleet.store.operators.all()} == {"carl", "operator"}
    assert refused(again.admin.Status, STATUS) == "unknown-operator"
    lost = fleet.caller(*authority.issue_operator("dora")[::-1])
    command(fleet, "issue", "dora")
    assert refused(lost.admin.Status, STATUS) == "unknown-operator"


def test_a_certificate_that_ends_on_an_open_connection(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, device = fleet.operator(), fleet.device()
    operator.admin.Status(STATUS, timeout=20)
    device.offer()
    later = SimpleNamespace(time=lambda: time.time() + 366 * 86_400, perf_counter=time.perf_counter)
    monkeypatch.setattr("cloud.rpc.time", later)
    assert refused(operator.admin.Status, STATUS) == "certificate-expired"
    assert refused(device.adaptation.OfferSamples, adaptation_pb2.OfferSamplesRequest()) == "certificate-expired"


def test_status_warns_before_a_certificate_ends(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fleet.operator().admin.Status(STATUS, timeout=20).warnings
    command(fleet, "issue", "anna", "--days", "10")
    words = list(fleet.operator().admin.Status(STATUS, timeout=20).warnings)
    assert len(words) == 1 and "operator anna expires on" in words[0] and "in 10 days" in words[0]
    command(fleet, "renew", "anna")
    monkeypatch.setattr("cloud.server.SOON_DAYS", 4000.0)
    fleet.cloud._retention._fault = "The disk is full."
    words = list(fleet.operator().admin.Status(STATUS, timeout=20).warnings)
    assert len(words) == 2 and "renew-server" in words[0] and words[1].endswith("UTC: The disk is full.")


def test_only_the_longest_of_an_operators_certificates_counts() -> None:
    def record(name: str, serial: str, days: float, revoked: int = 0) -> OperatorRecord:
        return OperatorRecord(serial, name, "operator", 0, int(1000 * DAY + days * DAY), revoked)

    records = [record("a", "1", -5), record("a", "2", 100), record("b", "3", 29), record("c", "4", -1), record("d", "5", 1, 7)]
    found = expiry_warnings(records, 1000 * DAY)
    assert len(found) == 2 and "operator b expires on 1972-10-26, in 29 days" in found[0] and "c expired on" in found[1]


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    yield provision(tmp_path / "fleet", LOCAL, 0, 0, "127.0.0.1")


def test_bad_names_and_files_in_the_way(config: Path, tmp_path: Path) -> None:
    told = ("--config", str(config))
    for name in ("", "a b", "../ca", "x" * 65):
        assert failure("operator", "issue", name, *told)[0] == 2
    for days in ("0", "-1", "nan", "1e9"):
        assert failure("operator", "issue", "anna", "--days", days, *told)[0] == 2
    assert "operator already" in failure("operator", "issue", "operator", *told)[1]
    assert not (config.parent / "operators" / "operator.key").exists()
    (tmp_path / "anna.pem").write_text("mine")
    assert "never overwritten" in failure("operator", "issue", "anna", "--out", str(tmp_path), *told)[1]
    assert (tmp_path / "anna.pem").read_text() == "mine" and not (tmp_path / "anna.key").exists()
    assert "is no operator" in failure("operator", "renew", "anna", *told)[1]
    refold("cloud", "operator", "issue", "anna", *told)
    refold("cloud", "operator", "issue", "bert", *told)
    refold("cloud", "operator", "revoke", "anna", *told)
    assert "was revoked" in failure("operator", "renew", "anna", *told)[1]
    listed = refold("cloud", "operator", "list", *told).stdout
    assert "anna" in listed and "revoked" in listed and "valid" in listed


def test_files_that_are_no_pair_or_too_old_are_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = ("--config", str(config))
    refold("cloud", "operator", "issue", "anna", *told)
    anna = config.parent / "operators" / "anna.pem"

    def killed(path: Path, chunks: object, **_: object) -> None:
        if path.suffix == ".pem":
            raise KeyboardInterrupt
        real(path, chunks, **_)  # type: ignore[arg-type]

    from cloud.fleet import operators

    real = operators.write_atomically
    with monkeypatch.context() as patch:
        patch.setattr(operators, "write_atomically", killed)
        refold("cloud", "operator", "renew", "anna", *told)
    status, message = failure("status", "--operator", str(anna), *told)
    assert status == 2 and "is not the key of" in message and "operator renew" in message
    refold("cloud", "operator", "renew", "anna", "--days", "0.00001", *told)  # mends that; lasts less than a second
    time.sleep(1.0)
    status, message = failure("status", "--operator", str(anna), *told)
    assert status == 9 and "expired on" in message and "operator renew" in message
    refold("cloud", "operator", "renew", "anna", *told)  # nobody is locked out for good
    status, message = failure("status", *told, REFOLD_OPERATOR=str(anna), REFOLD_CLOUD_SERVER__PORT="1")  # where nobody listens
    assert status == 8 and "No service answers" in message


def test_a_poll_that_is_held_when_its_device_is_revoked(fleet: Fleet, small: Bundle) -> None:
    from test_service import outcome, publisher

    device = fleet.device()
    errors = []

    def poll() -> None:
        try:
            device.poll(small, wait_ms=15_000)
        except grpc.RpcError as e:
            errors.append(e.code())

    thread = threading.Thread(target=poll)
    thread.start()
    time.sleep(0.5)
    fleet.store.revoke(device.id)  # type: ignore[attr-defined]
    publisher(fleet).publish(outcome(small, 1))
    fleet.cloud._board.notify(small.digest, COHORT)
    thread.join()
    assert errors == [grpc.StatusCode.PERMISSION_DENIED]


def test_the_table_for_people() -> None:
    show_operators([])
    show_operators([("anna", "operator", "1f", "2027-11-29", "valid")])
