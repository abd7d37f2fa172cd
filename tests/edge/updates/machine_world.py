"""A device small enough to die a thousand times: the real updater, adaptation, adapter, bank and files; engines that only say
what they were built from. States to begin in, things that can happen, ways to fail: the rows of the generated tests.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from small_nets import images
from tiny_bundle import COHORT, bundle, release

from edge.adapt import Adapter, AdaptSettings, Reference
from edge.adapt.proposal import compose
from edge.adaptation import Adaptation
from edge.engine import EngineSlot
from edge.releases import SUFFIX
from edge.serving import ServingState
from edge.updater import Outcome, Updater
from edge.updates.request import RollbackRequests, ask
from edge.updates.table import Event
from edge.worker import Inline
from refold import Bundle, SigningKey
from refold.atomic import write_atomically
from refold.errors import GateError, RefoldError, StorageError
from refold.release import digest, seal
from refold.signing import KeyRing
from refold.statistics import StatisticsModel
from refold.v1.adaptation_pb2 import PollReleaseResponse

KEY = SigningKey.generate()
SIDE, NEW, UNKNOWN = 8, 10, "d9"
SETTINGS = AdaptSettings(probe_frames=6, burst=32, watch_every=1, first_images=8, images=12)


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing catches it."""


@functools.cache
def frames(kind: str) -> np.ndarray:
    """uint8 (24, 8, 8, 3) of one of the device's surroundings."""
    clean = images(24, SIDE, seed=11)
    if kind == "noisy":
        return np.clip(clean + np.random.default_rng(5).normal(0, 60, clean.shape), 0, 255).astype(np.uint8)
    return (clean * 0.2).astype(np.uint8) if kind == "dim" else clean


@functools.cache
def reference() -> Reference:
    return Reference.measure(images(256, SIDE))


class Engine:
    pictures = None

    def __init__(self, serving: ServingState) -> None:
        self.serving = serving

    def run(self, x: np.ndarray) -> np.ndarray:
        """Logits, float32 (N, 3)."""
        return np.zeros((len(x), 3), np.float32)


class Taps(Engine):
    def run(self, x: np.ndarray) -> np.ndarray:
        """Moments, float32 (N, 2, channels)."""
        out = np.ones((len(x), 2, 300), np.float32)
        out[:, 0] = 0.1
        return out


class Factory:
    """Builds at once. `fails(serving)` may raise in its place; `canary_fails` likewise."""

    has_taps = True

    def __init__(self, model: Bundle) -> None:
        self.bundle = model
        self.fails: Callable[[ServingState], None] = lambda serving: None
        self.canary_fails: Callable[[ServingState], None] = lambda serving: None

    def build(self, serving: ServingState) -> Engine:
        self.fails(serving)
        return Engine(serving)

    def build_taps(self, serving: ServingState) -> Taps:
        return Taps(serving)

    def canary(self, engine: Engine) -> None:
        self.canary_fails(engine.serving)


class World:
    """A device's directory, and the process that runs on it after `boot`."""

    def __init__(self, folder: Path, model: Bundle, ring: KeyRing | None = None) -> None:
        self.folder, self.bundle = folder, model
        self.ring = ring or KeyRing([KEY.public])
        self.step: Callable[[str], None] = lambda step: None
        self.local_step: Callable[[str], None] = lambda step: None

    def boot(self, *, start: bool = True, prepare: Callable[[World], None] = lambda world: None) -> World:
        self.factory = Factory(self.bundle)
        self.slot = EngineSlot(Engine(ServingState()))
        make = functools.partial(Adapter, StatisticsModel.of(self.bundle), SETTINGS, 3, reference=reference())
        try:
            content = (self.folder / "bank").read_bytes()
            adapter = Adapter.load(content, StatisticsModel.of(self.bundle), SETTINGS, 3, reference=reference())
        except FileNotFoundError:
            adapter = make()
        self.adaptation = Adaptation(self.factory, self.slot, adapter, Inline(), at=self._on_local_step)
        self.updater = Updater(
            self.folder / "state", self.bundle, self.ring, self.adaptation, cohort=COHORT, canary=self.adaptation.canary,
            now_ms=lambda: 1_000_000, at=self._on_step,
        )  # fmt: skip
        self.requests = RollbackRequests(self.folder / "rollback.request", lambda: self.updater, lambda: False)
        prepare(self)
        if start:
            self.updater.start()
        return self

    def _on_step(self, step: str) -> None:
        self.step(step)

    def _on_local_step(self, step: str) -> None:
        self.local_step(step)

    def close(self, *, save: bool = True) -> None:
        if save:
            self.save_bank()
        self.updater.close()

    def save_bank(self) -> None:
        write_atomically(self.folder / "bank", [self.adaptation.dump()])

    # What happens -----------------------------------------------------------------------------------------------------------

    def show(self, kind: str, count: int = 12) -> None:
        for i, image in enumerate(frames(kind)[:count]):
            self.adaptation.watch(i, image, 0.5, 0)

    def signed(self, version: int, domain: str = ""):
        return sealed(self.bundle, version, domain)

    def order(self, version: int, domain: str = "") -> Outcome:
        return self.updater.follow(PollReleaseResponse(release=self.signed(version, domain)))

    def offer(self, version: int, domain: str = "") -> None:
        self.updater.offer(self.signed(version, domain))

    def exported(self) -> Outcome:
        return self.updater.follow(PollReleaseResponse(use_exported=True))

    def ask(self) -> None:
        if not (self.folder / "rollback.request").exists():
            ask(self.folder / "rollback.request", "a test asks")
        self.requests.look()

    def withdraw_key(self) -> None:
        self.ring = KeyRing([SigningKey.generate().public])
        self.updater._shelf.home = replace(self.updater._shelf.home, ring=self.ring)
        self.updater.start()

    def damage(self, version: int, domain: str) -> None:
        (path,) = self.folder.glob(f"state/*/releases/{name_of(self.bundle, version, domain)}{SUFFIX}")
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        self.updater.start()

    # What is so -------------------------------------------------------------------------------------------------------------

    @property
    def versions(self) -> list[int]:
        return [e.version for e in self.updater.inforce.entries]

    @property
    def served(self) -> tuple[int, str]:
        serving = self.slot.current.serving
        return serving.release_version, serving.release_digest

    def base(self) -> tuple[int, str]:
        entry = self.updater.inforce.base(self.adaptation.adapter._present.key)
        return (entry.version, entry.digest) if entry else (0, "")

    def by_domain(self) -> dict[str, str]:
        """Digest that each domain in the bank would be served with on its recall."""
        adapter = self.adaptation.adapter
        states = {
            d.name: compose(adapter.releases, d, d.evidence, adapter.model, adapter.settings).serving for d in adapter._bank
        }
        assert all(d.base == states[d.name].release_digest for d in adapter._bank), "statistics of another release"
        return {name: state.release_digest for name, state in states.items()}

    def files(self) -> set[str]:
        return {p.name.removesuffix(SUFFIX) for p in self.folder.glob("state/*/releases/*" + SUFFIX)}

    def agree(self, *, standing: bool = True, stored: bool = True) -> None:
        """Served = reported = stored.

        Args:
            standing: no state of the device's own failed to be served.
            stored: the disk could be written: else the next start comes to the same from what is there.
        """
        inforce, updater = self.updater.inforce, self.updater
        assert self.adaptation.releases.newest == inforce.newest
        assert updater.version == inforce.version == (self.adaptation.release.version if self.adaptation.release else 0)
        if stored:
            assert updater._memory.row("current")[0] == (inforce.current.digest if inforce.current else "")
            assert (updater._memory.entries() or ()) == inforce.entries
        assert inforce.digests <= self.files()
        assert inforce.allows(self.served[1])
        assert not (set(updater.memory().refused) & ({self.served[1]} | set(self.by_domain().values()) | inforce.digests))
        if standing:
            assert self.served == self.base()
        assert not self.adaptation._changing.locked()


@functools.cache
def _sealed(path: str, version: int, domain: str):
    return seal(release(Bundle.open(path), version, domain=domain), KEY)


def sealed(model: Bundle, version: int, domain: str):
    return _sealed(str(model.path), version, domain)


def name_of(model: Bundle, version: int, domain: str) -> str:
    return digest(sealed(model, version, domain).payload)


def make_bundle(folder: Path) -> Bundle:
    return bundle(folder / "m.refold")


# ── states to begin in: how each came about, {version: domain} of all releases ever, the versions in force, where it stands ──


def _ordered(*orders: tuple[int, str]) -> Callable[[World], None]:
    def build(world: World) -> None:
        for version, domain in orders:
            assert world.order(version, domain).error is None

    return build


def _domains(world: World) -> None:
    world.show("noisy")
    assert world.adaptation.domain == "d1"
    world.show("dim")
    assert world.adaptation.domain == "d2"
    world.show("clean")
    assert world.adaptation.domain == "d0"


def _both(*steps: Callable[[World], None]) -> Callable[[World], None]:
    def build(world: World) -> None:
        for step in steps:
            step(world)

    return build


def _stuck(world: World) -> None:
    """The device has come home, but the engine for that could not be built: the domain before is still served."""
    world.show("noisy")

    def refuse(serving: ServingState) -> None:
        raise GateError("a test refuses it")

    world.factory.fails = refuse
    world.show("clean")
    world.factory.fails = lambda serving: None
    assert world.adaptation.domain == "d0" and world.slot.current.serving.domain == "d1"


class State:
    def __init__(
        self, build: Callable[[World], None], ever: dict[int, str], now: list[int], stand: Callable[[World], None] | None = None
    ) -> None:
        self.build, self.ever, self.now = build, ever, now
        self.stand = stand or (lambda world: None)
        self.standing = stand is not _stuck
        self.away = stand is not None and self.standing


STATES: dict[str, State] = {
    "exported": State(_domains, {}, []),
    "one for all": State(_both(_domains, _ordered((1, ""))), {1: ""}, [1]),
    "two for all": State(_ordered((1, ""), (2, "")), {1: "", 2: ""}, [1, 2]),
    "two domains, at home": State(_both(_domains, _ordered((1, "d1"), (2, "d2"))), {1: "d1", 2: "d2"}, [1, 2]),
    "two domains, in one": State(
        _both(_domains, _ordered((1, "d1"), (2, "d2"))), {1: "d1", 2: "d2"}, [1, 2], lambda w: w.show("noisy")
    ),
    "its own over all's": State(
        _both(_domains, _ordered((1, ""), (2, "d1"))), {1: "", 2: "d1"}, [1, 2], lambda w: w.show("noisy")
    ),
    "superseded": State(
        _both(_domains, _ordered((1, "d1"), (2, "d2"), (3, "d1"))), {1: "d1", 2: "d2", 3: "d1"}, [1, 2, 3],
        lambda w: w.show("noisy"),
    ),
    "rolled back": State(
        _both(_domains, _ordered((1, ""), (2, "d1"), (1, ""))), {1: "", 2: "d1"}, [1], lambda w: w.show("noisy")
    ),
    "reverted": State(
        _both(_domains, _ordered((1, "d1"), (2, "d1")), lambda w: w.updater.revert("bad") and None),
        {1: "d1", 2: "d1"}, [1], lambda w: w.show("noisy"),
    ),
    "exported again": State(
        _both(_domains, _ordered((1, ""), (2, "d1")), lambda w: w.exported() and None), {1: "", 2: "d1"}, [],
        lambda w: w.show("noisy"),
    ),
    "stuck": State(_both(_domains, _ordered((1, "d1"))), {1: "d1"}, [1], _stuck),
}  # fmt: skip


# ── things that happen: the event, what is done, the versions in force afterwards, the states it can happen in ────────────────


def after_order(state: State, version: int, domain: str) -> list[int]:
    """What an order makes of a state, said a second time and differently: at most two of each domain, nothing newer."""
    kept = [v for v in state.now if v < version]
    names = {**state.ever, version: domain}
    line = [*kept, version]
    return [v for i, v in enumerate(line) if sum(names[u] == names[v] for u in line[i:]) <= 2]


class Happening:
    def __init__(
        self,
        event: Event,
        do: Callable[[World, State], object],
        then: Callable[[State], list[int]],
        fits: Callable[[State], bool] = lambda state: True,
        *,
        always: bool = False,
        candidate: int = NEW,
    ) -> None:
        """`then`: versions in force afterwards; with `always` also where the process died in between, since a restart finds the
        same cause. `candidate`: the version that an installation may blame; 0 where it never comes to that.
        """
        self.event, self.do, self.then, self.fits, self.always, self.candidate = event, do, then, fits, always, candidate


def _refused(state: State) -> set[int]:
    return {2} if state is STATES["reverted"] else set()


HAPPENINGS: dict[str, Happening] = {
    **{
        f"a newer release for {domain or 'all'}": Happening(
            Event.INSTALL, lambda w, s, d=domain: w.order(NEW, d), lambda s, d=domain: after_order(s, NEW, d)
        )
        for domain in ("", "d0", "d1", "d2", UNKNOWN)
    },
    "an older release is ordered": Happening(
        Event.INSTALL, lambda w, s: w.order(1, s.ever[1]), lambda s: after_order(s, 1, s.ever[1]),
        lambda s: bool(s.now) and s.now[-1] > 1, candidate=1,
    ),
    "what was left is ordered again": Happening(
        Event.INSTALL, lambda w, s: w.order(2, s.ever[2]), lambda s: after_order(s, 2, s.ever[2]),
        lambda s: 2 in s.ever and 2 not in s.now and 2 not in _refused(s), candidate=2,
    ),
    "a newer release is offered": Happening(
        Event.INSTALL, lambda w, s: w.offer(NEW, "d1"), lambda s: after_order(s, NEW, "d1")
    ),
    "what was refused is ordered": Happening(
        Event.INSTALL, lambda w, s: w.order(2, s.ever[2]), lambda s: s.now, lambda s: bool(_refused(s)), candidate=0
    ),
    "an old release is replayed": Happening(
        Event.INSTALL, lambda w, s: w.offer(1, s.ever[1]), lambda s: s.now, lambda s: 1 in s.ever and s.now[-1:] != [1],
        candidate=0,
    ),
    "the exported state is ordered": Happening(Event.EXPORTED, lambda w, s: w.exported(), lambda s: [], lambda s: bool(s.now)),
    "the device reverts": Happening(
        Event.REVERT, lambda w, s: w.updater.revert("a test"), lambda s: s.now[:-1], lambda s: bool(s.now)
    ),
    "somebody asks for a rollback": Happening(Event.REVERT, lambda w, s: w.ask(), lambda s: s.now[:-1], lambda s: bool(s.now)),
    "a restart": Happening(Event.START, lambda w, s: w.updater.start(), lambda s: s.now),
    "a restart after the key was withdrawn": Happening(
        Event.START, lambda w, s: w.withdraw_key(), lambda s: [], lambda s: bool(s.now), always=True
    ),
    "a restart after its file was damaged": Happening(
        Event.START, lambda w, s: w.damage(s.now[-1], s.ever[s.now[-1]]), lambda s: s.now[:-1], lambda s: bool(s.now),
        always=True,
    ),
    "another domain comes back": Happening(Event.RECALL, lambda w, s: w.show("dim"), lambda s: s.now),
    "home comes back": Happening(
        Event.RECALL, lambda w, s: w.show("clean"), lambda s: s.now, lambda s: s.away
    ),
    "statistics grow": Happening(Event.OVERLAY, lambda w, s: w.show("noisy", 24), lambda s: s.now),
}  # fmt: skip

FAULTS: dict[str, Callable[[], BaseException]] = {
    "a fault": lambda: RuntimeError("a fault of ours"),
    "a canary's refusal": lambda: GateError("The canary's answers changed."),
    "a full disk": lambda: StorageError("The disk is full."),
    "no memory": MemoryError,
    "a kill": Killed,
}
PASSING = {"a full disk", "no memory"}


def copy(snapshot: Path, to: Path, model: Bundle) -> World:
    shutil.copytree(snapshot, to)
    return World(to, model)


def quietly(do: Callable[[], object]) -> BaseException | None:
    """What it raised."""
    try:
        do()
    except (RefoldError, RuntimeError, MemoryError, Killed) as e:
        return e
    return None
