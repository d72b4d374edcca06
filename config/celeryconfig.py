"""Celery settings for the workers of a farm. Use: CELERY_CONFIG_MODULE=celeryconfig celery -A aque.celery_app worker

Aque's own settings (docs/settings.md) can stand here too, with `aque_` before their names; the environment wins over them.
Where the store is belongs into AQUE_BROKER, which commands and Flower read as well.
"""

# Events for Flower and `celery events`: published by a thread of their own, dropped while the broker is away.
worker_send_task_events = True

# A farm's workers come up before its servers do.
broker_connection_retry_on_startup = True
broker_connection_max_retries = None

# Pool children are forked early and live long: let one that has grown go.
worker_max_memory_per_child = 2_000_000  # KiB

# How long a stopping worker waits for what it runs before it gives it back.
aque_drain_seconds = 600
# A worker that has not been heard of for so long may lose its tasks.
aque_lease_seconds = 60
