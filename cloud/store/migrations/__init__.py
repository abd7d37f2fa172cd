"""Alembic's environment: `database.migrate` runs it at every start; nobody needs the `alembic` command."""
