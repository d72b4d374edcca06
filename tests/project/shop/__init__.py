"""A small shop as a Celery project: orders, shipping, reports. Nothing in it knows Aque but one line in `celery.py`."""

from shop.celery import app as celery_app

__all__ = ["celery_app"]
