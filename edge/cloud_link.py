"""The device's half of the conversation with the cloud, put together: identity, updater, byte budget, uplink.

Without a [cloud] section nothing of it exists. With one but before enrolment the device works alone and says so; an
identity that arrives later is taken up without a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edge.adaptation import Adaptation
from edge.budget import ByteBudget
from edge.directory import DataDirectory
from edge.enrol import Identity
from edge.link_settings import LinkSettings
from edge.outbox import Outbox
from edge.runtime.status_socket import ask as ask_daemon
from edge.settings import EdgeSettings
from edge.updater import Updater
from edge.updates.engines import Nothing
from edge.updates.request import RollbackRequests, ask
from edge.uplink import Callbacks, Uplink
from refold.bundle import Bundle
from refold.errors import StorageError, UsageError
from refold.v1 import fleet_pb2

__all__ = ["CloudLink"]

log = logging.getLogger(__name__)


class CloudLink:
    """Owns updater and uplink.

    Args:
        heartbeat: makes a heartbeat's state, domain, metrics and last error.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        bundle: Bundle,
        directory: DataDirectory,
        outbox: Outbox,
        adaptation: Adaptation,
        heartbeat: Callable[[], fleet_pb2.HeartbeatRequest],
    ) -> None:
        self.updater: Updater | None = None
        self.uplink: Uplink | None = None
        self._settings: LinkSettings | None = settings.cloud
        self._identity_folder = settings.identity_folder
        self._bundle = bundle
        self._directory = directory
        self._outbox = outbox
        self._adaptation = adaptation
        self._heartbeat = heartbeat
        self._budget = ByteBudget(settings.outbox.budget, outbox)
        self._enrolled = False
        self.requests = RollbackRequests(directory.rollback_request, lambda: self.updater, lambda: self._enrolled)
        self._why_alone = ""
        self._running = False

    def restore(self) -> None:
        """Serves the release that served before the restart.

        While the update state can be neither read nor written the device serves as exported; `look_around` tries again.
        """
        try:
            self._connect()
        except StorageError as e:
            log.warning("Working alone, as exported: %s", e.message)
            self._why_alone = e.message

    def start(self) -> None:
        self._running = True
        if self.uplink is not None:
            self.uplink.start()

    def _connect(self) -> None:
        if self._settings is None or self.uplink is not None:
            return
        try:
            identity = Identity.load(self._identity_folder)
        except UsageError as e:
            if e.message != self._why_alone:
                log.warning("Working alone: %s", e.message)
            self._why_alone = e.message
            return
        self._enrolled = True
        updater = Updater(
            self._directory.updates,
            self._bundle,
            identity.ring,
            self._adaptation,
            cohort=identity.cohort,
            fleet=identity.ca_pem,
            canary=self._adaptation.canary,
        )
        try:
            updater.start()
        except BaseException:
            updater.close()
            raise
        self._why_alone = ""
        self.updater = updater
        self.uplink = Uplink(
            self._settings,
            identity,
            self._outbox,
            self._budget,
            Callbacks(lambda: self._updater.version, self._updater.follow, self._heartbeat),
            bundle_digest=self._bundle.digest,
            directory=self._identity_folder,
        )
        if self._running:
            self.uplink.start()

    @property
    def _updater(self) -> Updater:
        assert self.updater is not None
        return self.updater

    def available_bytes(self) -> int | None:
        """Bytes the present hour still carries; None is unlimited. Raises StorageError."""
        return self._budget.available()

    def look_around(self) -> None:
        """Takes up an identity that somebody put into the data directory. Called now and then."""
        if self._settings is not None and self.uplink is None:
            self._connect()

    @property
    def last_error(self) -> str:
        return self._why_alone or (self.uplink.last_error if self.uplink else "")

    @property
    def state(self) -> str:
        """off, not enrolled, connected or away."""
        if self._settings is None:
            return "off"
        if self.uplink is None:
            return "not enrolled"
        return "connected" if self.uplink.metrics()["connected"] else "away"

    def metrics(self) -> dict[str, float]:
        if self.uplink is None:
            return {}
        return {f"link_{name}": value for name, value in self.uplink.metrics().items()}

    def stop(self) -> None:
        """Ends the conversation; what was not acknowledged is still in the outbox."""
        if self.uplink is not None:
            self.uplink.close()

    def close(self) -> None:
        self.stop()
        if self.updater is not None:
            self.updater.close()


def roll_back(settings: EdgeSettings) -> str:
    """`refold edge rollback`: refuses the current release for ever and returns to the one before; says what was done.

    Raises:
        UsageError: the device is not enrolled or runs as exported.
        StorageError: the data directory cannot be written.
    """
    directory = DataDirectory(settings.data)
    reason = "rolled back by hand on the device"
    if directory.locked_by_another:
        told = ask_daemon(Path(settings.data))
        if told is not None and not told.get("release_version"):
            raise UsageError("The device runs the exported state: there is no release to go back from.")
        ask(directory.rollback_request, reason)
        return "Asked the running daemon to go back to the release before; `refold edge status` shows when it has."
    if not settings.bundle:
        raise UsageError("Which bundle? Give --bundle FILE.refold or --config.")
    identity = Identity.load(settings.identity_folder)
    directory.lock()
    try:
        updater = Updater(
            directory.updates,
            Bundle.open(settings.bundle),
            identity.ring,
            Nothing(),
            cohort=identity.cohort,
            fleet=identity.ca_pem,
        )
        try:
            before = updater.look()
            if before is None:
                raise UsageError("The device runs the exported state: there is no release to go back from.")
            after = updater.revert(reason)
        finally:
            updater.close()
    finally:
        directory.unlock()
    runs = f"release {after.version}" if after else "the exported state"
    return f"Release {before.version} is refused from now on; {runs} runs."
