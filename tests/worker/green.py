"""A pool of greenlets, as far as a worker can see before it starts one."""

from celery.concurrency.base import BasePool


class TaskPool(BasePool):
    is_green = True
