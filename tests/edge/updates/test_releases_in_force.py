"""The set of releases in force, as a value: against a second, simpler telling of the same rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge.updates.inforce import LATER, MOST, PER_SLOT, Entry, InForce
from refold.release import Release

VERSIONS = st.integers(1, 12)
DOMAINS = st.sampled_from(["", "d0", "d1", "d2"])
ORDERS = st.lists(st.tuples(VERSIONS, DOMAINS, st.booleans()), max_size=30)


def content(version: int, domain: str) -> Release:
    return Release("b" * 64, "roof", version, {}, domain=domain)


def entry(version: int, domain: str, known: bool = True) -> Entry:
    return Entry(version, domain, f"{version:064x}{domain}", f"{domain}-key" if known and domain else "")


def after(orders) -> InForce:
    inforce = InForce()
    for version, domain, known in orders:
        inforce = inforce.ordered(entry(version, domain, known), content(version, domain))
    return inforce


@given(ORDERS)
def test_versions_rise_the_last_order_is_current_and_everything_is_at_hand(orders):
    inforce = after(orders)
    versions = [e.version for e in inforce.entries]
    assert versions == sorted(set(versions)) and len(versions) <= MOST
    assert inforce.version == (orders[-1][0] if orders else 0)
    assert not inforce.missing and set(inforce.releases) == inforce.digests
    for slot in {e.slot for e in inforce.entries}:
        assert sum(e.slot == slot for e in inforce.entries) <= PER_SLOT


@given(ORDERS, VERSIONS, DOMAINS)
def test_an_older_order_takes_everything_newer_out(orders, version, domain):
    inforce = after(orders).ordered(entry(version, domain), content(version, domain))
    assert inforce.version == version
    for known in ("d0", "d1", "d2", ""):
        base = inforce.base(f"{known}-key")
        assert base is None or base.version <= version


@given(ORDERS, st.sets(VERSIONS), DOMAINS)
def test_what_was_taken_out_serves_nowhere(orders, gone, domain):
    inforce = after(orders)
    digests = {e.digest for e in inforce.entries if e.version in gone}
    less = inforce.without(digests)
    assert not digests & less.digests
    base = less.base(f"{domain}-key")
    assert base is None or (base.digest not in digests and less.allows(base.digest))
    assert not any(less.allows(d) for d in digests)


@given(ORDERS)
def test_a_domain_is_served_by_the_newest_of_its_own_else_by_the_newest_for_all(orders):
    inforce = after(orders)
    for domain in ("d0", "d1", "d2"):
        own = [e for e in inforce.entries if e.key == f"{domain}-key"]
        shared = [e for e in inforce.entries if not e.domain]
        assert inforce.base(f"{domain}-key") == (own[-1] if own else shared[-1] if shared else None)


def test_a_release_for_a_domain_nobody_met_serves_nothing_and_is_current():
    inforce = InForce().ordered(entry(1, "d1", known=False), content(1, "d1"))
    assert inforce.version == 1 and inforce.base("d1-key") is None and not inforce.allows(inforce.entries[0].digest)


def test_what_is_bound_later_is_bound_once():
    late = InForce((Entry(1, "d1", "1", LATER + "d1"), Entry(2, "d2", "2", LATER + "d2"), Entry(3, "", "3")))
    bound = late.bound({"d1": "one", "d2": ""}.__getitem__)
    assert [e.key for e in bound.entries] == ["one", "", ""] and bound.bound(lambda domain: "other") == bound
