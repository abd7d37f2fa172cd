"""What a database error means for whoever asked, and what to do about it: one decision for SQLite, PostgreSQL and SQLAlchemy.

    conflict        somebody else was faster, or a deadlock was broken     try again
    database-locked, database-busy, database, disk-full, ...               try again when the sentence was followed
    bad-value       the request holds what no database can store           wrong, and stays wrong (InputError)
    schema          tables or columns are missing                          not one of Refold's, or half restored
    damaged         the database itself says that its files are damaged    restore a backup

Only the last two are about what is stored. PostgreSQL is read by SQLSTATE (PostgreSQL manual, appendix A), SQLite by its result
code (https://sqlite.org/rescode.html) where Python tells it (3.11), else by its text.
"""

from __future__ import annotations

import re

import sqlalchemy as sa

from refold.errors import InputError, RefoldError, StorageError

__all__ = ["explain", "kind_of"]

SENTENCES = {
    "conflict": "Somebody else changed the same rows of the database at the same moment: nothing was stored; try again.",
    "database-locked": "The database cannot be used: another program holds the database: stop it, or try again.",
    "database-busy": "The database takes no more connections or work now: try again, or raise its limits.",
    "database": "The database cannot be used: it cannot be opened or reached: check storage.database and its directory.",
    "database-access": "The database refuses this user: check the name, the password and the rights in storage.database.",
    "no-database": "The database server has no database of this name: create it, or correct storage.database.",
    "database-read-only": "The database cannot be used: it is not writable by this user.",
    "disk-full": "The database cannot be used: the disk is full: free some space.",
    "disk-failing": "The database cannot be used: its disk fails or is away: check the disk; what was acknowledged stays.",
    "no-memory": "The database ran out of memory: free some, or give it more.",
    "database-failed": "The database failed at this request: its log has the reason; try again.",
    "schema": "The database lacks tables or columns of Refold's: it is another program's, or was restored in part.",
    "bad-value": "The request holds a value that cannot be stored: a number out of range, or a character no text may have.",
    "damaged": "The database is damaged or not one of Refold's: restore it from a backup.",
}

# By SQLSTATE; the longest beginning counts.
STATES = {
    "08": "database", "22": "bad-value", "23": "database-failed", "23503": "conflict", "23505": "conflict", "23P01": "conflict",
    "25006": "database-read-only", "28": "database-access", "3D": "no-database", "3F": "schema", "40": "conflict",
    "42": "schema", "42501": "database-access", "53": "database-busy", "53100": "disk-full", "53200": "no-memory",
    "54": "bad-value", "55006": "database-locked", "55P03": "database-locked", "57": "database", "57014": "database-busy",
    "58": "disk-failing", "XX001": "damaged", "XX002": "damaged",
}  # fmt: skip

SQLITE_CODES = {
    "SQLITE_BUSY": "database-locked", "SQLITE_LOCKED": "database-locked", "SQLITE_PROTOCOL": "database-locked",
    "SQLITE_FULL": "disk-full", "SQLITE_READONLY": "database-read-only", "SQLITE_PERM": "database-read-only",
    "SQLITE_CORRUPT": "damaged", "SQLITE_NOTADB": "damaged", "SQLITE_IOERR": "disk-failing", "SQLITE_CANTOPEN": "database",
    "SQLITE_NOMEM": "no-memory", "SQLITE_TOOBIG": "bad-value", "SQLITE_MISMATCH": "bad-value",
    "SQLITE_CONSTRAINT_UNIQUE": "conflict", "SQLITE_CONSTRAINT_PRIMARYKEY": "conflict", "SQLITE_CONSTRAINT_ROWID": "conflict",
    "SQLITE_CONSTRAINT_FOREIGNKEY": "conflict", "SQLITE_CONSTRAINT": "database-failed",
}  # fmt: skip

# Where neither is told: a connection that PostgreSQL refused has no SQLSTATE, Python 3.10 no result codes.
TEXTS = (
    (r"unique constraint failed|foreign key constraint failed", "conflict"),
    (r"constraint failed", "database-failed"),
    (r"malformed|not a database|file is encrypted", "damaged"),
    (r"no such (table|column)|has no column", "schema"),
    (r"password|authentication|pg_hba|role .* does not exist|permission denied for", "database-access"),
    (r"database .* does not exist", "no-database"),
    (r"too many (clients|connections)|connection slots", "database-busy"),
    (r"readonly|read-only", "database-read-only"),
    (r"is full|no space left", "disk-full"),
    (r"disk i/o error", "disk-failing"),
    (r"\blocked\b|\bbusy\b", "database-locked"),
    (r"nul \(0x00\)|too large|out of range|string or blob too big", "bad-value"),
)

# Where the text tells nothing either: by what kind of error the driver calls it (PEP 249).
CLASSES: tuple[tuple[type[Exception], str], ...] = (
    (sa.exc.IntegrityError, "conflict"),
    (sa.exc.DataError, "bad-value"),
    (sa.exc.ProgrammingError, "schema"),
    (sa.exc.OperationalError, "database"),
    (sa.exc.InterfaceError, "database"),
    (sa.exc.DBAPIError, "database-failed"),
    (sa.exc.TimeoutError, "database-busy"),
    (sa.exc.DisconnectionError, "database"),
    (sa.exc.StatementError, "bad-value"),
    (OverflowError, "bad-value"),
    (UnicodeError, "bad-value"),
)


def kind_of(error: Exception) -> str:
    """The code of an error that SQLAlchemy, a driver or the conversion of a value raised; a key of SENTENCES."""
    cause = getattr(error, "orig", None) or error
    state = str(getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None) or "")
    for length in (5, 2):
        if state[:length] in STATES and len(state) == 5:
            return STATES[state[:length]]
    name = str(getattr(cause, "sqlite_errorname", None) or "")
    while name:
        if name in SQLITE_CODES:
            return SQLITE_CODES[name]
        name = name.rpartition("_")[0]
    if isinstance(error, sa.exc.DBAPIError):
        text = str(cause).lower()
        for pattern, kind in TEXTS:
            if re.search(pattern, text):
                return kind
    return next((kind for kind_of_error, kind in CLASSES if isinstance(error, kind_of_error)), "database-failed")


def explain(error: Exception) -> RefoldError:
    """The same as one of Refold's errors, with a sentence; the driver's own words go to the log only."""
    kind = kind_of(error)
    made = InputError if kind == "bad-value" else StorageError
    return made(SENTENCES[kind], code=kind, detail=f"{type(error).__name__}: {error}")
