"""The tables. A change here needs a migration beside it (`migrations/versions`); a test compares the two."""

from __future__ import annotations

import sqlalchemy as sa

__all__ = ["METADATA", "bundles", "cohorts", "devices", "joins", "operators", "releases", "samples", "statistics", "tokens"]

METADATA = sa.MetaData()
DIGEST = sa.String(64)
NAME = sa.String(128)
# SQLite numbers rows by itself only in a column that is exactly INTEGER.
ROW = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

bundles = sa.Table(
    "bundles",
    METADATA,
    sa.Column("digest", DIGEST, primary_key=True),
    sa.Column("name", sa.String(256), nullable=False),
    sa.Column("object", DIGEST, nullable=False),
    sa.Column("preprocess_digest", DIGEST, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("teachers", sa.JSON, nullable=False),
    sa.Column("added_ms", sa.BigInteger, nullable=False),
)

tokens = sa.Table(
    "tokens",
    METADATA,
    sa.Column("hash", DIGEST, primary_key=True),
    sa.Column("cohort", NAME, nullable=False),
    sa.Column("uses_left", sa.Integer, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
)

# Which device used which token: a device whose answer was lost may ask again, nobody else may.
joins = sa.Table(
    "joins",
    METADATA,
    sa.Column("token", DIGEST, primary_key=True),
    sa.Column("device", NAME, primary_key=True),
)

devices = sa.Table(
    "devices",
    METADATA,
    sa.Column("id", NAME, primary_key=True),
    sa.Column("cohort", NAME, nullable=False),
    sa.Column("serial", sa.String(64), nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("enrolled_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_ms", sa.BigInteger, nullable=False),
    sa.Column("last_seen_ms", sa.BigInteger, nullable=False),
    sa.Column("bundle_digest", sa.String(64), nullable=False),
    sa.Column("release_version", sa.BigInteger, nullable=False),
    sa.Column("state", NAME, nullable=False),
    sa.Column("domain", NAME, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("last_error", sa.String(1024), nullable=False),
    sa.Column("key_digest", DIGEST, nullable=False, server_default=""),
    sa.Column("frames", sa.BigInteger, nullable=False, server_default="0"),
)

# Every certificate an operator was given, by serial number: what is not here, or is revoked, may not call Admin.
operators = sa.Table(
    "operators",
    METADATA,
    sa.Column("serial", sa.String(64), primary_key=True),
    sa.Column("name", NAME, nullable=False),
    sa.Column("role", sa.String(32), nullable=False),
    sa.Column("issued_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_ms", sa.BigInteger, nullable=False),
    sa.Index("operators_by_name", "name"),
)

samples = sa.Table(
    "samples",
    METADATA,
    sa.Column("id", ROW, primary_key=True, autoincrement=True),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("bundle_digest", DIGEST, nullable=False),
    sa.Column("cohort", NAME, nullable=False),
    sa.Column("device", NAME, nullable=False),
    sa.Column("domain", NAME, nullable=False),
    sa.Column("header", sa.LargeBinary, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("held_back", sa.Boolean, nullable=False),
    sa.Column("received_ms", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("bundle_digest", "cohort", "digest", name="one_sample"),
    sa.Index("samples_of", "bundle_digest", "cohort", "id"),
    sa.Index("samples_by_device", "device"),
    sa.Index("samples_by_digest", "digest"),
    sqlite_autoincrement=True,
)

statistics = sa.Table(
    "statistics",
    METADATA,
    sa.Column("id", ROW, primary_key=True, autoincrement=True),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("bundle_digest", DIGEST, nullable=False),
    sa.Column("cohort", NAME, nullable=False),
    sa.Column("device", NAME, nullable=False),
    sa.Column("domain", NAME, nullable=False),
    sa.Column("release_version", sa.BigInteger, nullable=False),
    sa.Column("frames", sa.BigInteger, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("received_ms", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("bundle_digest", "cohort", "digest", name="one_report"),
    sa.Index("statistics_of", "bundle_digest", "cohort", "id"),
    sqlite_autoincrement=True,
)

cohorts = sa.Table(
    "cohorts",
    METADATA,
    sa.Column("bundle_digest", DIGEST, primary_key=True),
    sa.Column("cohort", NAME, primary_key=True),
    sa.Column("current_version", sa.BigInteger, nullable=False),
    sa.Column("last_version", sa.BigInteger, nullable=False),
)

# `version` is null for refused candidates: they are listed, but were never anybody's version.
releases = sa.Table(
    "releases",
    METADATA,
    sa.Column("id", ROW, primary_key=True, autoincrement=True),
    sa.Column("bundle_digest", DIGEST, nullable=False),
    sa.Column("cohort", NAME, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=True),
    sa.Column("parent_version", sa.BigInteger, nullable=False),
    sa.Column("domain", NAME, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("signed", sa.LargeBinary, nullable=False),
    sa.Column("samples", sa.BigInteger, nullable=False),
    sa.Column("statistics_frames", sa.BigInteger, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("samples_upto", sa.BigInteger, nullable=False),
    sa.Column("statistics_upto", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("bundle_digest", "cohort", "version", name="one_version"),
    sa.Index("releases_of", "bundle_digest", "cohort", "id"),
    sqlite_autoincrement=True,
)
