"""The shop's Celery app."""

import os

from celery import Celery
from celery.signals import before_task_publish

app = Celery("shop", include=["shop.orders", "shop.shipping", "shop.reports"])
app.config_from_object("shop.config")

if os.environ.get("SHOP_WITH") == "aque":
    import aque

    aque.setup(app, tasks="all")


@before_task_publish.connect
def trace(headers, **_):
    """Every call carries who made it, as tracing libraries do it."""
    headers["trace"] = os.environ.get("SHOP_TRACE", "none")
