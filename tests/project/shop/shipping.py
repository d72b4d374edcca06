"""Shipping: parcels are packed one by one, and sent together."""

import time

from celery import chord, group, shared_task
from celery.exceptions import SoftTimeLimitExceeded

from shop.database import data, note


@shared_task(rate_limit="4/s")
def print_label(parcel):
    note("label", parcel)
    return parcel


@shared_task
def pack(item, weight):
    (data() / f"packed-{item}").write_text(str(weight))
    return weight


@shared_task
def send(weights):
    note("sent", sum(weights))
    return sum(weights)


@shared_task
def announce(weight, channel="mail"):
    note("announced", f"{weight} by {channel}")
    return f"{weight} by {channel}"


@shared_task(bind=True)
def load_truck(self, parcels, gate):
    """Says how far it is; waits in the middle for the gate to be opened."""
    for n in range(parcels):
        self.update_state(state="PROGRESS", meta={"loaded": n, "of": parcels})
        deadline = time.monotonic() + 60
        while n == parcels // 2 and not (data() / gate).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    return parcels


@shared_task(soft_time_limit=0.5)
def drive_carefully():
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        return "turned back"
    return "arrived"


@shared_task(time_limit=1)
def drive_for_ever():
    time.sleep(30)


def ship(items):
    """Pack all items, then send them together and tell two channels."""
    packed = [pack.s(item, weight) for item, weight in items.items()]
    return chord(packed, send.s() | group(announce.s(), announce.s(channel="pigeon")))()
