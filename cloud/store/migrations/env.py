"""Run by Alembic inside the transaction that `cloud.store.database.migrate` opened."""

from __future__ import annotations

from alembic import context

from cloud.store.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
context.run_migrations()
