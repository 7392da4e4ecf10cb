"""The tables of the serving state. Times are Unix seconds; a null says that it has not happened or is not limited."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, Double, Index, Integer, MetaData, Table, Text

# Raised with every change that an older or newer server could not read. Tables that came later are made where they are
# missing, and older servers leave them alone.
VERSION = 1

metadata = MetaData()

about = Table("cinemo_serving", metadata, Column("version", Integer, nullable=False))

jobs = Table(
    "jobs",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("client", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("worker", Text),  # stays when the job ends: who ended it
    Column("lease_until", Double),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("expires_at", Double),
    Column("deadline_at", Double),
    Column("request", Text, nullable=False),
    Column("media_name", Text),
    Column("error_code", Text),
    Column("error_message", Text),
    Column("idempotency_hash", Text),  # sha256 of the key
    Column("fingerprint", Text, nullable=False),  # sha256 of request and picture
    CheckConstraint("status IN ('queued', 'in_progress', 'completed', 'failed', 'cancelled')", name="known_status"),
    Index("jobs_by_status", "status", "number"),
    Index("jobs_by_client", "client", "number"),
    Index("jobs_by_expiry", "expires_at"),
    Index("jobs_by_idempotency", "client", "idempotency_hash", unique=True),  # nulls never collide
    sqlite_autoincrement=True,
)

# When a client was last served: a counter, for several jobs are claimed at one instant.
turns = Table(
    "turns",
    metadata,
    Column("client", Text, primary_key=True),
    Column("turn", BigInteger, nullable=False),
)

# Jobs that a client submitted on a UTC day (days since 1970); they count although they are deleted.
usage = Table(
    "usage",
    metadata,
    Column("client", Text, primary_key=True),
    Column("day", Integer, primary_key=True),
    Column("jobs", Integer, nullable=False),
)

# What every job was asked (sha256 of request and pictures, drawn numbers included), and which bundle made its video.
results = Table(
    "results",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("key", Text, nullable=False),
    Column("made_by", Text),
    Index("results_by_key", "key"),
)

# Of jobs that are being made and ask for it: JSON of a few small pictures.
previews = Table(
    "previews",
    metadata,
    Column("job_id", Text, primary_key=True),
    Column("step", Integer, nullable=False),
    Column("frames", Text, nullable=False),
)

# What workers measured of their pace, and when their jobs will end: JSON of `cinemo.serving.store.estimates`.
paces = Table(
    "paces",
    metadata,
    Column("worker", Text, primary_key=True),
    Column("told_at", Double, nullable=False),
    Column("told", Text, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Double, nullable=False),
)

# Events that are owed to receivers. Null until the job ends: type, created_at and due_at.
webhooks = Table(
    "webhooks",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("event_id", Text, nullable=False, unique=True),
    Column("job_id", Text, nullable=False, index=True),
    Column("client", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("type", Text),
    Column("created_at", Double),
    Column("due_at", Double, index=True),
    Column("attempts", Integer, nullable=False, default=0),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("secret_hash", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("revoked_at", Double),
    Column("max_active", Integer),
    Column("per_day", Integer),
)
