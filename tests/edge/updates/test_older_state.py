"""What the version before left on the disk: one release and the one before it in the state file, whole unsigned releases in the
bank. Everything signed is taken over; nothing unsigned is served.
"""

from __future__ import annotations

import io
import json
import sqlite3

import numpy as np
import pytest
from machine_world import KEY, World, _domains, make_bundle, name_of
from tiny_bundle import release

from edge.updates.memory import SCHEMA
from refold import SigningKey
from refold.errors import StorageError
from refold.release import digest, encode, seal
from refold.signing import KeyRing
from refold.v1.adaptation_pb2 import PollReleaseResponse


def older(
    world: World, *, current: int, previous: int, domains: dict[int, str], banked: dict[str, int], refused: int = 0
) -> None:
    """Rewrites the directory of `world`, which is not running, as the version before would have left it."""
    (state,) = world.folder.glob("state/*")
    for path in [*state.glob("updates.sqlite*"), *state.glob("releases/*")]:
        path.unlink()
    kept = {v: name_of(world.bundle, v, domains[v]) for v in domains}
    for v in filter(None, (current, previous)):
        (state / "releases" / f"{kept[v]}.release").write_bytes(world.signed(v, domains[v]).SerializeToString())
    db = sqlite3.connect(state / "updates.sqlite")
    db.executescript(f"BEGIN; {SCHEMA}; PRAGMA user_version=1; COMMIT;")
    row = (kept.get(current, ""), kept.get(previous, ""), max(domains))
    db.execute("UPDATE device SET current = ?, previous = ?, highest = ?", row)
    for v, name in kept.items():
        why = "a test" if v == refused else ""
        db.execute("INSERT INTO releases (digest, version, refused) VALUES (?, ?, ?)", (name, v, why))
    db.commit()
    db.close()
    adapter = world.adaptation.adapter
    arrays, rows = {}, []
    for d in adapter._bank:
        rows.append([d.name, d.frames, d.evidence.frames, d.seen])
        arrays[f"{d.name}.mean"], arrays[f"{d.name}.moments"] = d.mean, d.evidence.moments.astype(np.float32)
        if d.name in banked:
            payload = encode(release(world.bundle, banked[d.name], domain=d.name))
            arrays[f"{d.name}.release"] = np.frombuffer(payload, np.uint8)
    head = {"format": 1, "fingerprint": adapter._fingerprint(), "made": 3, "shifts": 9, "domains": rows}
    out = io.BytesIO()
    np.savez(out, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)
    (world.folder / "bank").write_bytes(out.getvalue())


@pytest.fixture
def world(tmp_path):
    (tmp_path / "device").mkdir()
    device = World(tmp_path / "device", make_bundle(tmp_path)).boot()
    _domains(device)
    device.close()
    yield device
    device.updater.close()


def test_both_signed_releases_are_taken_over_and_the_unsigned_one_is_left(world):
    older(world, current=3, previous=2, domains={1: "d2", 2: "d1", 3: ""}, banked={"d1": 2, "d2": 1})
    world.boot()
    world.agree()
    assert world.versions == [2, 3] and world.served == (3, name_of(world.bundle, 3, ""))
    served = world.by_domain()
    assert served["d1"] == name_of(world.bundle, 2, "d1") and served["d2"] == name_of(world.bundle, 3, "")
    bank = world.adaptation.adapter._bank
    assert bank.get("d1").evidence.frames == 0 and bank.get("d2").evidence.frames == 0  # measured in another way
    world.show("noisy")
    assert world.served == (2, name_of(world.bundle, 2, "d1"))
    world.show("dim")
    assert world.served[0] == 3
    world.close()
    assert world.boot().versions == [2, 3]
    world.agree()


def test_a_release_that_was_withdrawn_is_not_brought_back_by_the_old_bank(world):
    """The cohort went from 2 back to 1; the version before kept 2 as the one before, and whole in its bank."""
    older(world, current=1, previous=2, domains={1: "", 2: "d1"}, banked={"d1": 2})
    world.boot()
    world.show("noisy")
    assert world.versions == [1] and world.served[0] == 1
    world.updater.revert("a test")
    assert world.versions == [] and world.served == (0, "")
    world.agree()


def test_a_release_that_was_refused_is_not_brought_back_either(world):
    older(world, current=1, previous=0, domains={1: "d1", 2: "d1"}, banked={"d1": 2}, refused=2)
    world.boot()
    world.show("noisy")
    assert world.served == (1, name_of(world.bundle, 1, "d1"))
    older_exported = world.folder
    world.close()
    older(world, current=0, previous=1, domains={1: "d1", 2: "d1"}, banked={"d1": 2}, refused=2)
    world.boot()
    world.show("noisy")
    assert world.versions == [] and world.served == (0, "") and older_exported == world.folder


def test_an_offline_rollback_of_an_older_state_is_bound_at_the_next_start(world):
    """`refold edge rollback` beside a daemon that stands still knows no domains; the daemon does."""
    from tiny_bundle import COHORT

    from edge.updater import Updater
    from edge.updates.engines import Nothing

    older(world, current=3, previous=2, domains={2: "d1", 3: "d1"}, banked={"d1": 3})
    updater = Updater(world.folder / "state", world.bundle, world.ring, Nothing(), cohort=COHORT)
    assert updater.look().version == 3 and updater.revert("by hand").version == 2
    updater.close()
    world.boot()
    world.show("noisy")
    assert world.versions == [2] and world.served == (2, name_of(world.bundle, 2, "d1"))
    world.agree()


def test_an_older_state_on_a_full_disk_serves_and_is_taken_over_later(world):
    older(world, current=3, previous=2, domains={2: "d1", 3: ""}, banked={})

    def full(_change):
        raise StorageError("The disk is full.")

    world.boot(prepare=lambda w: w.updater._do.update(counted=full, committed=full))
    assert world.versions == [2, 3] and world.served[0] == 3
    world.agree(stored=False)
    world.updater._do = world.updater._steps()
    assert world.order(4).error is None and world.versions == [2, 3, 4]
    world.agree()


def test_a_withdrawn_key_takes_its_releases_out_of_every_domain_and_leaves_the_others(world):
    """The key that signed d1's release is no longer trusted; the one that signed the release for all is."""
    new = SigningKey.generate()
    world.ring = KeyRing([KEY.public, new.public])
    world.updater.close()
    world.boot()
    assert world.order(1, "d1").error is None
    signed = seal(release(world.bundle, 2), new)
    assert world.updater.follow(PollReleaseResponse(release=signed)).error is None
    world.show("noisy")
    assert world.served[0] == 1
    world.close()
    world.ring = KeyRing([new.public])
    world.boot()
    world.show("noisy")
    assert world.versions == [2] and world.served == (2, digest(signed.payload))
    world.agree()
