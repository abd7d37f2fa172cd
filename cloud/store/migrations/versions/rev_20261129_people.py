"""Operators' certificates; the key a device enrolled with, and how many frames it has reported.

Devices from before keep their ids and have no key on record. Operators from before are recorded at their next call.

Made 2026-11-29.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261129_people"
down_revision = "20261124_first"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("devices", sa.Column("key_digest", sa.String(length=64), server_default="", nullable=False))
    op.add_column("devices", sa.Column("frames", sa.BigInteger(), server_default="0", nullable=False))
    op.create_table(
        "operators",
        sa.Column("serial", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("role", sa.String(length=32), nullable=False),
        sa.Column("issued_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("revoked_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("serial"),
    )
    op.create_index("operators_by_name", "operators", ["name"], unique=False)


def downgrade() -> None:
    op.drop_table("operators")
    with op.batch_alter_table("devices") as devices:
        devices.drop_column("frames")
        devices.drop_column("key_digest")
